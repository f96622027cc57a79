"""Values of the standard library, numpy and torch that a file may describe: each kind with its JSON and back.

Reading one makes the value and calls nothing else, whatever the file says.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import torch

_NUMERIC = "biufc"
"""Kinds of numpy dtypes that hold numbers; not objects, text or dates."""

_TYPES = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, object)
}


@dataclass(frozen=True)
class PlainKind:
    """matches: whether a value is of this kind. write: from it to values that are written in its place; read: back."""

    matches: Callable[[Any], bool]
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _exactly(cls: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is cls


def _numpy_scalar(content: Any) -> Any:
    dtype, item = content
    return _numpy_dtype(dtype).type(item)


def _numpy_array(content: Any) -> Any:
    dtype, tensor = content
    return tensor.numpy().astype(_numpy_dtype(dtype))


def _numpy_dtype(name: str) -> Any:
    numpy = importlib.import_module("numpy")  # installed, where a file holds such values

    dtype = numpy.dtype(name)
    if dtype.kind not in _NUMERIC:
        raise TypeError(f"{name} is not a dtype of numbers")
    return dtype


def _is_numpy(cls: str) -> Callable[[Any], bool]:
    def matches(value: Any) -> bool:
        numpy = sys.modules.get("numpy")
        return numpy is not None and isinstance(value, getattr(numpy, cls)) and value.dtype.kind in _NUMERIC

    return matches


def _memory_format(name: str) -> torch.memory_format:
    value = getattr(torch, name)
    if not isinstance(value, torch.memory_format):
        raise TypeError(f"{name} is not a memory format")
    return value


PLAIN_KINDS: dict[str, PlainKind] = {
    "bytes": PlainKind(_exactly(bytes), bytes.hex, bytes.fromhex),
    "complex": PlainKind(_exactly(complex), lambda v: [v.real, v.imag], lambda c: complex(*c)),
    "range": PlainKind(_exactly(range), lambda v: [v.start, v.stop, v.step], lambda c: range(*c)),
    "slice": PlainKind(_exactly(slice), lambda v: [v.start, v.stop, v.step], lambda c: slice(*c)),
    "Path": PlainKind(lambda v: isinstance(v, PurePath), str, Path),
    "Namespace": PlainKind(_exactly(argparse.Namespace), vars, lambda c: argparse.Namespace(**c)),
    "SimpleNamespace": PlainKind(_exactly(SimpleNamespace), vars, lambda c: SimpleNamespace(**c)),
    "deque": PlainKind(_exactly(deque), lambda v: [list(v), v.maxlen], lambda c: deque(*c)),
    "Counter": PlainKind(_exactly(Counter), dict, Counter),
    "defaultdict": PlainKind(_exactly(defaultdict), lambda v: [v.default_factory, dict(v)], lambda c: defaultdict(*c)),
    "type": PlainKind(lambda v: any(v is kind for kind in _TYPES.values()), lambda v: v.__name__, _TYPES.__getitem__),
    "number": PlainKind(_is_numpy("generic"), lambda v: [v.dtype.str, v.item()], _numpy_scalar),
    "array": PlainKind(_is_numpy("ndarray"), lambda v: [v.dtype.str, torch.from_numpy(v.copy())], _numpy_array),
    "memory_format": PlainKind(
        lambda v: isinstance(v, torch.memory_format), lambda v: str(v).removeprefix("torch."), _memory_format
    ),
    "logger": PlainKind(_exactly(logging.Logger), lambda v: v.name, logging.getLogger),
}
