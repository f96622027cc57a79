"""Attribute values of modules as JSON and back: numbers, strings, containers, class names, references to modules."""

from __future__ import annotations

import enum
import functools
import inspect
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact.plain_values import PLAIN_KINDS
from condconv_surgery.models.checkpoints.allowlist import name_of, resolve
from condconv_surgery.runtime.tensor_hash import hash_tensors

MAX_DEPTH = 32
"""Limit of nested containers; more means that one contains itself."""

MAX_ELEMENTS = 4096
"""Limit of the elements of a tensor in JSON: the anchors of a detector. Larger ones stand among the file's tensors."""

STORED = "attribute "
"""Their names there begin so."""


class UndescribableError(InputError):
    """Part of a module cannot be written as JSON, so the module cannot be rebuilt from its file alone."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"The model cannot be described without its code: {what}.")


class ValueWriter:
    """From values to JSON. ``number`` returns what stands for a module, its index in a skeleton; ``stored`` gets large
    tensors."""

    def __init__(self, number: Callable[[nn.Module], int | str], stored: dict[str, Tensor]) -> None:
        self.number = number
        self.stored = stored

    def write(self, value: Any, where: str, depth: int = 0) -> Any:
        """Numbers, strings and lists as they are, all else as an object of one key: ``{kind: content}``.

        where: the name of the value in an error.
        """
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return value
        if depth > MAX_DEPTH:
            raise UndescribableError(f"{where} contains itself")

        def each(values: Any) -> list[Any]:
            return [self.write(item, where, depth + 1) for item in values]

        if type(value) is list:
            return each(value)
        if type(value) in (tuple, torch.Size):
            return {type(value).__name__: each(value)}
        if type(value) in (set, frozenset):
            return {type(value).__name__: sorted(each(value), key=json.dumps)}  # equal sets may differ in order
        if type(value) in (dict, OrderedDict):
            return {type(value).__name__: [each(pair) for pair in value.items()]}
        if type(value) is functools.partial:
            return {"partial": each((value.func, list(value.args), dict(value.keywords)))}
        if isinstance(value, dict) and hasattr(value, "__dict__") and type(value).__module__ not in _HOMES_OF_DICTS:
            state = self.write(dict(value.__dict__), where, depth + 1)
            return {"mapping": [name_in_file(type(value)), each(value.items()), state]}
        if isinstance(value, tuple) and hasattr(type(value), "_fields"):
            return {"namedtuple": [name_in_file(type(value)), each(value)]}
        for kind, plain in PLAIN_KINDS.items():
            if plain.matches(value):
                return {kind: self.write(plain.write(value), where, depth + 1)}
        return self._write_leaf(value, where, depth)

    def _write_leaf(self, value: Any, where: str, depth: int) -> Any:
        if type(value) is float:
            return {"float": repr(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": "cpu"}  # load puts every model there
        if isinstance(value, nn.Module):
            return {"module": self.number(value)}
        if isinstance(value, enum.Enum):
            return {"enum": [name_in_file(type(value)), value.name]}
        if inspect.ismethod(value) and isinstance(value.__self__, nn.Module):
            return {"method": [self.number(value.__self__), value.__name__]}
        if inspect.isclass(value) or inspect.isfunction(value) or inspect.isbuiltin(value):
            return {"name": name_in_file(value, where)}
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta:
            return self._write_tensor(value, where, depth)
        if isinstance(value, (Tensor, *_BUILT_IN)) or not hasattr(value, "__dict__") or not _can_be_empty(type(value)):
            raise UndescribableError(f"{where} is a {type(value).__name__}")
        name = name_in_file(type(value))  # a plain helper object: box coders, matchers
        state = {key: self.write(item, f"{where}.{key}", depth + 1) for key, item in value.__dict__.items()}
        return {"object": [name, state]}

    def _write_tensor(self, value: Tensor, where: str, depth: int) -> Any:
        """Nothing for a result of computation, which a forward pass left behind and the next one makes again."""
        if not value.is_leaf:
            return None
        if isinstance(value, nn.Parameter):
            return {"parameter": [self._write_tensor(value.detach(), where, depth), value.requires_grad]}
        if value.numel() <= MAX_ELEMENTS:
            dtype = str(value.dtype).removeprefix("torch.")
            return {"tensor": [dtype, list(value.shape), self.write(value.flatten().tolist(), where, depth)]}
        name = f"{STORED}{len(self.stored)}"
        self.stored[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"stored": [name, hash_tensors({"": self.stored[name]})]}


class ValueReader:
    """The inverse of ``ValueWriter``. Raises ``ValueError``, ``TypeError`` or ``KeyError`` for any other JSON."""

    def __init__(
        self, modules: list[nn.Module], trust: tuple[str, ...] = (), stored: Mapping[str, Tensor] | None = None
    ) -> None:
        self.modules = modules
        self.trust = trust
        self.stored = stored or {}

    def read(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self.read(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((kind, content),) = data.items()
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](self.read(content))
        if kind in ("dict", "OrderedDict"):
            pairs = [(self.read(key), self.read(value)) for key, value in content]
            return OrderedDict(pairs) if kind == "OrderedDict" else dict(pairs)
        if kind == "partial":
            function, args, keywords = self.read(content)
            return functools.partial(function, *args, **keywords)
        if kind in PLAIN_KINDS:
            return PLAIN_KINDS[kind].read(self.read(content))
        return self._readers()[kind](content)

    def module(self, number: int) -> nn.Module:
        if type(number) is not int or not 0 <= number < len(self.modules):
            raise ValueError(f"module number {number!r}")
        return self.modules[number]

    def dtype(self, name: str) -> torch.dtype:
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} is not a dtype")
        return dtype

    def _readers(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "float": float,
            "dtype": self.dtype,
            "tensor": self._tensor,
            "stored": lambda content: self.stored[content[0]].clone(),
            "parameter": lambda content: nn.Parameter(self.read(content[0]), bool(content[1])),
            "namedtuple": self._namedtuple,
            "mapping": self._mapping,
            "device": torch.device,
            "module": self.module,
            "enum": self._enum,
            "method": self._method,
            "name": lambda name: resolve(name, self.trust),
            "object": self._object,
        }

    def _tensor(self, content: list[Any]) -> Tensor:
        kind, shape, values = content
        return torch.tensor(self.read(values), dtype=self.dtype(kind)).reshape(shape)

    def _namedtuple(self, content: list[Any]) -> Any:
        cls, items = resolve(content[0], self.trust), self.read(content[1])
        if not (isinstance(cls, type) and issubclass(cls, tuple) and len(getattr(cls, "_fields", ())) == len(items)):
            raise TypeError(f"{content[0]} is not a named tuple of {len(items)}")
        return tuple.__new__(cls, items)

    def _mapping(self, content: list[Any]) -> Any:
        """A subclass of dict with attributes, past its own methods: it may be frozen."""
        cls, items, state = resolve(content[0], self.trust), self.read(content[1]), self.read(content[2])
        if not (isinstance(cls, type) and issubclass(cls, dict)) or any(key.startswith("__") for key in state):
            raise TypeError(f"{content[0]} is not a mapping")
        base = OrderedDict if issubclass(cls, OrderedDict) else dict
        instance = base.__new__(cls)
        for key, value in items:
            base.__setitem__(instance, key, value)
        instance.__dict__.update(state)
        return instance

    def _enum(self, content: list[str]) -> enum.Enum:
        cls, member = resolve(content[0], self.trust), content[1]
        if not (isinstance(cls, type) and issubclass(cls, enum.Enum)):
            raise TypeError(f"{content[0]} is not an enumeration")
        return cls[member]

    def _method(self, content: list[Any]) -> Any:
        """A method that the class of a module defines: an allowed class's own code."""
        module, name = self.module(content[0]), content[1]
        function = inspect.getattr_static(type(module), name)
        if name.startswith("__") or not inspect.isfunction(function):
            raise TypeError(f"{name} is not a method")
        return function.__get__(module)

    def _object(self, content: list[Any]) -> Any:
        cls, state = resolve(content[0], self.trust), content[1]
        if not isinstance(cls, type) or issubclass(cls, nn.Module) or any(key.startswith("__") for key in state):
            raise TypeError(f"{content[0]} is not a plain class")
        instance: Any = _new_of(cls)(cls)
        instance.__dict__.update({key: self.read(value) for key, value in state.items()})
        return instance


_HOMES_OF_DICTS = ("builtins", "collections")
"""Their dicts have kinds of their own."""


def _new_of(cls: type) -> Callable[[Any], Any]:
    """Makes an empty object of a plain class; Python lets only ``SimpleNamespace`` make its subclasses' objects."""
    return SimpleNamespace.__new__ if issubclass(cls, SimpleNamespace) else object.__new__


def _can_be_empty(cls: type) -> bool:
    """Whether an object can be made without its constructor: not where a base is of compiled code."""
    try:
        _new_of(cls)(cls)
    except TypeError:
        return False
    return True


_BUILT_IN = (bool, int, float, str, bytes, list, tuple, dict, set, frozenset)
"""The value of a subclass of these is not in its attributes."""

_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Size": torch.Size,
}


def name_in_file(value: Any, where: str = "") -> str:
    """The importable name of a class or function. Raises ``UndescribableError`` when it has none."""
    name = name_of(value)
    if name is None:
        home = f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', value)}"
        raise UndescribableError(f"{f'{where} is ' if where else ''}{home}, which cannot be imported by that name")
    return name
