"""The operation: scales, the chosen implementation of the convolution, the bias."""

from __future__ import annotations

from torch import Tensor

from condconv_surgery.errors import InputError
from condconv_surgery.ops.autocast import autocast
from condconv_surgery.ops.choose_implementation import choose, choose_for_jit_trace
from condconv_surgery.ops.cost_model import scales_belong_in_the_kernel
from condconv_surgery.ops.dispatch import applies_scales, fast_convolve
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations import IMPLEMENTATIONS, legal_implementations, why_not
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.tracing_state import is_jit_traced


def conditional_conv2d(
    x: Tensor,
    experts: Tensor,
    bias: Tensor | None,
    mixture: Mixture,
    geometry: ConvGeometry,
    implementation: str = "auto",
) -> Tensor:
    """``y_b = out_scale_b * conv(in_scale_b * x_b, W_b) + bias_b``.

    x: [B, I, H, W]. experts: [E, O, I/G, kh, kw]. bias: [E, O] or None. Returns [B, O, H', W'], in the dtype to which
    autocast casts ``x``. implementation: a name in ``ops.implementations.IMPLEMENTATIONS``, or ``"auto"``.
    Raises ``InputError`` for an implementation that cannot compute this layer on this batch.
    """
    if implementation == "auto":
        y = fast_convolve("auto", x, experts, mixture, geometry)
        if y is not None:
            return with_mixed_bias(y, bias, mixture)
    x = autocast(x)  # autocast has no rule for our custom operator
    if is_jit_traced():
        implementation = choose_for_jit_trace(implementation, mixture, geometry)
    elif implementation == "auto":
        implementation = choose(x, experts, mixture, geometry)
    else:
        implementation = _checked(implementation, x, mixture, geometry)
    scaled = mixture.in_scale is not None or mixture.out_scale is not None
    if not scaled or _scales_go_into_the_kernel(implementation, x, experts, mixture, geometry):
        y = _convolve(implementation, x, experts, mixture, geometry)
    else:
        y = _scale_activations(implementation, x, experts, mixture, geometry)
    return with_mixed_bias(y, bias, mixture)


def _convolve(implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    y = fast_convolve(implementation, x, experts, mixture, geometry)
    return IMPLEMENTATIONS[implementation].convolve(x, experts, mixture, geometry) if y is None else y


def _scale_activations(
    implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry
) -> Tensor:
    if mixture.in_scale is not None:
        x = x * mixture.in_scale[:, :, None, None].to(x.dtype)
    y = _convolve(implementation, x, experts, Mixture(mixture.gate, mixture.spatial), geometry)
    return y if mixture.out_scale is None else y * mixture.out_scale[:, :, None, None].to(y.dtype)


def _scales_go_into_the_kernel(
    implementation: str, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry
) -> bool:
    if applies_scales(implementation, x, experts, mixture, geometry):
        return True
    return IMPLEMENTATIONS[implementation].scales_kernels and scales_belong_in_the_kernel(x, geometry)


def with_mixed_bias(y: Tensor, bias: Tensor | None, mixture: Mixture) -> Tensor:
    """``y_b + sum_e gate[b,e] * bias[e]``. y: [B, O, H', W']. bias: [E, O] or None."""
    return y if bias is None else y + mix_bias(bias, mixture.gate).to(y.dtype)[:, :, None, None]


def mix_bias(bias: Tensor, gate: Tensor | None) -> Tensor:
    """``sum_e gate[b,e] * bias[e]``: [E, O] -> [B, O], or [1, O] without a gate."""
    return bias if gate is None else gate.to(bias.dtype) @ bias


def _checked(implementation: str, x: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    batch = x.shape[0]
    if batch == 0:
        return legal_implementations(0, mixture, geometry)[0]  # nothing to compute, so any name is accepted
    reason = why_not(implementation, batch, mixture, geometry)
    if reason is not None:
        raise InputError(
            f"implementation={implementation!r} cannot compute this layer on a batch of {batch}: {reason}.",
            f"Supported here: auto, {', '.join(legal_implementations(batch, mixture, geometry))}.",
            "implementation='auto'",
        )
    return implementation
