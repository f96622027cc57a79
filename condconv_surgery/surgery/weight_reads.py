"""Weights that are used outside of the layer that holds them, seen while the model runs.

A parent that computes with ``self.conv.weight`` expects a kernel [O, I/G, kh, kw]; a conditional layer holds experts
[E, O, I/G, kh, kw]. And ``F.conv2d`` on a parameter is a convolution that no module stands for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


@dataclass
class Reads:
    """weights: for each layer (by name) whose weight or bias is used outside of it, the class that does.
    forwards: for each layer whose ``forward`` is called directly, past its hooks, the class that does.
    functional: for each parameter (by name) that ``F.conv2d`` takes outside of all layers, the class that calls it.
    nameless: classes in which a convolution takes a parameter that the model has not.
    """

    weights: dict[str, str] = field(default_factory=dict)
    forwards: dict[str, str] = field(default_factory=dict)
    functional: dict[str, str] = field(default_factory=dict)
    nameless: set[str] = field(default_factory=set)


@contextmanager
def reading(model: nn.Module, layers: Mapping[str, nn.Module], reads: Reads) -> Iterator[None]:
    """Add what passes of ``model`` inside the block read. Reading a dtype, device or shape is no use of a weight."""
    watch = _Watch(model, layers, reads)
    handles = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and holds no layers of Python
            continue
        handles.append(module.register_forward_pre_hook(partial(watch.enter, module), prepend=True))
        handles.append(module.register_forward_hook(partial(watch.leave, module), always_call=True))
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], reads: Reads) -> None:
        super().__init__()
        self._reads = reads
        self._model = model
        self._layers = layers
        self._inside: list[nn.Module] = []
        self._owners: dict[int, list[tuple[str, nn.Module]]] = {}
        self._names: dict[int, str] = {}

    def enter(self, module: nn.Module, _: nn.Module, inputs: Any) -> None:
        if module is self._model:  # its tensors may have been exchanged since the last pass
            self._look_up()
        self._inside.append(module)

    def leave(self, module: nn.Module, _: nn.Module, inputs: Any, output: Any) -> None:
        while self._inside and self._inside.pop() is not module:
            pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside:
            self._note(func, args, kwargs, result)
        return result

    def _look_up(self) -> None:
        self._inside.clear()
        self._names = {id(p): name for name, p in self._model.named_parameters()}
        self._owners = {}
        for name, layer in self._layers.items():
            for parameter in layer.parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append((name, layer))

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func is torch.conv2d:
            self._note_convolution(kwargs.get("weight", args[1] if len(args) > 1 else None))
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if id(leaf) in self._names]
        if not leaves or str(getattr(func, "__name__", "")).startswith("new_") or not _has_tensor(result):
            return
        who = type(self._inside[-1]).__name__
        for leaf in leaves:
            owners = self._owners.get(id(leaf), [])  # several layers where they share the tensor
            for name, layer in owners:
                if layer not in self._inside:
                    found = self._reads.forwards if _runs_forward_of(layer) else self._reads.weights
                    found[name] = who

    def _note_convolution(self, weight: Any) -> None:
        who = type(self._inside[-1]).__name__
        if id(weight) not in self._names:
            if isinstance(weight, nn.Parameter):
                self._reads.nameless.add(who)
        elif id(weight) not in self._owners and not any(layer in self._inside for layer in self._layers.values()):
            self._reads.functional[self._names[id(weight)]] = who


def _runs_forward_of(layer: nn.Module) -> bool:
    """The function being run was called, at some depth, by the ``forward`` of ``layer`` or of what it stands in for."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(owner, nn.Module) and owner._parameters is layer._parameters:
            return True
        frame = frame.f_back
    return False


def _has_tensor(result: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
