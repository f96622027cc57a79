"""One kernel for each sample: the convolution and its two gradients, without autograd, into given buffers.

Three forms, by what is fastest: a batched matrix product for 1x1, a convolution for each sample for dense kernels on a
CPU, and the batch stacked into the channels for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from condconv_surgery.ops.geometry import ConvArguments
from condconv_surgery.ops.tracing_state import is_transformed


def counts_as_cpu(x: Tensor) -> bool:
    """On a CPU, or on meta, where reports measure the memory that a CPU would need."""
    return x.device.type in ("cpu", "meta")


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format of the output, as ``nn.Conv2d`` takes it from its input."""
    if x.is_contiguous() or is_transformed():  # vmap cannot say more
        return torch.contiguous_format
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def output_size(x: Tensor, kernel_size: Sequence[int], arguments: ConvArguments) -> list[int]:
    """[H', W'] of a convolution of ``x`` [B, I, H, W]."""
    stride, padding, dilation, _ = arguments
    return [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1) // stride[d] + 1 for d in range(2)
    ]


def empty_output(x: Tensor, experts: Tensor, arguments: ConvArguments) -> Tensor:
    """Uninitialised [B, O, H', W'], in the dtype and the memory format of ``x``. experts: [E, O, I/G, kh, kw]."""
    size = (x.shape[0], experts.shape[1], *output_size(x, experts.shape[3:], arguments))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=format_of(x))


def convolve(x: Tensor, kernels: Tensor, y: Tensor, arguments: ConvArguments) -> None:
    """``y[b] = conv(x[b], kernels[b])`` in place. x: [n, I, H, W]. kernels: [n, O, I/G, kh, kw]. y: [n, O, H', W'].

    With one group ``y`` may be some of the channels of a larger tensor.
    """
    batch, out = kernels.shape[:2]
    stride, groups = arguments.stride, arguments.groups
    if _is_matrix_product(x, kernels.shape, arguments):
        last = format_of(x) == torch.channels_last
        x = x[:, :, :: stride[0], :: stride[1]]
        matrices = kernels.reshape(batch * groups, out // groups, -1)
        if last:  # positions are rows
            torch.bmm(_rows(x), matrices.transpose(1, 2), out=_rows(y))
        else:
            torch.bmm(matrices, _columns(x, groups), out=_columns(y, groups))
    elif _one_by_one(x, groups):
        for b in range(batch):
            y[b : b + 1] = F.conv2d(x[b : b + 1], kernels[b], None, *arguments)
    else:
        y[:] = convolve_stacked(x, kernels, arguments)


def convolve_stacked(x: Tensor, kernels: Tensor, arguments: ConvArguments) -> Tensor:
    """The same as a new tensor, by one convolution with n*G groups."""
    batch, out = kernels.shape[:2]
    stride, padding, dilation, groups = arguments
    stacked, filters = x.reshape(1, -1, *x.shape[2:]), kernels.reshape(-1, *kernels.shape[2:])
    y = F.conv2d(stacked, filters, None, stride, padding, dilation, batch * groups)
    return y.view(batch, out, *y.shape[2:])


def is_stacked(x: Tensor, shape: torch.Size, arguments: ConvArguments) -> bool:
    """Whether ``convolve`` takes the third form, for experts or kernels of this shape."""
    return not _is_matrix_product(x, shape, arguments) and not _one_by_one(x, arguments.groups)


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    grad_x: Tensor,
    grad_kernels: Tensor,
    add: bool,
    arguments: ConvArguments,
    needs: list[bool],
) -> None:
    """The gradients in place in ``grad_x`` and ``grad_kernels``, each where ``needs`` asks for it.

    add: accumulate into ``grad_x``, which holds the gradients of other filters of the same samples.
    """
    batch = kernels.shape[0]
    stride, padding, dilation, groups = arguments
    to_x, to_kernels = needs[0], any(needs[1:])
    if _is_matrix_product(x, kernels.shape, arguments):
        if to_x:
            _matrix_gradient_of_input(grad, x, kernels, grad_x, add, stride, groups)
        if to_kernels:
            _matrix_gradient_of_kernels(grad, x, grad_kernels, stride, groups)
        return
    backward = torch.ops.aten.convolution_backward
    mask = [to_x, to_kernels, False]
    if not _one_by_one(x, groups):
        stacked = [t.reshape(1, -1, *t.shape[2:]) for t in (grad, x)]
        filters = kernels.reshape(-1, *kernels.shape[2:])
        grads = backward(*stacked, filters, None, stride, padding, dilation, False, [0, 0], batch * groups, mask)
        if to_x:
            _store(grad_x, grads[0].view(x.shape), add)
        if to_kernels:
            grad_kernels[:] = grads[1].view(kernels.shape)
        return
    for b in range(batch):
        one = slice(b, b + 1)
        grads = backward(grad[one], x[one], kernels[b], None, stride, padding, dilation, False, [0, 0], groups, mask)
        if to_x:
            _store(grad_x[one], grads[0], add)
        if to_kernels:
            grad_kernels[b] = grads[1]


