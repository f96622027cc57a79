"""How a per-sample convolution is computed: scales, a way (``ops.implementations``), the bias."""

from __future__ import annotations

from torch import Tensor

from condconv_surgery.errors import InputError
from condconv_surgery.ops.autocast import autocast
from condconv_surgery.ops.backends import cpp as native
from condconv_surgery.ops.backends import triton as gpu
from condconv_surgery.ops.cost_model import scales_belong_in_the_kernel
from condconv_surgery.ops.dispatch import choose
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations import WAYS, Way, legal_ways
from condconv_surgery.ops.mixture import Mixture

SCALES_ITS_KERNELS = ("blocks", "plain")
"""Ways that can take ``in_scale`` and ``out_scale`` into the kernels."""

__all__ = ["WAYS", "choose", "conditional_conv2d", "legal_ways"]


def conditional_conv2d(
    x: Tensor, experts: Tensor, bias: Tensor | None, mixture: Mixture, geometry: ConvGeometry, way: str = "auto"
) -> Tensor:
    """``y_b = out_scale_b * conv(in_scale_b * x_b, W_b) + bias_b``.

    x: [B, I, H, W]. experts: [E, O, I/G, kh, kw]. bias: [E, O] or None. Returns [B, O, H', W'], in the dtype
    that autocast gives ``x``. way: one of ``WAYS``, or ``"auto"``. Raises ``InputError`` for a ``way`` not legal here.
    """
    if way == "auto":
        y = native.convolve_at_once(x, experts, mixture, geometry)
        if y is not None:
            return _with_bias(y, bias, mixture)
    x = autocast(x)  # the operators of ``blocks`` are unknown to it
    name = choose(x, experts, mixture, geometry) if way == "auto" else _legal(way, x, mixture, geometry)
    scaled = mixture.in_scale is not None or mixture.out_scale is not None
    if not scaled or _takes_scales(name, x, experts, mixture, geometry):
        y = WAYS[name](x, experts, mixture, geometry)
    else:
        y = _scale_activations(WAYS[name], x, experts, mixture, geometry)
    return _with_bias(y, bias, mixture)


def _with_bias(y: Tensor, bias: Tensor | None, mixture: Mixture) -> Tensor:
    return y if bias is None else y + mix_bias(bias, mixture.gate).to(y.dtype)[:, :, None, None]


def _takes_scales(way: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> bool:
    """Whether ``way`` applies ``in_scale`` and ``out_scale`` itself, and should."""
    if way == "blocks" and native.fits(x, experts, geometry.stride, geometry.groups):
        return True
    if gpu.scales_on_the_way(way, x, experts, mixture, geometry):
        return True
    return way in SCALES_ITS_KERNELS and scales_belong_in_the_kernel(x, geometry)


def mix_bias(bias: Tensor, gate: Tensor | None) -> Tensor:
    """``sum_e gate[b,e] * bias[e]``: [E, O] -> [B, O], or [1, O] without a gate."""
    return bias if gate is None else gate.to(bias.dtype) @ bias


def _scale_activations(way: Way, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    if mixture.in_scale is not None:
        x = x * mixture.in_scale[:, :, None, None].to(x.dtype)
    y = way(x, experts, Mixture(mixture.gate, mixture.spatial), geometry)
    return y if mixture.out_scale is None else y * mixture.out_scale[:, :, None, None].to(y.dtype)


def _legal(way: str, x: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    legal = legal_ways(x.shape[0], mixture, geometry)
    if x.shape[0] == 0:
        return legal[0]  # nothing to compute: no reason to refuse
    if way not in legal:
        raise InputError(
            f"implementation={way!r} cannot compute this layer on a batch of {x.shape[0]}.",
            f"Here it can be: auto, {', '.join(legal)}.",
            "implementation='auto'",
        )
    return way
