"""The sets of weights in a training checkpoint, and the one that is taken: an average of the weights before others.

{"model": {...}, "ema": {"shadow": {...}, "decay": 0.999}}      the sets model and ema.shadow, an average
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.models.checkpoints.state_names import is_average_of, is_averaged

AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema", "teacher")
"""Keys under which training scripts store averaged weights (DINO's teacher averages the student's), the first first."""

NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "weights", "params", "module", "student")
"""Keys under which training scripts store weights; the first that holds some is taken."""

NO_WEIGHTS = re.compile(r"optim|^opt$|sched|scaler|rng|grad", re.IGNORECASE)
"""Keys of other parts of a training state."""

PARAMETER_LIST = "shadow_params"
"""The key under which torch_ema and diffusers keep averaged parameters, in their order, without names."""

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of tensors that are no parameters."""

MAX_DEPTH = 4
"""Limit of nested containers."""

SMALLEST = 10
"""A set with less than one tensor in so many of the largest set's is no network."""

Key: TypeAlias = str | int
Weights: TypeAlias = dict[str, Tensor] | nn.Module

_LOG = logging.getLogger("condconv_surgery")


@dataclass(frozen=True)
class WeightSet:
    """path: the keys under which the weights stand."""

    path: tuple[Key, ...]
    weights: Weights
    averaged: bool

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))

    @property
    def rank(self) -> tuple[int, ...]:
        """The smallest is taken."""
        order: tuple[Key, ...] = AVERAGED if self.averaged else NESTS
        return tuple(order.index(key) if key in order else len(order) for key in self.path)

    @property
    def is_expected(self) -> bool:
        """All keys are such under which weights are expected."""
        return all(key in NESTS or key in AVERAGED for key in self.path)

    def is_small(self, largest: int) -> bool:
        """Too few tensors for a network. A module is not asked, before it was checked."""
        return isinstance(self.weights, dict) and len(self.weights) * SMALLEST < largest


def find_weights(content: Any, path: Path) -> Weights:
    """The weights in what a file holds; a log line names the set taken, and the others where there are several.

    Raises ``InputError`` where there are none, or several of which none has an expected key.
    """
    sets = weight_sets(content)
    averaged, plain = [one for one in sets if one.averaged], [one for one in sets if not one.averaged]
    candidates = sorted(averaged or plain, key=lambda one: one.rank)
    if not candidates or (len(candidates) > 1 and not candidates[0].is_expected):
        raise _undecided(content, sets, path)
    taken = candidates[0]
    if taken.path:
        others = ", ".join(one.name for one in sets if one is not taken)
        kind, instead = " (averaged)" if taken.averaged else "", f", not those under {others}" if others else ""
        _LOG.warning("%s: took the weights under %r%s%s", path, taken.name, kind, instead)
    return _with_rest(taken, plain, path) if taken.averaged else _with_averaged_list(taken, content, path)


def weight_sets(content: Any) -> list[WeightSet]:
    """All sets of weights in what a file holds, without those that are too small for a network beside the largest."""
    sets = list(_sets_in(content, (), set()))
    largest = max((len(one.weights) for one in sets if isinstance(one.weights, dict)), default=0)
    sets = [one for one in sets if not one.is_small(largest)]
    sets = [_as_plain(one) if _is_other_network(one, sets) else one for one in sets]
    if any(_is_of_mmengine(one) for one in sets):  # whose file has the average in the place of the weights, for users
        sets = [WeightSet(one.path, one.weights, one.path == ("state_dict",)) for one in sets]
    return sets


def _sets_in(content: Any, path: tuple[Key, ...], seen: set[int]) -> Iterator[WeightSet]:
    averaged = any(key in AVERAGED or is_averaged(f"{key}") for key in path)
    if isinstance(content, nn.Module):
        yield WeightSet(path, content, averaged)
    if not isinstance(content, (dict, list, tuple)) or len(path) > MAX_DEPTH or id(content) in seen:
        return
    seen.add(id(content))  # a pickled dict may contain itself
    items = dict(content if isinstance(content, dict) else enumerate(content))
    tensors = {f"{key}": tensor for key, value in items.items() if (tensor := _as_tensor(value)) is not None}
    mostly = len(tensors) > len(items) / 2
    if len(tensors) < len(items):
        inside = [one for key in _keys_inside(items, mostly) for one in _sets_in(items[key], (*path, key), seen)]
        if inside:
            yield from inside
            return
    if mostly and isinstance(content, dict) and (not path or any(tensor.dim() > 1 for tensor in tensors.values())):
        yield WeightSet(path, tensors, averaged)


