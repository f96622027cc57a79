"""The backend of torch's own operators, which supports every call: blocks of samples and filters, one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from condconv_surgery.ops.backends.backend_protocol import Backend
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.large_pages import in_large_pages
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.ops.per_sample.block_sizes import Block, blocks_of, kernel_buffer
from condconv_surgery.ops.per_sample.mix_kernels import mix_batch, mix_experts, scale_kernels, unmix_kernels
from condconv_surgery.ops.per_sample.per_sample_conv import (
    convolve,
    convolve_backward,
    convolve_stacked,
    empty_output,
    format_of,
    is_stacked,
)
from condconv_surgery.ops.tracing_state import is_jit_traced


class EagerBackend(Backend):
    """Eager torch, on any device and in any dtype."""

    name = "eager"
    accepts_kernels = True

    def supports(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry | ConvArguments, /) -> bool:
        return True

    def convolve(
        self,
        x: Tensor,
        experts: Tensor,
        mixture: Mixture,
        arguments: ConvArguments,
        kernels: Tensor | None = None,
        /,
    ) -> Tensor:
        batch, groups, blocks = x.shape[0], arguments.groups, blocks_of(x, experts, arguments.groups)
        if len(blocks) == 1 and is_stacked(x, experts.shape, arguments):  # one call writes the whole output
            if kernels is None:
                kernels = mix_batch(experts, mixture, groups, batch, x.dtype)
            return convolve_stacked(x, kernels, arguments)
        y = in_large_pages(empty_output(x, experts, arguments))
        buffer = None
        if kernels is None and mixture.gate is not None:
            buffer = kernel_buffer(blocks, experts, experts.dtype)
        for block in blocks:
            samples, filters = block
            if kernels is None:
                some = experts[:, filters]
                out = None if buffer is None else block.view_of(buffer, some.shape)
                of_block = mix_batch(some, block.of(mixture), groups, block.size, x.dtype, out)
            else:
                of_block = kernels[samples, filters]
            convolve(x[samples], of_block, y[samples, filters], arguments)
        return y

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        experts: Tensor,
        mixture: Mixture,
        arguments: ConvArguments,
        out: list[Tensor],
        needs: list[bool],
        kernels: Tensor | None = None,
        /,
    ) -> list[Tensor]:
        in_large_pages(out[0])
        for total in out[1:]:
            in_large_pages(total).zero_()
        sums = Mixture(*(None if part is None else total for part, total in zip(mixture, out[2:], strict=True)))
        grad = grad.contiguous(memory_format=format_of(x))
        blocks = blocks_of(x, experts, arguments.groups)
        # untouched pages cost no physical memory: a buffer that is not needed is not written
        buffers = (kernel_buffer(blocks, experts, experts.dtype), kernel_buffer(blocks, experts, experts.dtype))
        grad_buffer = kernel_buffer(blocks, experts, x.dtype)
        for block in blocks:
            samples, filters = block
            part, some = block.of(mixture), experts[:, filters]
            if kernels is None:
                mixed, scaled = _mix_again(block, some, part, arguments.groups, x.dtype, buffers)
            else:
                mixed = scaled = kernels[samples, filters]
            grad_x, grad_kernels = out[0][samples], block.view_of(grad_buffer, some.shape)
            of_block = (grad[samples, filters], x[samples], scaled)
            convolve_backward(*of_block, grad_x, grad_kernels, not block.first, arguments, needs)
            if any(needs[1:]):
                grad_experts = out[1][:, filters] if needs[1] else None
                grad_kernels = grad_kernels.to(experts.dtype)
                grads = unmix_kernels(grad_kernels, mixed, some, part, arguments.groups, grad_experts)
                _add(block.of(sums), grads)
        return out

    def pool(self, x: Tensor, /) -> Tensor:
        """``mean`` is four operators on a CPU, a sum and a product are two: 12.5 us against 18 on a small map.

        A sum of half-precision values can leave their range.
        """
        if x.dtype in (torch.float16, torch.bfloat16) or is_jit_traced():  # 1 / (H * W) would be a float32 tensor
            return x.mean(dim=(2, 3))
        return x.sum(dim=(2, 3)) * (1.0 / (x.shape[2] * x.shape[3]))


def _mix_again(
    block: Block,
    experts: Tensor,
    mixture: Mixture,
    groups: int,
    dtype: torch.dtype,
    buffers: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The result of ``mix_experts``, and the kernels in ``dtype``, for one block."""
    with torch.no_grad():
        mixed = mix_experts(experts, mixture.gate, block.view_of(buffers[0], experts.shape))
        kernels = scale_kernels(mixed, mixture, groups, block.view_of(buffers[1], experts.shape)).to(dtype)
    return mixed, kernels.expand(block.size, -1, -1, -1, -1)


def _add(totals: Mixture, grads: list[Tensor | None]) -> None:
    """Accumulate the gradients of a mixture's parts, where both are not None."""
    for total, grad in zip(totals, grads, strict=True):
        if total is not None and grad is not None:
            total += grad
