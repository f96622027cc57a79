"""The output of a classifier: logits, and for some models in train mode auxiliary logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.runtime.modes import example_arguments, in_mode, without_gradients
from condconv_surgery.runtime.snapshot import preserving_state


class Logits(NamedTuple):
    """``main`` [B, K], and the auxiliary heads' of the same shape (GoogLeNet, Inception v3 in training)."""

    main: Tensor
    auxiliary: tuple[Tensor, ...] = ()


def class_scores(output: object) -> tuple[object, ...]:
    """What the heads of a classifier return, the main one's logits first: a tensor, the items of a tuple, or ``logits``
    of a mapping or an object (``ModelOutput`` of transformers)."""
    if isinstance(output, tuple):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return (output if logits is None else logits,)


def main_logits(output: object) -> Any:
    """The logits of a classifier's main head, [B, K]."""
    return class_scores(output)[0]


def logits_of(output: object) -> Logits:
    """The logits in a model's output: a tensor, a tuple of tensors of which the first one counts, or ``output.logits``
    (``class_scores``). Other tensors of a tuple are auxiliary logits where they have the shape of the first one.

    Where that one holds probabilities, another tensor of which they are the softmax is ``main``, else their logarithms:
    their cross-entropy is that of the logits. Decided on the device, without a synchronisation.
    Raises ``InputError`` for an output that is not that of a classifier.
    """
    first, *others = matrices_of(output)
    return Logits(_as_logits(first, others), tuple(others))


def matrices_of(output: object) -> list[Tensor]:
    """The tensors [B, K] in a model's output, as they are: the first one, and others of its shape. Raises as
    ``logits_of``."""
    tensors = [scores for scores in class_scores(output) if isinstance(scores, Tensor)]
    if not tensors or tensors[0].dim() != 2:
        what = (
            f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        )
        raise InputError(
            f"The model's output is {what}.",
            "A classifier with one label per image returns logits [B, classes]: alone, first in a tuple or as "
            "output.logits.",
            "your own loop with the functions of condconv_surgery.training",
        )
    return [tensor for tensor in tensors if tensor.shape == tensors[0].shape]


def other_tensors(output: object) -> dict[int, Tensor]:
    """The tensors of a tuple that are no logits, such as features, by their index in it."""
    shape = matrices_of(output)[0].shape
    items = enumerate(class_scores(output))
    return {index: item for index, item in items if isinstance(item, Tensor) and item.shape != shape}


def is_classifier(model: nn.Module) -> bool:
    """Whether ``model`` returns logits [B, K] for its own example. Runs it once, and leaves it as it was."""
    with preserving_state(model), in_mode(model, False), without_gradients(model):
        output = model(*example_arguments(model))
    try:
        matrices_of(output)
    except InputError:
        return False
    return True


def are_probabilities(rows: Tensor) -> Tensor:
    """Whether no value of ``rows`` [B, K] is negative and each row sums to 1, as a tensor of one bool."""
    sums = rows.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return (rows >= 0).all() & ((sums - 1).abs() <= _rounding(rows)).all()


def _as_logits(first: Tensor, others: Iterable[Tensor]) -> Tensor:
    wide = torch.promote_types(first.dtype, torch.float32)
    logits = first.to(wide).clamp_min(torch.finfo(wide).tiny).log()
    for other in others:
        if other.shape == first.shape:
            softmax = torch.softmax(other.to(wide), dim=1)
            logits = torch.where(((softmax - first).abs() <= _rounding(first)).all(), other.to(wide), logits)
    return torch.where(are_probabilities(first), logits, first)


def _rounding(rows: Tensor) -> float:
    return 1e-2 if rows.dtype in (torch.float16, torch.bfloat16) else 1e-5
