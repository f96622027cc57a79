"""The forms of routers that a backend can fuse into one call. A router describes itself by one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class SigmoidGates(NamedTuple):
    """One output: ``factor * sigmoid(linear(pooled))``, [B, I] -> [B, E]."""

    linear: nn.Module
    factor: float


class Attention(NamedTuple):
    """One output for each head, [B, I] -> [B, width of the head], None where there is no head.

        h = relu(norm(reduce(pooled)))
        2 * sigmoid(head(h) / temperature), of the last head softmax(head(h) / temperature)

    norm: None for no norm; only fused in eval mode. relu: False for no activation.
    """

    reduce: nn.Module
    norm: nn.Module | None
    relu: bool
    heads: Sequence[nn.Module | None]
    temperature: Tensor


class GatedAttention(NamedTuple):
    """An attention whose last head is absent, and in its place the gates, from the pooled input itself."""

    attention: Attention
    gates: SigmoidGates


RouterForm = SigmoidGates | Attention
WholeForm = RouterForm | GatedAttention
"""Of a router whose outputs are a whole mixture."""
