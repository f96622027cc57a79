"""How a per-sample convolution is computed, and which way is taken when.

All ways compute the same function (DESIGN of the package: ``Mixture``). They differ in what they make:

- ``plain``    one kernel, one convolution: a batch of one.
- ``static``   no kernel at all: nothing mixes kernels (one expert without spatial attention).
- ``bmm``      a 1x1 convolution is a matrix product, so a batch of kernels is a batched matrix product.
- ``grouped``  the batch stacked into the channels, one convolution with B*G groups (Yang et al. 2019, section 3).
- ``outputs``  mixing kernels and mixing outputs are the same: one dense convolution with E*O filters, then the mix.

``in_scale`` and ``out_scale`` act on the activations, ``bias`` is mixed and added last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.errors import InputError
from condconv_surgery.layers.mixture import ConvGeometry, Mixture

Way = Callable[[Tensor, Tensor, Mixture, ConvGeometry], Tensor]


def execute(
    x: Tensor, experts: Tensor, bias: Tensor | None, mixture: Mixture, geometry: ConvGeometry, way: str = "auto"
) -> Tensor:
    """``y_b = out_scale_b * conv(in_scale_b * x_b, W_b) + bias_b``.

    x: [B, I, H, W]. experts: [E, O, I/G, kh, kw]. bias: [E, O] or None. Returns [B, O, H', W'].
    way: one of ``WAYS``, or ``"auto"``. Raises ``InputError`` when ``way`` is not legal here.
    """
    name = way
    if way == "auto":
        name = choose(x, mixture, geometry)
    elif way not in (legal := legal_ways(x.shape[0], mixture, geometry)):
        raise InputError(
            f"execution={way!r} cannot compute this layer on a batch of {x.shape[0]}.",
            f"Here it can be: auto, {', '.join(legal)}.",
            "execution='auto'",
        )
    if mixture.in_scale is not None:
        x = x * mixture.in_scale[:, :, None, None].to(x.dtype)
    y = WAYS[name](x, experts, mixture, geometry)
    if mixture.out_scale is not None:
        y = y * mixture.out_scale[:, :, None, None].to(y.dtype)
    if bias is not None:
        y = y + mix_bias(bias, mixture.gate).to(y.dtype)[:, :, None, None]
    return y


def legal_ways(batch: int, mixture: Mixture, geometry: ConvGeometry) -> list[str]:
    """The names of the ways that can compute this layer on this batch."""
    if batch == 0 or _one_kernel_for_all(mixture):
        return ["static"]
    ways = ["grouped"]
    if batch == 1:
        ways.append("plain")
    if geometry.pointwise:
        ways.append("bmm")
    if mixture.spatial is None:
        ways.append("outputs")
    return ways


def choose(x: Tensor, mixture: Mixture, geometry: ConvGeometry) -> str:
    """The name of the way to take, from shapes alone: no timing, nothing that stops a compiler."""
    batch = x.shape[0]
    if batch == 0 or _one_kernel_for_all(mixture):
        return "static"
    if batch == 1:
        return "plain"
    if geometry.pointwise:
        return "bmm"
    if mixture.spatial is None and not geometry.depthwise:
        assert mixture.gate is not None
        positions = (x.shape[2] // geometry.stride[0]) * (x.shape[3] // geometry.stride[1])
        if mixture.gate.shape[1] * positions <= MOST_POSITIONS_TO_MIX:
            return "outputs"
    return "grouped"


MOST_POSITIONS_TO_MIX = 256
"""Up to this many (experts x output positions) a dense convolution with E*O filters costs less than B*G groups."""


def _one_kernel_for_all(mixture: Mixture) -> bool:
    return mixture.gate is None and mixture.spatial is None


def mix_kernels(experts: Tensor, mixture: Mixture) -> Tensor:
    """``W_b = spatial_b * sum_e gate[b,e] * experts[e]``: [E, O, I/G, kh, kw] -> [B, O, I/G, kh, kw]."""
    kernels = experts
    if mixture.gate is not None:
        kernels = (mixture.gate.to(experts.dtype) @ experts.flatten(1)).view(-1, *experts.shape[1:])
    if mixture.spatial is not None:
        kernels = kernels * mixture.spatial[:, None, None].to(kernels.dtype)
    return kernels


def mix_bias(bias: Tensor, gate: Tensor | None) -> Tensor:
    """``sum_e gate[b,e] * bias[e]``: [E, O] -> [B, O], or [1, O] without a gate."""
    return bias if gate is None else gate.to(bias.dtype) @ bias


def _static(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    x, padding = geometry.pad(x)
    return F.conv2d(x, experts[0], None, geometry.stride, padding, geometry.dilation, geometry.groups)


def _plain(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    x, padding = geometry.pad(x)
    kernel = mix_kernels(experts, mixture)[0]  # [O, I/G, kh, kw]
    return F.conv2d(x, kernel, None, geometry.stride, padding, geometry.dilation, geometry.groups)


def _bmm(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    x, (ph, pw) = geometry.pad(x)
    if ph or pw:
        x = F.pad(x, (pw, pw, ph, ph))
    x = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
    batch, _, height, width = x.shape
    o, i = geometry.weight_shape[:2]
    groups = geometry.groups
    kernels = mix_kernels(experts, mixture).reshape(batch * groups, o // groups, i)
    y = torch.bmm(kernels.to(x.dtype), x.reshape(batch * groups, i, height * width))
    return y.view(batch, o, height, width)


def _grouped(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    x, padding = geometry.pad(x)
    batch = x.shape[0]
    groups = batch * geometry.groups
    kernels = mix_kernels(experts, mixture).flatten(0, 1)  # [B*O, I/G, kh, kw]
    y = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        kernels,
        None,
        geometry.stride,
        padding,
        geometry.dilation,
        groups,
    )
    return y.view(batch, geometry.out_channels, *y.shape[2:])


def _outputs(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    assert mixture.gate is not None
    x, padding = geometry.pad(x)
    batch, groups, count = x.shape[0], geometry.groups, experts.shape[0]
    by_group = experts.view(count, groups, -1, *experts.shape[2:])  # [E, G, O/G, I/G, kh, kw]
    filters = by_group.transpose(0, 1).flatten(0, 2)  # [G*E*O/G, I/G, kh, kw]
    y = F.conv2d(x, filters, None, geometry.stride, padding, geometry.dilation, groups)
    height, width = y.shape[2:]
    y = y.reshape(batch, groups, count, -1).transpose(1, 2).reshape(batch, count, -1)  # [B, E, O*H'*W']
    mixed = mixture.gate.to(y.dtype).unsqueeze(1) @ y  # [B, 1, O*H'*W']
    return mixed.view(batch, geometry.out_channels, height, width)


WAYS: dict[str, Way] = {"static": _static, "plain": _plain, "bmm": _bmm, "grouped": _grouped, "outputs": _outputs}
