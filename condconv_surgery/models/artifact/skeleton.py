"""The modules of a model as JSON, without tensors: for models that no source can rebuild.

A module is described by the name of its class and the values of its attributes. ``rebuild`` looks every name up in
``allowlist``, makes an empty object of the class and sets the attributes: no constructor and nothing else in the file
is called.

Hooks, lambdas, local functions and objects of compiled code cannot be described. A conditional layer is
described as the plain layer that it replaced, a routed block as it was before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.errors import DamagedFileError, InputError, SurgeryError
from condconv_surgery.layers import ConditionalConv2d, RoutedBlock, plain_like
from condconv_surgery.layers.routed_block import ROUTER, plain_class_of
from condconv_surgery.models.artifact.json_values import UndescribableError, ValueReader, ValueWriter, name_in_file
from condconv_surgery.models.artifact.library_marks import MARKS, has_lasting_hooks, register_captures
from condconv_surgery.models.checkpoints.allowlist import resolve
from condconv_surgery.recipe import Recipe

Skeleton = list[dict[str, Any]]

_OWN_KEYS = frozenset((*nn.Module().__dict__, "_compiled_call_impl"))
"""Attributes of any module: dicts of parameters, buffers, children and hooks, the training flag, the compiled call."""

_CACHES_OF_FORWARD = ("corr_pyramid", "attention_bias_cache")
"""Attributes that a forward pass fills: in RAFT of torchvision; in LeViT, TinyViT and EfficientFormer of timm."""

_OF_RECURRENT = ("_flat_weights", "_flat_weight_refs")
"""What ``nn.LSTM`` and its kin derive from their parameters: a list of them, and weak references."""


def describe(model: nn.Module, *, without_hooks: bool = False, stored: dict[str, Tensor] | None = None) -> Skeleton:
    """The modules of ``model``, its root first; a shared module is described once and referred to by number.

    without_hooks: leave out hooks instead of raising for them. stored: gets the large tensors of plain attributes.

    Raises ``UndescribableError`` (an ``InputError``) with the first module and attribute that cannot be described.
    """
    modules: list[nn.Module] = []
    numbers: dict[int, int] = {}

    def number(module: nn.Module) -> int:
        if id(module) not in numbers:
            if not without_hooks and has_lasting_hooks(module):
                raise UndescribableError(f"a {type(module).__name__} has hooks")
            numbers[id(module)] = len(modules)
            modules.append(plain_like(module) if isinstance(module, ConditionalConv2d) else module)
        return numbers[id(module)]

    number(model)
    tensors: dict[int, int] = {}
    writer = ValueWriter(number, {} if stored is None else stored)
    rows: Skeleton = []
    while len(rows) < len(modules):  # describing a module adds its children to the list
        rows.append(_row(modules[len(rows)], writer, tensors))
    return rows


def rebuild(
    rows: Skeleton,
    trust: tuple[str, ...] = (),
    max_elements: int | None = None,
    stored: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The model that ``describe`` described, with zeros in its parameters and buffers.

    max_elements: of all tensors together, as many as the file holds; a skeleton with more would only take memory.
    stored: the large tensors of plain attributes.

    Raises ``InputError`` for a class that is not allowed and ``DamagedFileError`` for anything that ``describe`` does
    not write.
    """
    try:
        _check_size(rows, max_elements)
        modules = [_empty(row["class"], trust) for row in rows]
        tensors: dict[int, Tensor] = {}
        for module, row in zip(modules, rows, strict=True):
            _set(module, row, ValueReader(modules, trust, stored), tensors)
        return modules[0]
    except SurgeryError:
        raise
    except Exception as error:  # JSON that describe did not write fails in many ways
        raise DamagedFileError(
            f"The skeleton of the model cannot be read: {type(error).__name__}: {error}.",
            "A skeleton is the JSON that save writes.",
            "convert the original model again",
        ) from error