def _keys_inside(items: dict[Any, Any], mostly_tensors: bool) -> Iterator[Key]:
    """Keys under which to look for weights; among tensors (a module's extra state) only expected ones."""
    for key in items:
        expected = key in NESTS or key in AVERAGED
        if expected or (isinstance(key, (str, int)) and not mostly_tensors and not NO_WEIGHTS.search(f"{key}")):
            yield key


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value.copy())
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor) and value[0].is_quantized:
        return value[0]  # a layer's weight and bias, packed by torch.ao
    return value if isinstance(value, Tensor) else None


def _is_other_network(one: WeightSet, sets: Sequence[WeightSet]) -> bool:
    """Whether it is the teacher of a distillation, which is no average of the student beside it."""
    students = [other.weights for other in sets if other.path == (*one.path[:-1], "student")]
    if one.path[-1:] != ("teacher",) or not students or not isinstance(one.weights, dict):
        return False
    return isinstance(students[0], dict) and not is_average_of(one.weights, students[0])


def _as_plain(one: WeightSet) -> WeightSet:
    return WeightSet(one.path, one.weights, averaged=False)


def _is_of_mmengine(one: WeightSet) -> bool:
    return one.path == ("ema_state_dict",) and isinstance(one.weights, dict) and "steps" in one.weights


def _with_rest(taken: WeightSet, plain: Sequence[WeightSet], path: Path) -> Weights:
    """An average of the parameters alone, with the buffers of the set that it averages."""
    if not isinstance(taken.weights, dict):
        return taken.weights
    own = _without_wrapper(taken.weights)
    for one in plain:
        whole = _without_wrapper(one.weights) if isinstance(one.weights, dict) else {}
        if own.keys() < whole.keys():
            _LOG.warning(
                "%s: %d tensors beside the averaged ones are those under %r", path, len(whole) - len(own), one.name
            )
            return {**whole, **own}
    return taken.weights


def _without_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _with_averaged_list(taken: WeightSet, content: Any, path: Path) -> Weights:
    """The weights with the averaged parameters of a list beside them, which has their order but not their names."""
    found = _averaged_list(content)
    if found is None or not isinstance(taken.weights, dict):
        return taken.weights
    name, averaged = found
    names = [name for name in taken.weights if not name.endswith(BUFFERS)]
    if [taken.weights[name].shape for name in names] != [tensor.shape for tensor in averaged]:
        _LOG.warning("%s: the averaged parameters under %r have no names and were not taken", path, name)
        return taken.weights
    _LOG.warning("%s: took the averaged parameters under %r in their place", path, name)
    return {**taken.weights, **dict(zip(names, averaged, strict=True))}


def _averaged_list(content: Any) -> tuple[str, list[Tensor]] | None:
    for key, value in {"": content, **(content if isinstance(content, dict) else {})}.items():
        listed = value.get(PARAMETER_LIST) if isinstance(value, dict) else None
        if isinstance(listed, (list, tuple)) and listed and all(isinstance(one, Tensor) for one in listed):
            return f"{key}.{PARAMETER_LIST}".lstrip("."), list(listed)
    return None


def _undecided(content: Any, sets: Sequence[WeightSet], path: Path) -> InputError:
    fix = "model.state_dict()"
    if sets:
        keys, module = "".join(f"[{key!r}]" for key in sets[0].path), isinstance(sets[0].weights, nn.Module)
        fix = f"torch.load('{path}', weights_only={not module}){keys}{'.state_dict()' if module else ''}"
    return InputError(
        f"{path} holds {'several sets of weights' if sets else 'no weights'}: {_described(content, sets)}.",
        f"They must be the whole file, the only ones, or under one of: {', '.join((*AVERAGED, *NESTS))}.",
        f"torch.save({fix}, 'model.pt')",
    )


def _described(content: Any, sets: Sequence[WeightSet]) -> str:
    if sets:
        return ", ".join(one.name for one in sets)
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"keys {', '.join(map(str, list(content)[:6]))}" if content else "an empty dict"
