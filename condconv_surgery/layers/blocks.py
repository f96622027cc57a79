"""The way ``blocks``: a few samples at a time, their kernels made, used and dropped, and made again for backward.

    y_b = conv(x_b, K_b),    K_b = out_scale_b * in_scale_b * spatial_b * sum_e gate[b,e] * experts[e]

Kernels of a whole batch are B * |W| numbers (1.4 GB for ResNet-18 at batch 32), written to fresh memory, read back
once, and kept for backward. Here at most ``MOST_KERNEL_BYTES`` of them exist at a time, in a buffer that stays warm;
only small ones are kept for backward (``MOST_KEPT_SHARE``).
It is one operator with its own backward formula, so that a compiler sees one node for any batch size. Its backward
cannot be differentiated again; the other ways can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.layers.kernel_convolution import (
    convolve,
    convolve_backward,
    convolve_stacked,
    format_of,
    is_stacked,
)
from condconv_surgery.layers.kernels import mix_experts, mix_kernels, scale_kernels, unmix_kernels
from condconv_surgery.layers.mixture import ConvGeometry, Mixture

MOST_KERNEL_BYTES = 28 << 20
"""The kernels of one block. glibc serves an allocation of 32 MiB or more with fresh pages each time; those were written
at 1.6 GB/s where warm ones took 13 GB/s (docs/execution.md). Below it more is better: experts are read once a block."""

MOST_KEPT_SHARE = 3
"""Kernels of a sample up to so many times its activations are kept for backward rather than made again. It adds little
to a network, since layers of large maps hold most of its activations and few of its weights."""

MOST_WHOLE_BYTES = 10 << 20
"""Up to this many bytes of input a grouped convolution of the whole batch beats blocks, whose outputs are copied into
one: 1.0 against 1.5 of static at 384 channels and 14 px (9 MiB), 0.6 against 0.3 at 192 channels and 28 px (18 MiB)."""

MOST_STACKED_BYTES = 4 << 20
"""The input of one block of a grouped convolution, which is read once and copied once by the backend: it should stay
in the second and third level of cache."""


def convolve_in_blocks(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    """``conv(x_b, K_b)`` with every part of ``mixture`` in the kernel: [B, I, H, W] -> [B, O, H', W']."""
    x, padding = geometry.pad(x)
    keep = torch.is_grad_enabled() and _keeps_kernels(x, mixture, geometry)
    shape = (list(geometry.stride), list(padding), list(geometry.dilation), geometry.groups)
    y: Tensor = _forward(x, experts, *mixture, *shape, keep)[0]
    return y


def _keeps_kernels(x: Tensor, mixture: Mixture, geometry: ConvGeometry) -> bool:
    """Whether forward keeps the kernels for backward. Scaled ones never: their gradients need them unscaled too.

    Nothing here depends on the batch, so that one compiled graph serves every batch.
    """
    if mixture.gate is None or any(part is not None for part in mixture[1:]):
        return False
    return geometry.weight_numel <= MOST_KEPT_SHARE * geometry.activations(x)


def forward_in_blocks(
    x: Tensor,
    experts: Tensor,
    gate: Tensor | None,
    spatial: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The operator's body, in torch's own operators: x [B, I, H, W], padded already, -> [B, O, H', W'].

    With it the kernels [B, O, I/G, kh, kw] if backward is to find them, else an empty tensor.
    """
    mixture = Mixture(gate, spatial, in_scale, out_scale)
    batch, blocks = x.shape[0], _blocks(x, experts, groups)
    kept = _kernels(experts, mixture, groups, batch, x.dtype) if keep else x.new_empty(0)
    if len(blocks) == 1 and is_stacked(x, experts.shape, padding, groups):  # its output is whole already
        kernels = kept if keep else _kernels(experts, mixture, groups, batch, x.dtype)
        return convolve_stacked(x, kernels, stride, padding, dilation, groups), kept
    y = _empty_output(x, experts, stride, padding, dilation)
    for start, stop in blocks:
        part = _part(mixture, start, stop)
        kernels = kept[start:stop] if keep else _kernels(experts, part, groups, stop - start, x.dtype)
        convolve(x[start:stop], kernels, y[start:stop], stride, padding, dilation, groups)
        del kernels  # before the next are made
    return y, kept


_forward = torch.library.custom_op("condconv_surgery::convolve_in_blocks", forward_in_blocks, mutates_args=())