def transient_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the state dict (masks, tables made by a constructor), by their full names."""
    return {
        f"{prefix}.{name}" if prefix else name: module._buffers[name]
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if isinstance(module._buffers.get(name), Tensor) and not isinstance(module, ConditionalConv2d)
    }


def plain_state(module: nn.Module) -> dict[str, Any]:
    """The attributes of ``module`` that are no part of ``nn.Module``, without caches and marks."""
    return {
        key: _without_cache(module, key, value)
        for key, value in module.__dict__.items()
        if key not in (*_OWN_KEYS, *MARKS) and not isinstance(value, Recipe)
        if not (isinstance(module, nn.RNNBase) and key in _OF_RECURRENT)
    }


def _row(module: nn.Module, writer: ValueWriter, tensors: dict[int, int]) -> dict[str, Any]:
    def slot(tensor: Tensor | None) -> list[Any] | None:
        if tensor is None:
            return None
        number = tensors.setdefault(id(tensor), len(tensors))
        return [number, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]

    own = {ROUTER} if isinstance(module, RoutedBlock) else set()
    return {
        "class": name_in_file(plain_class_of(module)),
        "state": {
            key: writer.write(value, f"{type(module).__name__}.{key}") for key, value in plain_state(module).items()
        },
        "parameters": {name: slot(value) for name, value in module._parameters.items()},
        "buffers": {name: slot(value) for name, value in module._buffers.items()},
        "transient": sorted(module._non_persistent_buffers_set),
        "children": {
            name: None if child is None else writer.number(child)
            for name, child in module._modules.items()
            if name not in own
        },
    }


def _without_cache(module: nn.Module, key: str, value: Any) -> Any:
    """An attribute's value; an empty list or dict for a cache that the next forward pass fills again."""
    known = type(module).__module__.startswith(("torchvision.", "timm."))
    return type(value)() if known and key in _CACHES_OF_FORWARD and isinstance(value, (list, dict)) else value


def _check_size(rows: Skeleton, max_elements: int | None) -> None:
    sizes: dict[int, int] = {}
    for row in rows:
        for entry in (*row["parameters"].values(), *row["buffers"].values()):
            if entry is not None:
                number, shape, _ = entry
                if any(type(side) is not int or side < 0 for side in shape):
                    raise ValueError(f"a tensor of shape {shape}")
                sizes[number] = torch.Size(shape).numel()
    if max_elements is not None and sum(sizes.values()) > max_elements:
        raise ValueError(f"its tensors have {sum(sizes.values())} elements, the file {max_elements}")


def _empty(name: str, trust: tuple[str, ...]) -> nn.Module:
    cls = resolve(name, trust)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InputError(f"The skeleton names {name}, which is not a module.", "Only modules can be in a module tree.")
    module: nn.Module = cls.__new__(cls)
    nn.Module.__init__(module)
    register_captures(module)
    return module


def _set(
    module: nn.Module,
    row: dict[str, Any],
    reader: ValueReader,
    tensors: dict[int, Tensor],
) -> None:
    def tensor(entry: list[Any] | None, parameter: bool) -> Any:
        if entry is None:
            return None
        number, shape, kind = entry
        if number not in tensors:
            empty = torch.zeros(shape, dtype=reader.dtype(kind))
            tensors[number] = nn.Parameter(empty, empty.is_floating_point()) if parameter else empty
        return tensors[number]

    for key, value in row["state"].items():
        if key in _OWN_KEYS or key.startswith("__"):
            raise ValueError(f"an attribute called {key!r}")
        module.__dict__[key] = reader.read(value)
    module._parameters.update({name: tensor(entry, True) for name, entry in row["parameters"].items()})
    module._buffers.update({name: tensor(entry, False) for name, entry in row["buffers"].items()})
    module._non_persistent_buffers_set.update(set(row["transient"]) & set(module._buffers))
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
    for name, number in row["children"].items():
        module._modules[name] = None if number is None else reader.module(number)
