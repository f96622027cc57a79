"""The way ``blocks``: some samples and filters at a time, their kernels made, used, dropped, made again for backward.

    y_b = conv(x_b, K_b),    K_b = out_scale_b * in_scale_b * spatial_b * sum_e gate[b,e] * experts[e]

Kernels of a whole batch are B * |W| numbers (1.4 GB for ResNet-18 at batch 32), written to fresh memory, read back
once, and kept for backward. Here a few of them exist at a time (``block_sizes``), in a buffer that stays warm;
only small ones are kept for backward (``MOST_KEPT_SHARE``).
It is one operator with its own backward formula, so that a compiler sees one node for any batch size. Its backward
cannot be differentiated again; the other ways can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.ops.backends import cpp as native
from condconv_surgery.ops.backends import triton as gpu
from condconv_surgery.ops.geometry import ConvGeometry
from condconv_surgery.ops.implementations.block_sizes import blocks_of, room_for
from condconv_surgery.ops.implementations.mix_kernels import (
    empty_gradients,
    mix_experts,
    mix_kernels,
    scale_kernels,
    unmix_kernels,
)
from condconv_surgery.ops.implementations.per_sample_conv import (
    convolve,
    convolve_backward,
    convolve_stacked,
    empty_output,
    format_of,
    is_stacked,
)
from condconv_surgery.ops.large_pages import in_large_pages
from condconv_surgery.ops.mixture import Mixture

MOST_KEPT_SHARE = 3
"""Kernels of a sample up to so many times its activations are kept for backward rather than made again. It adds little
to a network, since layers of large maps hold most of its activations and few of its weights."""


def convolve_in_blocks(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> Tensor:
    """``conv(x_b, K_b)`` with every part of ``mixture`` in the kernel: [B, I, H, W] -> [B, O, H', W']."""
    at_once = gpu.convolve_at_once(x, experts, mixture, geometry)
    if at_once is not None:
        return at_once
    x, padding = geometry.pad(x)
    shape = (list(geometry.stride), list(padding), list(geometry.dilation), geometry.groups)
    keep = torch.is_grad_enabled() and _keeps_kernels(x, experts, mixture, geometry)
    y: Tensor = _forward(x, experts, *mixture, *shape, keep)[0]
    return y


def _keeps_kernels(x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry) -> bool:
    """Whether forward keeps the kernels for backward. Scaled ones never: their gradients need them unscaled too.

    Nothing here depends on the batch, so that one compiled graph serves every batch.
    """
    if mixture.gate is None or any(part is not None for part in mixture[1:]):
        return False
    if native.fits(x, experts, geometry.stride, geometry.groups):
        return False
    if gpu.fits(x, experts, mixture, geometry.stride, geometry.dilation, geometry.groups):
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
    """The operator's body, in torch's own operators where neither ``native`` nor ``gpu`` takes it.

    x [B, I, H, W], padded already, -> [B, O, H', W']; with it the kernels [B, O, I/G, kh, kw] if backward is to find
    them, else an empty tensor.
    """
    mixture = Mixture(gate, spatial, in_scale, out_scale)
    if not keep and native.fits(x, experts, stride, groups):
        return native.convolve(x, experts, mixture, stride, padding, dilation, groups), x.new_empty(0)
    if not keep and gpu.fits(x, experts, mixture, stride, dilation, groups):
        return gpu.convolve(x, experts, mixture, stride, padding, dilation), x.new_empty(0)
    batch, blocks = x.shape[0], blocks_of(x, experts, groups)
    kept = _kernels(experts, mixture, groups, batch, x.dtype) if keep else x.new_empty(0)
    if len(blocks) == 1 and is_stacked(x, experts.shape, padding, groups):  # its output is whole already
        kernels = kept if keep else _kernels(experts, mixture, groups, batch, x.dtype)
        return convolve_stacked(x, kernels, stride, padding, dilation, groups), kept
    y = in_large_pages(empty_output(x, experts, stride, padding, dilation))
    room = None if keep or gate is None else room_for(blocks, experts, experts.dtype)
    for block in blocks:
        samples, filters = block
        if keep:
            kernels = kept[samples, filters]
        else:
            some = experts[:, filters]
            out = None if room is None else block.view_of(room, some.shape)
            kernels = _kernels(some, block.of(mixture), groups, block.size, x.dtype, out)
        convolve(x[samples], kernels, y[samples, filters], stride, padding, dilation, groups)
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
    return empty_output(x, experts, stride, padding, dilation), kept


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
    grads = empty_gradients(x, experts, mixture)
    if not kept.numel() and native.fits(x, experts, stride, groups):  # as in forward, unless enabled since
        values = native.convolve_backward(grad, x, experts, mixture, stride, padding, dilation, groups, needs)
        return [room if value is None else _as_promised(value, room) for value, room in zip(values, grads, strict=True)]
    if not kept.numel() and gpu.fits(x, experts, mixture, stride, dilation, groups):
        return gpu.convolve_backward(grad, x, experts, mixture, grads, stride, padding, dilation, needs)
    in_large_pages(grads[0])
    sums = Mixture(*(None if part is None else g for part, g in zip(mixture, grads[2:], strict=True)))
    for total in grads[1:]:
        in_large_pages(total).zero_()
    grad = grad.contiguous(memory_format=format_of(x))
    blocks = blocks_of(x, experts, groups)
    of_mixed, of_scaled = (room_for(blocks, experts, experts.dtype) for _ in range(2))  # not touched, not paid for
    of_grad = room_for(blocks, experts, x.dtype)
    for block in blocks:
        samples, filters = block
        part, some = block.of(mixture), experts[:, filters]
        of_block = kept[samples, filters] if kept.numel() else None
        out = (block.view_of(of_mixed, some.shape), block.view_of(of_scaled, some.shape))
        mixed, kernels = _kernels_again(of_block, some, part, groups, block.size, x.dtype, out)
        given = (grad[samples, filters], x[samples], kernels)
        grad_x, grad_kernels = grads[0][samples], block.view_of(of_grad, some.shape)
        convolve_backward(*given, grad_x, grad_kernels, not block.first, stride, padding, dilation, groups, needs)
        if not any(needs[1:]):
            continue
        to_experts = grads[1][:, filters] if needs[1] else None
        found = unmix_kernels(grad_kernels.to(experts.dtype), mixed, some, part, groups, to_experts)
        for total_of_block, value in zip(block.of(sums), found, strict=True):
            if total_of_block is not None and value is not None:
                total_of_block += value
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
    return empty_gradients(x, experts, Mixture(gate, spatial, in_scale, out_scale))


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


def _kernels(
    experts: Tensor, mixture: Mixture, groups: int, batch: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    with torch.no_grad():
        return mix_kernels(experts, mixture, groups, out).to(dtype).expand(batch, -1, -1, -1, -1)


def _kernels_again(
    kept: Tensor | None,
    experts: Tensor,
    mixture: Mixture,
    groups: int,
    batch: int,
    dtype: torch.dtype,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """What ``mix_experts`` gave, and the kernels in ``dtype``: kept ones, or else made again in ``out``."""
    if kept is not None:
        return kept, kept
    with torch.no_grad():
        mixed = mix_experts(experts, mixture.gate, out[0])
        kernels = scale_kernels(mixed, mixture, groups, out[1]).to(dtype)
    return mixed, kernels.expand(batch, -1, -1, -1, -1)


def _as_promised(value: Tensor, room: Tensor) -> Tensor:
    """``value``, in the dtype and the strides of ``room``, which a compiler was told of."""
    same = value.dtype == room.dtype and value.stride() == room.stride()
    return value if same else room.copy_(value)