def _is_matrix_product(x: Tensor, experts_shape: torch.Size, arguments: ConvArguments) -> bool:
    """A 1x1 convolution that is a matrix product of views."""
    if experts_shape[-2:] != (1, 1) or any(arguments.padding):
        return False
    return arguments.groups == 1 or format_of(x) == torch.contiguous_format


def _one_by_one(x: Tensor, groups: int) -> bool:
    """A convolution for each sample, instead of one with n*G groups: faster on a CPU for dense kernels.

    It keeps the layout channels last too; stacking the batch into the channels would not.
    """
    return counts_as_cpu(x) and (groups == 1 or format_of(x) == torch.channels_last)


def _matrix_gradient_of_input(
    grad: Tensor, x: Tensor, kernels: Tensor, grad_x: Tensor, add: bool, stride: Sequence[int], groups: int
) -> None:
    strided, steps = any(step != 1 for step in stride), _steps(stride)
    matrices = _matrices(kernels, groups)
    if strided and not add:
        grad_x.zero_()
    target, beta = grad_x[steps], int(add)
    if strided:
        target, beta = torch.empty_like(x[steps], memory_format=format_of(x)), 0
    if format_of(x) == torch.channels_last:
        _rows(target).baddbmm_(_rows(grad), matrices, beta=beta)
    else:
        _columns(target, groups).baddbmm_(matrices.transpose(1, 2), _columns(grad, groups), beta=beta)
    if strided:
        _store(grad_x[steps], target, add)


def _matrix_gradient_of_kernels(
    grad: Tensor, x: Tensor, grad_kernels: Tensor, stride: Sequence[int], groups: int
) -> None:
    sampled, out = x[_steps(stride)], grad_kernels.view(_matrices(grad_kernels, groups).shape)
    if format_of(x) == torch.channels_last:
        torch.bmm(_rows(grad).transpose(1, 2), _rows(sampled), out=out)
    else:
        torch.bmm(_columns(grad, groups), _columns(sampled, groups).transpose(1, 2), out=out)


def _matrices(kernels: Tensor, groups: int) -> Tensor:
    """[n, O, I/G, 1, 1] -> [n*G, O/G, I/G]."""
    batch, out = kernels.shape[:2]
    return kernels.reshape(batch * groups, out // groups, -1)


def _steps(stride: Sequence[int]) -> tuple[slice, ...]:
    """The index of the pixels that a 1x1 convolution reads."""
    return (slice(None), slice(None), slice(None, None, stride[0]), slice(None, None, stride[1]))


def _store(target: Tensor, value: Tensor, add: bool) -> None:
    if add:
        target += value
    else:
        target[:] = value


def _rows(x: Tensor) -> Tensor:
    """[n, C, H, W], channels last -> [n, H*W, C], a view where the layout allows it."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def _columns(x: Tensor, groups: int) -> Tensor:
    """[n, C, H, W] -> [n*G, C/G, H*W], a view where the layout allows it."""
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, -1)
