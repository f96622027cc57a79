"""Restore a model after a pass: attributes, containers, tensors and their values, random numbers."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_LEVELS = 3
"""Levels of lists, dicts, sets and plain objects that are followed from a module's attributes."""

_LIBRARIES = {"builtins", "torch", "functools", "threading", "logging", "weakref"}
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"}
_NO_WRITES = {"requires_grad_", "detach_", "share_memory_", "rename_"}


@contextmanager
def preserving_random_state(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch (on the CPU and on the model's GPUs), Python and NumPy after the block."""
    numpy = sys.modules.get("numpy.random")
    python_state, numpy_state = random.getstate(), numpy.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=_gpus(model)):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.set_state(numpy_state)


def random_states() -> tuple[Any, bytes, bytes]:
    """The states of Python, torch on the CPU and NumPy, to be compared."""
    numpy = sys.modules.get("numpy.random")
    numpy_state = repr(numpy.get_state(legacy=False)).encode() if numpy else b""
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), numpy_state


@contextmanager
def preserving_state(model: nn.Module) -> Iterator[ModelState]:
    """Restore the state of ``model`` after the block, whatever its forward does.

    Its attributes, buffers and parameters are the same objects with the same values again, and so are the items of
    lists, dicts, sets and plain objects that attributes hold; a tensor under several names stays one. Random numbers
    start from the same seed in every such block, and go on after it as if it had not been run.
    """
    state = ModelState(model)
    with torch._C.DisableTorchFunction():
        for buffer in model.buffers():
            state.keep(buffer)
    with preserving_random_state(model):
        _seed(model)
        try:
            with _CopyBeforeWrite(state):
                yield state
        finally:
            state.restore()


def held_tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor in attributes of the model's modules, and in the containers and plain objects that they hold."""
    return ModelState(model).tensors


class ModelState:
    """What a model holds: containers with their items, tensors with their memory.

    ``keep`` copies the values of tensors that are about to change: a copy of all weights would be as large as the
    model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self._aliases: list[tuple[Tensor, Tensor]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._by_memory: dict[int, list[Tensor]] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        with torch._C.DisableTorchFunction():  # reading a tensor here is not a use (``surgery.observe.weight_reads``)
            self._follow(model)

    def keep(self, tensor: Tensor) -> None:
        """Copy the values of all tensors of the model that share memory with ``tensor``."""
        for own in self._by_memory.get(_memory(tensor), ()):
            if id(own) not in self._copies:
                self._copies[id(own)] = (own, own.clone())

    def attributes_changed(self) -> bool:
        """Some attribute or item is another object than at first."""
        return any(_differs(container, items) for container, items in self._containers)

    def restore(self) -> None:
        """Put attributes, items, memory and kept values back."""
        for container, items in self._containers:
            if _differs(container, items):
                container.clear()
                container.extend(items) if isinstance(container, (list, deque)) else container.update(items)
        for tensor, alias in self._aliases:
            if _memory(tensor) != _memory(alias) or tensor.shape != alias.shape or tensor.stride() != alias.stride():
                tensor.data = alias
        for own, values in self._copies.values():
            if not torch.equal(own, values):
                with torch.inference_mode(own.is_inference()):
                    own.copy_(values)

    def _follow(self, model: nn.Module) -> None:
        seen: set[int] = set()
        values: list[Any] = list(model.modules())
        for _ in range(_LEVELS):
            held: list[Any] = []
            for value in values:
                if id(value) not in seen:
                    seen.add(id(value))
                    held += self._note(value)
            values = held
        for value in values:
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                self._note(value)

    def _note(self, value: Any) -> Iterable[Any]:
        """Note what ``value`` holds now, and return it."""
        if isinstance(value, Tensor):
            self.tensors.append(value)
            if _memory(value):
                alias = value.detach()
                self._aliases.append((value, alias))
                self._by_memory.setdefault(_memory(value), []).append(alias)
            return ()
        container = value if isinstance(value, (list, dict, set, deque)) else _attributes_of(value)
        if container is None:
            return value if isinstance(value, tuple) else ()
        items = dict(container) if isinstance(container, dict) else list(container)
        self._containers.append((container, items))
        return items.values() if isinstance(items, dict) else items


class _CopyBeforeWrite(TorchFunctionMode):
    """Keeps the values of tensors before a call that may write to them (``p.data.mul_()`` bumps no version counter)."""

    def __init__(self, state: ModelState) -> None:
        super().__init__()
        self._state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _may_write(func) or "out" in kwargs:
            for leaf in pytree.tree_leaves((args[:1], kwargs)):  # a method's own tensor, or a list of them
                if isinstance(leaf, Tensor):
                    self._state.keep(leaf)
        return func(*args, **kwargs)


def _gpus(model: nn.Module) -> list[torch.device]:
    return list({tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda})


def _seed(model: nn.Module) -> None:
    """Seed the generators that ``preserving_random_state`` restores, and no other GPU."""
    torch.default_generator.manual_seed(0)
    for gpu in _gpus(model):
        with torch.cuda.device(gpu):
            torch.cuda.manual_seed(0)
    random.seed(0)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)


def _may_write(func: Any) -> bool:
    name = str(getattr(func, "__name__", ""))
    return name in _WRITES or (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES)


def _memory(tensor: Tensor) -> int:
    """Address of the tensor's storage; 0 for none, or for a tensor subclass."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of a module or of a plain object; ``None`` for classes, functions and torch's own objects."""
    if isinstance(value, type):
        return None
    if not isinstance(value, nn.Module) and type(value).__module__.partition(".")[0] in _LIBRARIES:
        return None
    try:  # past a __getattribute__ of its class
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None


def _differs(container: Any, items: Any) -> bool:
    if len(container) != len(items):
        return True
    if isinstance(container, dict):
        pairs = zip(container.items(), items.items(), strict=True)
        return any(a is not b or value is not other for (a, value), (b, other) in pairs)
    if isinstance(container, set):
        return {id(item) for item in container} != {id(item) for item in items}
    return any(a is not b for a, b in zip(container, items, strict=True))
