"""Given one kernel for each sample: the convolution and its two gradients, without autograd, into given memory.

Three forms, by what is fastest: a batched matrix product for 1x1, a convolution for each sample for dense kernels on a
CPU, the batch stacked into the channels for the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def counts_as_cpu(x: Tensor) -> bool:
    """On a CPU, or on meta, where reports find out what a CPU would hold."""
    return x.device.type in ("cpu", "meta")


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format of the output, as ``nn.Conv2d`` takes it from its input."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def empty_output(x: Tensor, experts: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """Memory for [B, O, H', W'], in the dtype and the memory format of ``x``. experts: [E, O, I/G, kh, kw]."""
    kernel = experts.shape[3:]
    size = [(x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(2)]
    return torch.empty(
        (x.shape[0], experts.shape[1], *size), dtype=x.dtype, device=x.device, memory_format=format_of(x)
    )


def convolve(
    x: Tensor, kernels: Tensor, y: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> None:
    """``y[b] = conv(x[b], kernels[b])`` in place. x: [n, I, H, W]. kernels: [n, O, I/G, kh, kw]. y: [n, O, H', W'].

    With one group ``y`` may be some of the channels of a larger tensor.
    """
    batch, out = kernels.shape[:2]
    if _by_matrix(x, kernels.shape, padding, groups):
        last = format_of(x) == torch.channels_last
        x = x[:, :, :: stride[0], :: stride[1]]
        matrices = kernels.reshape(batch * groups, out // groups, -1)
        if last:  # the positions are the rows
            torch.bmm(_rows(x), matrices.transpose(1, 2), out=_rows(y))
        else:
            torch.bmm(matrices, _columns(x, groups), out=_columns(y, groups))
    elif _one_by_one(x, groups):
        for b in range(batch):
            y[b : b + 1] = F.conv2d(x[b : b + 1], kernels[b], None, stride, padding, dilation, groups)
    else:
        y[:] = convolve_stacked(x, kernels, stride, padding, dilation, groups)


def convolve_stacked(
    x: Tensor, kernels: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """The same as a new tensor, by one convolution with n*G groups."""
    batch, out = kernels.shape[:2]
    stacked, filters = x.reshape(1, -1, *x.shape[2:]), kernels.reshape(-1, *kernels.shape[2:])
    y = F.conv2d(stacked, filters, None, stride, padding, dilation, batch * groups)
    return y.view(batch, out, *y.shape[2:])


def is_stacked(x: Tensor, shape: torch.Size, padding: list[int], groups: int) -> bool:
    """Whether the third form is taken, for experts or kernels of this shape."""
    return not _by_matrix(x, shape, padding, groups) and not _one_by_one(x, groups)


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    grad_x: Tensor,
    grad_kernels: Tensor,
    add: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> None:
    """The gradients in place in ``grad_x`` and ``grad_kernels``, each where ``needs`` asks for it.

    add: to what ``grad_x`` holds already, from other filters of the same samples.
    """
    batch = kernels.shape[0]
    to_x, to_kernels = needs[0], any(needs[1:])
    if _by_matrix(x, kernels.shape, padding, groups):
        _by_matrix_backward(grad, x, kernels, grad_x, grad_kernels, add, stride, groups, to_x, to_kernels)
        return
    backward = torch.ops.aten.convolution_backward
    mask = [to_x, to_kernels, False]
    if not _one_by_one(x, groups):
        stacked = [t.reshape(1, -1, *t.shape[2:]) for t in (grad, x)]
        filters = kernels.reshape(-1, *kernels.shape[2:])
        found = backward(*stacked, filters, None, stride, padding, dilation, False, [0, 0], batch * groups, mask)
        if to_x:
            _store(grad_x, found[0].view(x.shape), add)
        if to_kernels:
            grad_kernels[:] = found[1].view(kernels.shape)
        return
    for b in range(batch):
        one = slice(b, b + 1)
        found = backward(grad[one], x[one], kernels[b], None, stride, padding, dilation, False, [0, 0], groups, mask)
        if to_x:
            _store(grad_x[one], found[0], add)
        if to_kernels:
            grad_kernels[b] = found[1]


def _by_matrix(x: Tensor, experts_shape: torch.Size, padding: list[int], groups: int) -> bool:
    """1x1 convolutions that are matrix products of views."""
    if experts_shape[-2:] != (1, 1) or padding != [0, 0]:
        return False
    return groups == 1 or format_of(x) == torch.contiguous_format


def _one_by_one(x: Tensor, groups: int) -> bool:
    """A convolution for each sample, instead of one with n*G groups: faster on a CPU for dense kernels.

    Channels last keeps its layout that way; stacking the batch into the channels would not.
    """
    return counts_as_cpu(x) and (groups == 1 or format_of(x) == torch.channels_last)


def _by_matrix_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    grad_x: Tensor,
    grad_kernels: Tensor,
    add: bool,
    stride: list[int],
    groups: int,
    to_x: bool,
    to_kernels: bool,
) -> None:
    batch, out = kernels.shape[:2]
    steps = (slice(None), slice(None), slice(None, None, stride[0]), slice(None, None, stride[1]))
    matrices = kernels.reshape(batch * groups, out // groups, -1)
    last = format_of(x) == torch.channels_last
    seen = x[steps]
    if to_x:
        if stride != [1, 1] and not add:
            grad_x.zero_()
        target, beta = grad_x[steps], int(add)
        if stride != [1, 1]:
            target, beta = torch.empty_like(seen, memory_format=format_of(x)), 0
        if last:
            _rows(target).baddbmm_(_rows(grad), matrices, beta=beta)
        else:
            _columns(target, groups).baddbmm_(matrices.transpose(1, 2), _columns(grad, groups), beta=beta)
        if stride != [1, 1]:
            _store(grad_x[steps], target, add)
    if not to_kernels:
        return
    found = grad_kernels.view(matrices.shape)
    if last:
        torch.bmm(_rows(grad).transpose(1, 2), _rows(seen), out=found)
    else:
        torch.bmm(_columns(grad, groups), _columns(seen, groups).transpose(1, 2), out=found)


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
