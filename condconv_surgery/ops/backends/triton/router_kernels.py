"""Routers on a GPU, each in one launch after pooling, as products of small matrices over the samples.

sigmoid gates:  factor * sigmoid(R x + b)
attention:      2 sigmoid((W h + b) / T) for each head, softmax for that of experts, with h = relu(norm(R x + b))
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from condconv_surgery.ops.backends.triton.launch import launch, power_of_two

Linear = tuple[Tensor, Tensor | None]


@triton.jit
def _sigmoid_gates(
    pooled,
    weight,
    bias,
    gates,
    channels,
    factor,
    pooled_b,
    EXPERTS: tl.constexpr,
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The gates of one sample."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, COUNT)
    total = tl.zeros((COUNT, INNER), tl.float32)
    for first in range(0, channels, INNER):
        i = first + tl.arange(0, INNER)
        x = tl.load(pooled + b * pooled_b + i, mask=i < channels, other=0.0).to(tl.float32)
        known = (e < EXPERTS)[:, None] & (i < channels)[None, :]
        total += tl.load(weight + e[:, None] * channels + i[None, :], mask=known, other=0.0).to(tl.float32) * x[None, :]
    z = tl.sum(total, 1)
    if BIAS:
        z += tl.load(bias + e, mask=e < EXPERTS, other=0.0).to(tl.float32)
    tl.store(gates + b * EXPERTS + e, (factor * _sigmoid(z)).to(gates.dtype.element_ty), mask=e < EXPERTS)


@triton.jit(do_not_specialize=["batch", "hidden", "width_0", "width_1", "width_2", "width_3"])
def _attention(
    pooled,
    reduce,
    reduce_bias,
    mean,
    variance,
    scale,
    shift,
    weight_0,
    bias_0,
    weight_1,
    bias_1,
    weight_2,
    bias_2,
    weight_3,
    bias_3,
    temperature,
    outputs,
    batch,
    channels,
    hidden,
    width_0,
    width_1,
    width_2,
    width_3,
    pooled_b,
    eps,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RELU: tl.constexpr,
    SAMPLES: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    COLS: tl.constexpr,
):
    """Some columns of one head for some samples; each program computes the hidden vectors of its samples again."""
    b = tl.program_id(1) * SAMPLES + tl.arange(0, SAMPLES)
    n = tl.arange(0, HIDDEN)
    known = n < hidden
    h = tl.zeros((SAMPLES, HIDDEN), tl.float32)
    for first in range(0, channels, INNER):
        i = first + tl.arange(0, INNER)
        mask = (b < batch)[:, None] & (i < channels)[None, :]
        x = tl.load(pooled + b.to(tl.int64)[:, None] * pooled_b + i[None, :], mask=mask, other=0.0).to(tl.float32)
        mask = (i < channels)[:, None] & known[None, :]
        w = tl.load(reduce + n[None, :] * channels + i[:, None], mask=mask, other=0.0).to(tl.float32)
        h = tl.dot(x, w, h, input_precision="tf32x3")
    if BIAS:
        h += tl.load(reduce_bias + n, mask=known, other=0.0).to(tl.float32)[None, :]
    if NORM:
        centre = tl.load(mean + n, mask=known, other=0.0).to(tl.float32)
        spread = tl.sqrt(tl.load(variance + n, mask=known, other=1.0).to(tl.float32) + eps)
        slope = tl.load(scale + n, mask=known, other=0.0).to(tl.float32) / spread
        offset = tl.load(shift + n, mask=known, other=0.0).to(tl.float32)
        h = (h - centre[None, :]) * slope[None, :] + offset[None, :]
    if RELU:
        h = tl.where(h < 0, 0.0, h)  # NaN stays NaN
    t = tl.load(temperature).to(tl.float32)
    step = width_0 + width_1 + width_2 + width_3
    part = tl.program_id(0)
    before = 0
    parts = tl.cdiv(width_0, COLS)
    if part < parts:
        _head(h, weight_0, bias_0, outputs, b, batch, n, hidden, width_0, part, before, step, t, False, COLS)
    part -= parts
    before += width_0
    parts = tl.cdiv(width_1, COLS)
    if (part >= 0) & (part < parts):
        _head(h, weight_1, bias_1, outputs, b, batch, n, hidden, width_1, part, before, step, t, False, COLS)
    part -= parts
    before += width_1
    parts = tl.cdiv(width_2, COLS)
    if (part >= 0) & (part < parts):
        _head(h, weight_2, bias_2, outputs, b, batch, n, hidden, width_2, part, before, step, t, False, COLS)
    part -= parts
    before += width_2
    if (part >= 0) & (width_3 > 0):
        _head(h, weight_3, bias_3, outputs, b, batch, n, hidden, width_3, part, before, step, t, True, COLS)


@triton.jit
def _head(
    h,
    weight,
    bias,
    outputs,
    b,
    batch,
    n,
    hidden,
    width,
    part,
    before,
    step,
    temperature,
    SOFTMAX: tl.constexpr,
    COLS: tl.constexpr,
):
    """The head's columns from ``part * COLS`` on; of a softmax all of them."""
    c = part * COLS + tl.arange(0, COLS)
    mask = (n < hidden)[:, None] & (c < width)[None, :]
    w = tl.load(weight + c[None, :] * hidden + n[:, None], mask=mask, other=0.0).to(tl.float32)
    z = tl.dot(h, w, input_precision="tf32x3") + tl.load(bias + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
    z /= temperature
    if SOFTMAX:
        z = tl.where((c < width)[None, :], z, -float("inf"))
        z = tl.exp(z - tl.max(z, 1)[:, None])
        value = z / tl.sum(z, 1)[:, None]
    else:
        value = 2 * _sigmoid(z)
    at = b.to(tl.int64)[:, None] * step + (before + c)[None, :]
    tl.store(outputs + at, value.to(outputs.dtype.element_ty), mask=(b < batch)[:, None] & (c < width)[None, :])


@triton.jit
def _sigmoid(z):
    small = tl.exp(-tl.abs(z))
    return tl.where(z < 0, small, 1.0) / (1 + small)


def sigmoid_gates(pooled: Tensor, linear: Linear, factor: float) -> Tensor:
    """``factor * sigmoid(linear(pooled))``: [B, I] -> [B, E], for up to 32 experts."""
    weight, bias = linear
    (batch, channels), count = pooled.shape, weight.shape[0]
    gates = pooled.new_empty(batch, count)
    scalars = (channels, float(factor), pooled.stride(0))
    inner = min(256, max(16, power_of_two(channels)))
    constants = {"EXPERTS": count, "COUNT": power_of_two(count), "BIAS": bias is not None, "INNER": inner}
    launch(_sigmoid_gates, (batch, 1, 1), (pooled, weight, weight if bias is None else bias, gates), scalars, constants)
    return gates


def attention(
    pooled: Tensor,
    reduce: Linear,
    norm: list[Tensor],
    eps: float,
    relu: bool,
    heads: list[tuple[Tensor, Tensor] | None],
    temperature: Tensor,
) -> list[Tensor | None]:
    """The outputs of four heads, [B, I] -> [B, width] or None, the last by a softmax over up to 32 columns.

    norm: mean, variance, weight and bias, or empty.
    """
    weight, bias = reduce
    (batch, channels), hidden = pooled.shape, weight.shape[0]
    widths = [0 if head is None else head[0].shape[0] for head in heads]
    # for absent parts a tensor that is not read
    maps = [part for head in heads for part in (head or (weight, weight))]
    statistics = norm or [weight] * 4
    outputs = pooled.new_empty(batch, sum(widths))
    samples, cols, wide = 16, 64, max(16, power_of_two(hidden))
    grid = (sum(-(-width // cols) for width in widths), -(-batch // samples), 1)
    tensors = (pooled, weight, weight if bias is None else bias, *statistics, *maps, temperature, outputs)
    scalars = (batch, channels, hidden, *widths, pooled.stride(0), float(eps))
    constants = {"BIAS": bias is not None, "NORM": bool(norm), "RELU": relu}
    tiles = {"SAMPLES": samples, "HIDDEN": wide, "INNER": 32, "COLS": cols}
    launch(_attention, grid, tensors, scalars, constants | tiles, stages=3 if wide <= 128 else 2)
    parts = iter(outputs.split_with_sizes([width for width in widths if width], 1))
    return [next(parts) if width else None for width in widths]
