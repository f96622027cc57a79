"""The output of a classifier: logits, and for some models in train mode auxiliary logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from condconv_surgery.errors import InputError


class Logits(NamedTuple):
    """``main`` [B, K], and the auxiliary heads' of the same shape (GoogLeNet, Inception v3 in training)."""

    main: Tensor
    auxiliary: tuple[Tensor, ...] = ()


def logits_of(output: object) -> Logits:
    """The logits in a model's output. Raises ``InputError`` for an output that is not that of a classifier."""
    tensors: tuple[object, ...] = tuple(output) if isinstance(output, tuple) else (output,)
    logits = [t for t in tensors if isinstance(t, Tensor)]
    if not logits or any(t.dim() != 2 for t in logits):
        what = (
            f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        )
        raise InputError(
            f"The model's output is {what}.",
            "finetune trains classifiers with one label per image: logits [B, classes].",
            "your own loop with the functions of condconv_surgery.training",
        )
    return Logits(logits[0], tuple(logits[1:]))