OPERATOR = torch.ops.condconv_surgery.convolve_in_blocks.default
"""What a dispatch mode sees of ``forward_in_blocks``."""


@_forward.register_fake
def _(
    x: Tensor,
    experts: Tensor,
    gate: Tensor | None,
    spatial: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    kept = x.new_empty((x.shape[0], *experts.shape[1:]) if keep else 0)
    return _empty_output(x, experts, stride, padding, dilation), kept


@torch.library.custom_op("condconv_surgery::convolve_in_blocks_backward", mutates_args=())
def _backward(
    grad: Tensor,
    kept: Tensor,
    x: Tensor,
    experts: Tensor,
    gate: Tensor | None,
    spatial: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> list[Tensor]:
    mixture = Mixture(gate, spatial, in_scale, out_scale)
    grads = _empty_gradients(x, experts, mixture)
    grads[1].zero_()
    grad = grad.contiguous(memory_format=format_of(x))
    for start, stop in _blocks(x, experts, groups):
        part = _part(mixture, start, stop)
        mixed, kernels = _kernels_again(kept[start:stop], experts, part, groups, stop - start, x.dtype)
        given = (grad[start:stop], x[start:stop], kernels)
        grad_kernels = convolve_backward(*given, grads[0][start:stop], stride, padding, dilation, groups, needs)
        if grad_kernels is None:
            continue
        to_experts = grads[1] if needs[1] else None
        found = unmix_kernels(grad_kernels.to(experts.dtype), mixed, experts, part, groups, to_experts)
        for target, value in zip(grads[2:], found, strict=True):
            if value is not None:
                target[start:stop] = value
    return grads


@_backward.register_fake
def _(
    grad: Tensor,
    kept: Tensor,
    x: Tensor,
    experts: Tensor,
    gate: Tensor | None,
    spatial: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> list[Tensor]:
    return _empty_gradients(x, experts, Mixture(gate, spatial, in_scale, out_scale))


def _save_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]
) -> None:
    _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(kept, *inputs[:6])  # type: ignore[arg-type]
    ctx.rest = inputs[6:10]  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _of_kept: Tensor | None
) -> tuple[Tensor | None, ...]:
    kept, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    needs = list(ctx.needs_input_grad[:6])  # type: ignore[attr-defined]
    grads = _backward(grad, kept, *tensors, *ctx.rest, needs)  # type: ignore[attr-defined]
    wanted = [g if n and t is not None else None for g, n, t in zip(grads, needs, tensors, strict=True)]
    return (*wanted, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


def _blocks(x: Tensor, experts: Tensor, groups: int) -> list[tuple[int, int]]:
    """Where each block starts and stops."""
    batch = x.shape[0]
    block = MOST_KERNEL_BYTES // max(1, experts[0].numel() * experts.element_size())
    if groups > 1 and x.numel() * x.element_size() > MOST_WHOLE_BYTES:
        block = min(block, MOST_STACKED_BYTES // max(1, x[0].numel() * x.element_size()))
    block = max(1, block)
    return [(start, min(start + block, batch)) for start in range(0, batch, block)]


def _part(mixture: Mixture, start: int, stop: int) -> Mixture:
    return Mixture(*(None if part is None else part[start:stop] for part in mixture))


def _kernels(experts: Tensor, mixture: Mixture, groups: int, batch: int, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return mix_kernels(experts, mixture, groups).to(dtype).expand(batch, -1, -1, -1, -1)


def _kernels_again(
    kept: Tensor, experts: Tensor, mixture: Mixture, groups: int, batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What ``mix_experts`` gave, and the kernels in ``dtype``: kept ones, or made again where ``kept`` is empty."""
    if kept.numel():
        return kept, kept
    with torch.no_grad():
        mixed = mix_experts(experts, mixture.gate)
        kernels = scale_kernels(mixed, mixture, groups, in_place=False).to(dtype)
    return mixed, kernels.expand(batch, -1, -1, -1, -1)


def _empty_output(x: Tensor, experts: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    kernel = experts.shape[3:]
    size = [(x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(2)]
    return torch.empty(
        (x.shape[0], experts.shape[1], *size), dtype=x.dtype, device=x.device, memory_format=format_of(x)
    )


def _empty_gradients(x: Tensor, experts: Tensor, mixture: Mixture) -> list[Tensor]:
    parts = [x.new_empty(0) if part is None else torch.empty_like(part) for part in mixture]
    return [torch.empty_like(x, memory_format=format_of(x)), torch.empty_like(experts), *parts]
