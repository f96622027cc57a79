"""Mix the kernels of all samples on a GPU, in the layout that matrix products need, and the gradients of the mixture.

    K[b, r, t, c] = row[b,r] * col[b,c] * spatial[b,t] * sum_e gate[b,e] * experts[e, r, c, t]

for filters r and channels c, or swapped. Both directions are matrix products over experts, samples or elements of a
kernel, each of three TF32 products, together nearly as exact as float32 (bfloat16: ``_product``). One pass over the
experts writes the kernels, in the precision of the activations; one pass over their gradient reads it. Partial sums are
added in a fixed order, so that the result is deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from condconv_surgery.ops.backends.triton.launch import launch, power_of_two
from condconv_surgery.ops.mixture import Mixture

ENOUGH_PROGRAMS = 264
"""Two for each multiprocessor of an H100: with fewer a program takes fewer taps."""


@triton.jit(do_not_specialize=["batch", "rows", "taps_each"])
def _mix(
    experts,
    gate,
    spatial,
    by_col,
    by_row,
    kernels,
    batch,
    rows,
    cols,
    taps,
    numel,
    w_r,
    w_c,
    gate_b,
    spatial_b,
    col_b,
    row_b,
    taps_each,
    EXPERTS: tl.constexpr,
    COUNT: tl.constexpr,
    GATED: tl.constexpr,
    SPATIAL: tl.constexpr,
    BY_COL: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROUND: tl.constexpr,
    SAMPLES: tl.constexpr,
    COLS: tl.constexpr,
):
    """Some taps of one row, for some samples. ROUND: float32 values to the nearest TF32 value, of 10 bits."""
    parts = tl.cdiv(taps, taps_each)
    r = tl.program_id(0) // parts
    first = (tl.program_id(0) % parts) * taps_each
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b = tl.program_id(2) * SAMPLES + tl.arange(0, SAMPLES)
    e = tl.arange(0, COUNT)
    here = (b < batch)[:, None] & (c < cols)[None, :]
    gates = _gates(gate, b, e, batch, gate_b, EXPERTS, GATED)
    if BY_COL:
        col = tl.load(by_col + b[:, None] * col_b + c[None, :], mask=here, other=0.0).to(tl.float32)
    if BY_ROW:
        row = tl.load(by_row + b * row_b + r, mask=b < batch, other=0.0).to(tl.float32)
    at = e[:, None] * numel + c[None, :] * w_c
    to = b[:, None] * numel + c[None, :]
    known = (e < EXPERTS)[:, None] & (c < cols)[None, :]
    for t in range(first, tl.minimum(first + taps_each, taps)):
        weights = tl.load(experts + r * w_r + t + at, mask=known, other=0.0).to(tl.float32)  # [COUNT, COLS]
        kernel = tl.dot(gates, weights, input_precision="tf32x3")
        if BY_COL:
            kernel *= col
        if BY_ROW:
            kernel *= row[:, None]
        if SPATIAL:
            kernel *= tl.load(spatial + b * spatial_b + t, mask=b < batch, other=0.0).to(tl.float32)[:, None]
        if ROUND:
            nearest = ((kernel.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            kernel = tl.where(kernel == kernel, nearest, kernel)  # NaN stays NaN
        tl.store(kernels + (r * taps + t) * cols + to, kernel.to(kernels.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["batch", "rows", "rows_each", "taps_each"])
def _unmix(
    grad,
    experts,
    gate,
    spatial,
    by_col,
    by_row,
    grad_experts,
    to_gate,
    to_spatial,
    to_col,
    to_row,
    batch,
    rows,
    cols,
    taps,
    numel,
    gate_b,
    spatial_b,
    col_b,
    row_b,
    rows_each,
    taps_each,
    EXPERTS: tl.constexpr,
    COUNT: tl.constexpr,
    GATED: tl.constexpr,
    SPATIAL: tl.constexpr,
    BY_COL: tl.constexpr,
    BY_ROW: tl.constexpr,
    ADD: tl.constexpr,
    SAMPLES: tl.constexpr,
    COLS: tl.constexpr,
):
    """Some taps of some rows: the gradient of the experts, and this part's share of those of the mixture."""
    parts = tl.cdiv(taps, taps_each)
    first_row = (tl.program_id(0) // parts) * rows_each
    first_tap = (tl.program_id(0) % parts) * taps_each
    part = tl.program_id(0)
    across = tl.program_id(1)
    c = across * COLS + tl.arange(0, COLS)
    e = tl.arange(0, COUNT)
    known = (e < EXPERTS)[:, None] & (c < cols)[None, :]
    in_experts = e[:, None] * numel + c[None, :] * taps
    for first in range(0, batch, SAMPLES):
        b = first + tl.arange(0, SAMPLES)
        in_grad = b[:, None] * numel + c[None, :]
        here = (b < batch)[:, None] & (c < cols)[None, :]
        gates = _gates(gate, b, e, batch, gate_b, EXPERTS, GATED)
        columns = tl.trans(gates)
        sum_gate = tl.zeros((SAMPLES, COUNT), tl.float32)
        sum_col = tl.zeros((SAMPLES, COLS), tl.float32)
        if BY_COL:
            col = tl.load(by_col + b[:, None] * col_b + c[None, :], mask=here, other=0.0).to(tl.float32)
        for t in range(first_tap, tl.minimum(first_tap + taps_each, taps)):
            sum_tap = tl.zeros((SAMPLES,), tl.float32)
            if SPATIAL:
                of_tap = tl.load(spatial + b * spatial_b + t, mask=b < batch, other=0.0).to(tl.float32)
            for r in range(first_row, tl.minimum(first_row + rows_each, rows)):
                at = r * cols * taps + t
                weights = tl.load(experts + at + in_experts, mask=known, other=0.0).to(tl.float32)  # [COUNT, COLS]
                grads = tl.load(grad + (r * taps + t) * cols + in_grad, mask=here, other=0.0)  # [SAMPLES, COLS]
                grads = grads.to(tl.float32)
                if SPATIAL or BY_COL or BY_ROW:
                    product = grads * _product(gates, weights, grad.dtype.element_ty)
                    if BY_ROW:
                        row = tl.load(by_row + b * row_b + r, mask=b < batch, other=0.0).to(tl.float32)
                        grads *= row[:, None]
                    if SPATIAL:
                        grads *= of_tap[:, None]
                    if BY_COL:
                        alone = product * row[:, None] if BY_ROW else product
                        sum_col += alone * of_tap[:, None] if SPATIAL else alone
                        grads *= col
                        product *= col
                    sums = tl.sum(product, 1)
                    if SPATIAL:
                        sum_tap += sums * row if BY_ROW else sums
                    if BY_ROW:
                        place = ((t * tl.num_programs(1) + across) * batch + b) * rows + r
                        tl.store(to_row + place, sums * of_tap if SPATIAL else sums, mask=b < batch)
                if GATED:
                    sum_gate += tl.trans(_product(weights, tl.trans(grads), grad.dtype.element_ty, SECOND=True))
                total = _product(columns, grads, grad.dtype.element_ty, SECOND=True)  # [COUNT, COLS]
                if ADD or first > 0:
                    total += tl.load(grad_experts + at + in_experts, mask=known, other=0.0)
                tl.store(grad_experts + at + in_experts, total, mask=known)
            if SPATIAL:
                place = (((part // parts) * tl.num_programs(1) + across) * batch + b) * taps
                tl.store(to_spatial + place + t, sum_tap, mask=b < batch)
        tl.debug_barrier()  # the next samples read the sums stored here
        if BY_COL:
            tl.store(to_col + (part * batch + b[:, None]) * cols + c[None, :], sum_col, mask=here)
        if GATED:
            place = ((part * tl.num_programs(1) + across) * batch + b[:, None]) * EXPERTS + e[None, :]
            tl.store(to_gate + place, sum_gate, mask=(b < batch)[:, None] & (e < EXPERTS)[None, :])


@triton.jit
def _gates(gate, b, e, batch, gate_b, EXPERTS: tl.constexpr, GATED: tl.constexpr):
    """[SAMPLES, COUNT]; 1 for the only expert where there is no gate."""
    if GATED:
        mask = (b < batch)[:, None] & (e < EXPERTS)[None, :]
        gates = tl.load(gate + b[:, None] * gate_b + e[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        gates = ((b < batch)[:, None] & (e == 0)[None, :]).to(tl.float32)
    return gates


@triton.jit
def _product(a, b, dtype: tl.constexpr, SECOND: tl.constexpr = False):
    """``a @ b`` of float32 values. dtype: of the gradient of the kernels. Where that is bfloat16 so are the factors:
    ``a`` as a sum of two such values, and ``b`` too unless it comes from the gradient (SECOND), which is rounded once
    more where a scale has touched it. The range of float16 would not do for that."""
    if dtype != tl.bfloat16:
        product = tl.dot(a, b, input_precision="tf32x3")
    else:
        high = a.to(dtype)
        low = (a - high.to(tl.float32)).to(dtype)
        of_b = b.to(dtype)
        product = tl.dot(high, of_b)
        product = tl.dot(low, of_b, product)
        if not SECOND:
            product = tl.dot(high, (b - of_b.to(tl.float32)).to(dtype), product)
    return product


class Blocks(NamedTuple):
    """How the elements of a kernel are shared among programs. samples, cols: at a time; the rest: for each program."""

    samples: int
    cols: int
    rows_each: int
    taps_each: int

    @classmethod
    def of(cls, batch: int, rows: int, cols: int, taps: int, most: int) -> Blocks:
        """Few taps for each where there are few rows; several rows where there are many."""
        wide = min(most if rows > 1 else 32, max(16, power_of_two(cols)))
        programs = rows * -(-cols // wide)
        taps_each = taps if programs >= ENOUGH_PROGRAMS else max(1, taps * programs // ENOUGH_PROGRAMS)
        return cls(16 if batch <= 16 else 32, wide, min(8, max(1, programs // (2 * ENOUGH_PROGRAMS))), taps_each)


def mix(
    experts: Tensor, mixture: Mixture, dtype: torch.dtype, swap: bool = False, tensor_cores: bool = False
) -> Tensor:
    """experts: [E, O, I, kh, kw], contiguous. Returns the kernels [B, O, T, I], or [B, I, T, O], in ``dtype``.

    tensor_cores: float32 is rounded to TF32 here, to the nearest, which they would cut off.
    """
    _, rows, cols, kh, kw = experts.shape
    taps, strides = kh * kw, (cols * kh * kw, kh * kw)
    if swap:
        rows, cols, strides = cols, rows, strides[::-1]
        mixture = mixture._replace(in_scale=mixture.out_scale, out_scale=mixture.in_scale)
    parts = _in_rows(mixture, experts)
    batch = next(part for part in mixture if part is not None).shape[0]
    kernels = experts.new_empty(batch, rows, taps, cols, dtype=dtype)
    blocks = Blocks.of(batch, rows, cols, taps, most=128)
    grid = (rows * -(-taps // blocks.taps_each), -(-cols // blocks.cols), -(-batch // blocks.samples))
    steps = (*strides, *(part.stride(0) for part in parts))
    scalars = (batch, rows, cols, taps, experts[0].numel(), *steps, blocks.taps_each)
    rounded = tensor_cores and dtype == torch.float32
    constants = {**_present(experts, mixture), "ROUND": rounded, "SAMPLES": blocks.samples, "COLS": blocks.cols}
    launch(_mix, grid, (experts, *parts, kernels), scalars, constants)
    return kernels


def unmix(grad: Tensor, experts: Tensor, mixture: Mixture, grad_experts: Tensor, add: bool) -> list[Tensor | None]:
    """The gradients of the parts of ``mixture`` from that of the kernels, ``grad`` [B, O, T, I]; that of the experts is
    put, or added, into ``grad_experts``, which is in float32."""
    count, rows, cols, kh, kw = experts.shape
    batch, taps = grad.shape[0], kh * kw
    blocks = Blocks.of(batch, rows, cols, taps, most=64)
    down, across = -(-rows // blocks.rows_each), -(-cols // blocks.cols)
    parts = down * -(-taps // blocks.taps_each)

    def buffer(part: Tensor | None, *shape: int) -> Tensor:
        return experts.new_empty(shape if part is not None else 0, dtype=torch.float32)

    gate, spatial, by_col, by_row = mixture
    inputs = _in_rows(mixture, experts)
    sums = (
        buffer(gate, parts * across, batch, count),
        buffer(spatial, down * across, batch, taps),
        buffer(by_col, parts, batch, cols),
        buffer(by_row, taps * across, batch, rows),
    )
    steps = (part.stride(0) for part in inputs)
    scalars = (batch, rows, cols, taps, experts[0].numel(), *steps, blocks.rows_each, blocks.taps_each)
    constants = {**_present(experts, mixture), "ADD": add, "SAMPLES": blocks.samples, "COLS": blocks.cols}
    warps = 8 if blocks.cols == 64 and any(part is not None for part in mixture[1:]) else 4
    launch(_unmix, (parts, across, 1), (grad, experts, *inputs, grad_experts, *sums), scalars, constants, warps)
    of_gate, of_spatial, of_col, of_row = map(_total, sums)
    return [of_gate, None if of_spatial is None else of_spatial.view(batch, kh, kw), of_col, of_row]


def _total(parts: Tensor) -> Tensor | None:
    return parts.sum(0) if parts.numel() else None


def _in_rows(mixture: Mixture, like: Tensor) -> list[Tensor]:
    """The parts, with contiguous rows; for one that is None a tensor that is not read."""
    parts = (like if part is None else part for part in mixture)
    return [part if part is like or part[0].is_contiguous() else part.contiguous() for part in parts]


def _present(experts: Tensor, mixture: Mixture) -> dict[str, int | bool]:
    names = ("GATED", "SPATIAL", "BY_COL", "BY_ROW")
    flags = {name: part is not None for name, part in zip(names, mixture, strict=True)}
    return {"EXPERTS": experts.shape[0], "COUNT": max(16, power_of_two(experts.shape[0])), **flags}
