"""The mean over the positions of each map on a GPU, in one pass over images of any layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from condconv_surgery.ops.backends.triton.launch import launch, power_of_two

MAX_POSITIONS = 256
"""Positions that one program sums at most where channels are contiguous, since it waits for each few of them; where
positions do, it takes a whole map."""


@triton.jit(do_not_specialize=["positions", "width", "share"])
def _mean(
    x,
    means,
    channels,
    positions,
    width,
    share,
    scale,
    x_b,
    x_c,
    x_h,
    x_w,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``means[b, part, c]``: the part's share of the sum over all positions, times ``scale``."""
    part = tl.program_id(0)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    b = tl.program_id(2).to(tl.int64)
    last = tl.minimum((part + 1) * share, positions)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(part * share, last, ROWS):
        p = first + tl.arange(0, ROWS)
        at = x + b * x_b + ((p // width) * x_h + (p % width) * x_w)[:, None] + c[None, :] * x_c
        total += tl.load(at, mask=(p < last)[:, None] & (c < channels)[None, :], other=0.0).to(tl.float32)
    to = means + (b * tl.num_programs(0) + part) * channels + c
    tl.store(to, tl.sum(total, 0) * scale, mask=c < channels)


def mean(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C], in float32. Summed in a fixed order, so that the result is deterministic."""
    batch, channels, height, width = x.shape
    positions = height * width
    side_by_side = x.stride(1) == 1 and channels > 1
    cols = min(64, power_of_two(channels)) if side_by_side else 1
    parts = -(-positions // MAX_POSITIONS) if side_by_side else 1
    means = x.new_empty(batch, parts, channels, dtype=torch.float32)
    rows = min(4096 // cols if side_by_side else 1024, power_of_two(positions))
    scalars = (channels, positions, width, -(-positions // parts), 1.0 / positions, *x.stride())
    launch(_mean, (parts, -(-channels // cols), batch), (x, means), scalars, {"ROWS": rows, "COLS": cols})
    return means.squeeze(1) if parts == 1 else means.sum(1)
