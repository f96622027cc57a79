"""Dense convolutions with a kernel for each sample, as matrix products on a GPU's tensor cores, and their gradients.

Positions are rows, channels are columns; patches are read directly from the input, so nothing is unfolded:

    y[b, p, o]     = sum_{t,i} x[b, at(p, t), i] K[b, o, t, i]
    dx[b, q, i]    = sum_{t,o} dy[b, p, o] K[b, o, t, i]       over the p, t with at(p, t) = q
    dK[b, o, t, i] = sum_p     dy[b, p, o] x[b, at(p, t), i]

with ``at(p, t) = p * stride - padding + t * dilation`` in both directions. The first two are one kernel. In the second
the positions are computed phase by phase of the stride: those of one phase have the same taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from condconv_surgery.ops.backends.triton.launch import NOT_SPECIALISED, Pair, constants_of, launch, power_of_two


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _convolve(
    x,
    kernels,
    y,
    height,
    width,
    ins,
    outs,
    out_height,
    out_width,
    x_b,
    x_c,
    x_h,
    x_w,
    k_b,
    k_o,
    k_t,
    k_i,
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
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y`` from ``x`` [.., ins, ..]; BACK: the gradient of the input from that of the output, k_o and k_i swapped."""
    phases_h: tl.constexpr = SH if BACK else 1
    phases_w: tl.constexpr = SW if BACK else 1
    step_h: tl.constexpr = 1 if BACK else SH
    step_w: tl.constexpr = 1 if BACK else SW
    phase = tl.program_id(0) % (phases_h * phases_w)
    first = (tl.program_id(0) // (phases_h * phases_w)) * ROWS
    from_h = phase // phases_w
    from_w = phase % phases_w
    tall = (out_height - from_h + phases_h - 1) // phases_h
    wide = (out_width - from_w + phases_w - 1) // phases_w
    if first < tall * wide:
        b = tl.program_id(2).to(tl.int64)
        p = first + tl.arange(0, ROWS)
        known = p < tall * wide
        p_h = p // wide
        p_w = p % wide
        o = tl.program_id(1) * COLS + tl.arange(0, COLS)
        # the taps of this phase: the first, then every phases_h-th
        tap_h = (from_h + PH) % phases_h
        tap_w = (from_w + PW) % phases_w
        taps_h = (KH - tap_h + phases_h - 1) // phases_h
        taps_w = (KW - tap_w + phases_w - 1) // phases_w
        parts = tl.cdiv(ins, INNER)
        total = tl.zeros((ROWS, COLS), tl.float32)
        for step in range(taps_h * taps_w * parts):
            tap = step // parts
            i = (step % parts) * INNER + tl.arange(0, INNER)
            t_h = tap_h + (tap // taps_w) * phases_h
            t_w = tap_w + (tap % taps_w) * phases_w
            if BACK:  # exact: of this phase only
                h = p_h + (from_h + PH - t_h * DH) // phases_h
                w = p_w + (from_w + PW - t_w * DW) // phases_w
            else:
                h = p_h * step_h - PH + t_h * DH
                w = p_w * step_w - PW + t_w * DW
            inside = known & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            at = x + b * x_b + (h * x_h + w * x_w)[:, None] + i[None, :] * x_c
            patch = tl.load(at, mask=inside[:, None] & (i < ins)[None, :], other=0.0)  # [ROWS, INNER]
            at = kernels + b * k_b + (t_h * KW + t_w) * k_t + i[:, None] * k_i + o[None, :] * k_o
            kernel = tl.load(at, mask=(i < ins)[:, None] & (o < outs)[None, :], other=0.0)  # [INNER, COLS]
            total = tl.dot(patch, kernel, total, input_precision=PRECISION)
        h = p_h * phases_h + from_h
        w = p_w * phases_w + from_w
        at = y + b * y_b + (h * y_h + w * y_w)[:, None] + o[None, :] * y_c
        tl.store(at, total.to(y.dtype.element_ty), mask=known[:, None] & (o < outs)[None, :])


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _gradient_of_kernels(
    grad,
    x,
    kernels,
    height,
    width,
    ins,
    outs,
    out_height,
    out_width,
    g_b,
    g_c,
    g_h,
    g_w,
    x_b,
    x_c,
    x_h,
    x_w,
    k_b,
    k_o,
    k_t,
    k_i,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``kernels[b, o, t, i]``: a tile of filters by channels, of one tap and one sample."""
    tap = tl.program_id(0) % (KH * KW)
    o = (tl.program_id(0) // (KH * KW)) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b = tl.program_id(2).to(tl.int64)
    t_h = tap // KW
    t_w = tap % KW
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, out_height * out_width, INNER):
        p = first + tl.arange(0, INNER)
        known = p < out_height * out_width
        p_h = p // out_width
        p_w = p % out_width
        at = grad + b * g_b + o[:, None] * g_c + (p_h * g_h + p_w * g_w)[None, :]
        grads = tl.load(at, mask=(o < outs)[:, None] & known[None, :], other=0.0)  # [ROWS, INNER]
        h = p_h * SH - PH + t_h * DH
        w = p_w * SW - PW + t_w * DW
        inside = known & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        at = x + b * x_b + (h * x_h + w * x_w)[:, None] + i[None, :] * x_c
        patch = tl.load(at, mask=inside[:, None] & (i < ins)[None, :], other=0.0)  # [INNER, COLS]
        total = tl.dot(grads, patch, total, input_precision=PRECISION)
    at = kernels + b * k_b + o[:, None] * k_o + tap * k_t + i[None, :] * k_i
    tl.store(at, total.to(kernels.dtype.element_ty), mask=(o < outs)[:, None] & (i < ins)[None, :])


def convolve(x: Tensor, kernels: Tensor, y: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Pair) -> None:
    """``y[b] = conv(x[b], kernels[b])``. x: [B, I, H, W]. kernels: [B, O, T, I]. y: [B, O, H', W'], any strides."""
    _launch(x, kernels, y, kernels.stride(), size, stride, padding, dilation, back=False)


def gradient_of_input(
    grad: Tensor, kernels: Tensor, grad_x: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Pair
) -> None:
    """``grad_x`` [B, I, H, W] from ``grad`` [B, O, H', W']. In each direction stride or dilation is 1."""
    k_b, k_o, k_t, k_i = kernels.stride()
    _launch(grad, kernels, grad_x, (k_b, k_i, k_t, k_o), size, stride, padding, dilation, back=True)


def gradient_of_kernels(
    grad: Tensor, x: Tensor, kernels: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Pair
) -> None:
    """The gradient of the kernels, written into ``kernels`` [B, O, T, I]."""
    batch, outs, height, width = grad.shape
    ins = x.shape[1]
    tile = tile_of_kernels(height * width, outs, ins, x.dtype)
    grid = (-(-outs // tile.rows) * size[0] * size[1], -(-ins // tile.cols), batch)
    scalars = (*x.shape[2:], ins, outs, height, width, *grad.stride(), *x.stride(), *kernels.stride())
    constants = {**constants_of(size, stride, padding, dilation), **tile.constants}
    launch(_gradient_of_kernels, grid, (grad, x, kernels), scalars, constants, tile.warps, tile.stages)


def _launch(
    x: Tensor,
    kernels: Tensor,
    y: Tensor,
    strides: tuple[int, ...],
    size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    back: bool,
) -> None:
    batch, outs, height, width = y.shape
    ins, phases = x.shape[1], stride if back else (1, 1)
    positions = -(-height // phases[0]) * -(-width // phases[1])
    tile = tile_of_positions(positions, outs, ins, x.dtype)
    grid = (-(-positions // tile.rows) * phases[0] * phases[1], -(-outs // tile.cols), batch)
    scalars = (*x.shape[2:], ins, outs, height, width, *x.stride(), *strides, *y.stride())
    constants = {**constants_of(size, stride, padding, dilation), "BACK": back, **tile.constants}
    launch(_convolve, grid, (x, kernels, y), scalars, constants, tile.warps, tile.stages)


class Tile(NamedTuple):
    """The tile of a matrix product: rows, columns and inner dimension; warps, and stages of the pipeline."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int | str]:
        """By the names that the kernels use."""
        return {"ROWS": self.rows, "COLS": self.cols, "INNER": self.inner, "PRECISION": "tf32"}


def tile_of_positions(positions: int, outs: int, ins: int, dtype: torch.dtype) -> Tile:
    """The tile of positions by channels. Measured on an H100 (benchmarks/NOTES.md): others took up to twice as long."""
    few = positions <= 64
    cols = min(64 if few else 128, max(16, power_of_two(outs)))
    inner = min(64 if dtype.itemsize == 2 else 32, max(16, power_of_two(ins)))
    if cols == 128 and positions > 256 and dtype.itemsize == 2:
        return Tile(128, cols, inner, 8, 3)
    return Tile(64, cols, inner, 4, 4 if few else 3)


def tile_of_kernels(positions: int, outs: int, ins: int, dtype: torch.dtype) -> Tile:
    """The tile of filters by channels. float32 needs a transposition for the tensor cores, which takes one stage."""
    rows, cols = (min(64, max(16, power_of_two(n))) for n in (outs, ins))
    if dtype.itemsize == 4:
        return Tile(rows, cols, 32, 4, 1)
    if outs < 128 or ins < 128:
        return Tile(rows, cols, 64, 4, 3)
    return Tile(128, 64, 32, 4, 3) if positions <= 64 else Tile(128, 128, 64, 8, 3)
