"""The ways to compute a per-sample convolution. All are the same function (``Mixture``); they differ in what they make.

- ``plain``    one kernel, one convolution: a batch of one.
- ``static``   no kernel at all: nothing mixes kernels (one expert without spatial attention).
- ``blocks``   the kernels of a few samples at a time, made again for backward: see ``ops.implementations.blockwise``.
- ``bmm``      a 1x1 convolution is a matrix product, so a batch of kernels is a batched matrix product.
- ``grouped``  the batch stacked into the channels, one convolution with B*G groups (Yang et al. 2019, section 3).
- ``unfold``   the patches of each sample as columns, then a batched matrix product: exports with a dynamic batch.
- ``loop``     a convolution for each sample, over ``unbind``: cheap where B is small and nothing may be compiled.
- ``outputs``  mixing kernels and mixing outputs are the same: one dense convolution with E*O filters, then the mix.
- ``inputs``   so is mixing inputs: one dense convolution of E*I channels, the input times each gate, whose sums mix.

Each takes ``x`` [B, I, H, W], the experts [E, O, I/G, kh, kw] and a mixture, and returns [B, O, H', W']. All but
``blocks`` are compositions of torch's operators, which any tracer, exporter or second derivative can see through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.backends import triton as gpu
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.blockwise import convolve_in_blocks
from condconv_surgery.ops.implementations.mix_kernels import mix_kernels
from condconv_surgery.ops.implementations.per_sample_conv import format_of
from condconv_surgery.ops.mixture import Mixture

Way = Callable[[Tensor, Tensor, Mixture, ConvGeometry], Tensor]


def legal_ways(batch: int, mixture: Mixture, geometry: ConvGeometry) -> list[str]:
    """The names of the ways that can compute this layer on this batch."""
    if batch == 0:
        return ["static"]
    if one_kernel_for_all(mixture):
        return ["static", "blocks"] if batch > 1 else ["static", "blocks", "plain"]
    ways = ["blocks", "grouped", "loop", "unfold"]
    if batch == 1:
        ways.append("plain")
    if geometry.pointwise:
        ways.append("bmm")
    if mixture.spatial is None:
        ways += ["outputs", "inputs"]
    return ways


def one_kernel_for_all(mixture: Mixture) -> bool:
    """Nothing makes the kernels of two samples differ, but scales that can act on the activations."""
    return mixture.gate is None and mixture.spatial is None


def _static(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    x, padding = geometry.pad(x)
    return F.conv2d(x, experts[0], None, geometry.stride, padding, geometry.dilation, geometry.groups)


def _plain(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    x, padding = geometry.pad(x)
    kernel = gpu.kernel_at_once(x, experts, mixture, geometry)  # [O, I/G, kh, kw]
    if kernel is None:
        kernel = mix_kernels(experts, mixture, geometry.groups)[0].to(x.dtype)
    return F.conv2d(x, kernel, None, geometry.stride, padding, geometry.dilation, geometry.groups)


def _loop(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    x, padding = geometry.pad(x)
    kernels = mix_kernels(experts, mixture).to(x.dtype)
    # unbind, not indexing: the gradient of x[b] is a tensor as large as x, B times over
    each = zip(x.unbind(), kernels.unbind(), strict=True)
    stride, dilation, groups = geometry.stride, geometry.dilation, geometry.groups
    return torch.stack([F.conv2d(sample, kernel, None, stride, padding, dilation, groups) for sample, kernel in each])


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


def _unfold(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    x, padding = geometry.pad(x)
    batch, groups, (o, i, kh, kw) = x.shape[0], geometry.groups, geometry.weight_shape
    size = [
        (x.shape[2 + d] + 2 * padding[d] - geometry.dilation[d] * ((kh, kw)[d] - 1) - 1) // geometry.stride[d] + 1
        for d in range(2)
    ]
    columns = F.unfold(x, (kh, kw), geometry.dilation, padding, geometry.stride)  # [B, I*kh*kw, H'*W']
    columns = columns.view(batch * groups, i * kh * kw, -1)
    kernels = mix_kernels(experts, mixture).reshape(batch * groups, o // groups, i * kh * kw)
    return torch.bmm(kernels.to(x.dtype), columns).view(batch, o, *size)


def _grouped(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    x, padding = geometry.pad(x)
    batch = x.shape[0]
    kernels = mix_kernels(experts, mixture).flatten(0, 1).to(x.dtype)  # [B*O, I/G, kh, kw]
    y = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        kernels,
        None,
        geometry.stride,
        padding,
        geometry.dilation,
        batch * geometry.groups,
    )
    return y.view(batch, geometry.out_channels, *y.shape[2:])


def _outputs(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    assert mixture.gate is not None
    x, padding = geometry.pad(x)
    batch, groups, count = x.shape[0], geometry.groups, experts.shape[0]
    by_group = experts.view(count, groups, -1, *experts.shape[2:])  # [E, G, O/G, I/G, kh, kw]
    filters = by_group.transpose(0, 1).flatten(0, 2).to(x.dtype)  # [G*E*O/G, I/G, kh, kw]
    y = F.conv2d(x, filters, None, geometry.stride, padding, geometry.dilation, groups)
    height, width = y.shape[2:]
    y = y.reshape(batch, groups, count, -1).transpose(1, 2).reshape(batch, count, -1)  # [B, E, O*H'*W']
    mixed = mixture.gate.to(y.dtype).unsqueeze(1) @ y  # [B, 1, O*H'*W']
    return mixed.view(batch, geometry.out_channels, height, width)


def _inputs(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    assert mixture.gate is not None
    x, padding = geometry.pad(x)
    groups, count = geometry.groups, experts.shape[0]
    gate = mixture.gate.to(x.dtype)
    if format_of(x) == torch.channels_last:
        seen = x.permute(0, 2, 3, 1).reshape(*x.shape[:1], *x.shape[2:], groups, 1, -1)  # [B, H, W, G, 1, I/G]
        scaled = (seen * gate[:, None, None, None, :, None]).flatten(3).permute(0, 3, 1, 2)  # [B, G*E*I/G, H, W]
    else:
        seen = x.reshape(x.shape[0], groups, 1, -1, *x.shape[2:])  # [B, G, 1, I/G, H, W]
        scaled = (seen * gate[:, None, :, None, None, None]).flatten(1, 3)  # [B, G*E*I/G, H, W]
    filters = experts.transpose(0, 1).reshape(-1, count * experts.shape[2], *experts.shape[3:]).to(x.dtype)
    return F.conv2d(scaled, filters, None, geometry.stride, padding, geometry.dilation, groups)


WAYS: dict[str, Way] = {
    "static": _static,
    "plain": _plain,
    "blocks": convolve_in_blocks,
    "bmm": _bmm,
    "grouped": _grouped,
    "unfold": _unfold,
    "loop": _loop,
    "outputs": _outputs,
    "inputs": _inputs,
}
