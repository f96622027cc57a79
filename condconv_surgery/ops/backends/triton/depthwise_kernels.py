"""Depthwise convolutions with a kernel for each sample on a GPU, and their gradients: limited by the activations.

y[b, c, p] = sum_t x[b, c, at(p, t)] K[b, t, c]        at(p, t) = p * stride - padding + t * dilation
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from condconv_surgery.ops.backends.triton.launch import NOT_SPECIALISED, Pair, constants_of, launch, power_of_two

MAX_POSITIONS = 256
"""Positions that one program of the gradient of kernels sums over, few at a time."""


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _convolve(
    x,
    kernels,
    y,
    channels,
    height,
    width,
    out_height,
    out_width,
    x_b,
    x_c,
    x_h,
    x_w,
    y_b,
    y_c,
    y_h,
    y_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``y`` from ``x``; BACK: the gradient of the input from that of the output."""
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b = tl.program_id(2).to(tl.int64)
    known = p < out_height * out_width
    there = c < channels
    p_h = p // out_width
    p_w = p % out_width
    total = tl.zeros((ROWS, COLS), tl.float32)
    for t_h in tl.static_range(KH):
        for t_w in tl.static_range(KW):
            if BACK:
                s_h = p_h + PH - t_h * DH
                s_w = p_w + PW - t_w * DW
                inside = known & (s_h >= 0) & (s_w >= 0) & (s_h % SH == 0) & (s_w % SW == 0)
                h = s_h // SH
                w = s_w // SW
            else:
                h = p_h * SH - PH + t_h * DH
                w = p_w * SW - PW + t_w * DW
                inside = known & (h >= 0) & (w >= 0)
            inside = inside & (h < height) & (w < width)
            at = x + b * x_b + (h * x_h + w * x_w)[:, None] + c[None, :] * x_c
            pixels = tl.load(at, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
            at = kernels + (b * (KH * KW) + t_h * KW + t_w) * channels + c
            total += pixels * tl.load(at, mask=there, other=0.0).to(tl.float32)[None, :]
    at = y + b * y_b + (p_h * y_h + p_w * y_w)[:, None] + c[None, :] * y_c
    tl.store(at, total.to(y.dtype.element_ty), mask=known[:, None] & there[None, :])


@triton.jit(do_not_specialize=[*NOT_SPECIALISED, "share"])
def _gradient_of_kernels(
    grad,
    x,
    sums,
    channels,
    height,
    width,
    out_height,
    out_width,
    share,
    g_b,
    g_c,
    g_h,
    g_w,
    x_b,
    x_c,
    x_h,
    x_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``sums[part, b, t, c]`` over the part's ``share`` of the positions. TAPS: rounded up to a power of two."""
    part = tl.program_id(0)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b = tl.program_id(2).to(tl.int64)
    there = c < channels
    t = tl.arange(0, TAPS)
    t_h = t // KW
    t_w = t % KW
    total = tl.zeros((TAPS, ROWS, COLS), tl.float32)
    last = tl.minimum((part + 1) * share, out_height * out_width)
    for first in range(part * share, last, ROWS):
        p = first + tl.arange(0, ROWS)
        known = p < last
        p_h = p // out_width
        p_w = p % out_width
        at = grad + b * g_b + (p_h * g_h + p_w * g_w)[:, None] + c[None, :] * g_c
        grads = tl.load(at, mask=known[:, None] & there[None, :], other=0.0).to(tl.float32)
        h = p_h[None, :] * SH - PH + t_h[:, None] * DH  # [TAPS, ROWS]
        w = p_w[None, :] * SW - PW + t_w[:, None] * DW
        inside = known[None, :] & (t < KH * KW)[:, None] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        at = x + b * x_b + (h * x_h + w * x_w)[:, :, None] + c[None, None, :] * x_c
        pixels = tl.load(at, mask=inside[:, :, None] & there[None, None, :], other=0.0).to(tl.float32)
        total += grads[None, :, :] * pixels
    at = sums + ((part * tl.num_programs(2) + b) * (KH * KW) + t[:, None]) * channels + c[None, :]
    tl.store(at, tl.sum(total, 1), mask=(t < KH * KW)[:, None] & there[None, :])


def convolve(x: Tensor, kernels: Tensor, y: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Pair) -> None:
    """``y[b] = conv(x[b], kernels[b])``. x: [B, C, H, W]. kernels: [B, T, C], contiguous. y: [B, C, H', W']."""
    _launch(x, kernels, y, stride, padding, dilation, size, back=False)


def gradient_of_input(
    grad: Tensor, kernels: Tensor, grad_x: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Pair
) -> None:
    """``grad_x`` [B, C, H, W] from ``grad`` [B, C, H', W']."""
    _launch(grad, kernels, grad_x, stride, padding, dilation, size, back=True)


def gradient_of_kernels(grad: Tensor, x: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Pair) -> Tensor:
    """[B, T, C], in float32. Parts are summed in a fixed order, so that the result is deterministic."""
    batch, channels, height, width = grad.shape
    taps = power_of_two(size[0] * size[1])
    last = x.stride(1) == 1
    cols = min(32 if last else 4, power_of_two(channels))
    rows = max(1, 8192 // (taps * cols))
    parts = -(-height * width // MAX_POSITIONS)
    sums = x.new_empty(parts, batch, size[0] * size[1], channels, dtype=torch.float32)
    grid = (parts, -(-channels // cols), batch)
    scalars = (channels, *x.shape[2:], height, width, -(-height * width // parts), *grad.stride(), *x.stride())
    constants = {**constants_of(size, stride, padding, dilation), "TAPS": taps, "ROWS": rows, "COLS": cols}
    launch(_gradient_of_kernels, grid, (grad, x, sums), scalars, constants)
    return sums[0] if parts == 1 else sums.sum(0)


def _launch(
    x: Tensor, kernels: Tensor, y: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Pair, back: bool
) -> None:
    batch, channels, height, width = y.shape
    last = y.stride(1) == 1
    cols = min(64 if last else 1, power_of_two(channels))
    rows = min(max(16, power_of_two(height * width)), 2048 // cols)
    grid = (-(-height * width // rows), -(-channels // cols), batch)
    scalars = (channels, *x.shape[2:], height, width, *x.stride(), *y.stride())
    constants = {**constants_of(size, stride, padding, dilation), "BACK": back, "ROWS": rows, "COLS": cols}
    launch(_convolve, grid, (x, kernels, y), scalars, constants)
