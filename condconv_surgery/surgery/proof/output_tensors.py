"""The tensors in whatever a model returns."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_OBJECTS = 3
"""Levels of plain objects, one held by another, whose attributes are followed."""


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors in ``output``, in its own order; NumPy arrays and scalars as tensors.

    Looks into mappings, lists, tuples, what torch's pytree knows, and the attributes of other objects (a dataclass, a
    distribution, boxes with their scores); not into modules, which are not outputs, nor sets, which have no order.
    """
    tensors: list[Tensor] = []
    _collect(output, tensors, set(), _OBJECTS)
    return tensors


def _collect(value: Any, tensors: list[Tensor], parents: set[int], objects: int) -> None:
    """Append the tensors in ``value``. parents: identities of the containers around it, against cycles."""
    tensor = _as_tensor(value)
    if tensor is not None:
        tensors.append(tensor)
        return
    if id(value) in parents:
        return
    items = _items(value)
    if items is None:
        items, objects = _attributes(value), objects - 1
    if objects >= 0:
        parents.add(id(value))
        for item in items:
            _collect(item, tensors, parents, objects)
        parents.remove(id(value))


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return None
    try:
        return torch.from_numpy(numpy.array(value))  # a copy: torch refuses reversed arrays, warns of read-only ones
    except TypeError:  # texts, dates, objects
        return None


def _items(value: Any) -> Iterable[Any] | None:
    """The items of a container; ``None`` for any other object."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, deque)):
        return value
    leaves = pytree.tree_leaves(value)
    return None if len(leaves) == 1 and leaves[0] is value else leaves


def _attributes(value: Any) -> list[Any]:
    if isinstance(value, (type, ModuleType, nn.Module)):
        return []
    slots = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
    return [*(getattr(value, name) for name in slots), *getattr(value, "__dict__", {}).values()]


def _slots(cls: type) -> tuple[str, ...]:
    names = vars(cls).get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))
