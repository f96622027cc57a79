"""Put the rows of trained classifier heads in the order of the classes of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from condconv_surgery.data.labelled_images import logit_of_each_class
from condconv_surgery.errors import InputError, listed
from condconv_surgery.layers import ConditionalConv2d

FILTER_HEAD = "router.filter."
"""The head of ODConv's router with one scale for each filter."""


def is_reordered(before: tuple[str, ...], classes: tuple[str, ...]) -> bool:
    """Are these the same classes in another order? Not where two have one name: which is which is unknown then."""
    return before != classes and len({*before}) == len(before) and sorted(before) == sorted(classes)


def reorder_heads(
    model: nn.Module,
    names: Sequence[str],
    before: tuple[str, ...],
    classes: tuple[str, ...],
    logits: Callable[[], Tensor],
) -> None:
    """Permute the heads ``names``, in place, from the classes ``before`` to the same ``classes`` in another order.

    logits: of the model on fixed images, [B, C]; they show that nothing behind the heads depends on the old order.
    Raises ``InputError``, with the model as it was, where a head cannot be reordered.
    """
    order = logit_of_each_class(classes, before)
    assert order is not None
    heads = [model.get_submodule(name) for name in names]
    old = logits()
    if all(_groups(head) == 1 for head in heads):
        _permute(heads, order)
        if torch.allclose(logits(), old[:, order.to(old.device)], rtol=1e-3, atol=1e-3, equal_nan=True):
            return
        _permute(heads, order.argsort())
    raise InputError(
        f"The data have the model's classes in another order, and its head {names[0]} cannot be reordered.",
        f"The model's order is {listed(before)}; layers behind the head, or groups in it, depend on that.",
        "class folders whose names sort in the model's order",
    )


@torch.no_grad()
def _permute(heads: Sequence[nn.Module], order: Tensor) -> None:
    seen: set[int] = set()  # heads may share parameters
    for head in heads:
        for tensor, dim in _rows(head, len(order)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _rows(head: nn.Module, width: int) -> Iterator[tuple[Tensor, int]]:
    """The tensors with one row for each logit, and the dimension of these rows.

    Of a plain layer those of its parametrisations too (weight norm's magnitude and direction). Of a conditional one the
    rows of every expert, and ODConv's scales of the filters.
    """
    if not isinstance(head, ConditionalConv2d):
        tensors = (*head.parameters(), *head.buffers())
        yield from ((tensor, 0) for tensor in tensors if tensor.dim() and len(tensor) == width)
        return
    for name, tensor in head.named_parameters():
        if name in ("weight", "bias"):
            yield tensor, 1  # [E, O, ...]
        elif name in ("ungated_bias", "standardisation.gain") or name.startswith(FILTER_HEAD):
            yield tensor, 0


def _groups(head: nn.Module) -> int:
    return int(getattr(head, "groups", 1))
