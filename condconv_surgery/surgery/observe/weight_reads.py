"""Weights that are used outside of the layer that holds them, recorded while the model runs.

A parent that computes with ``self.conv.weight`` expects a kernel [O, I/G, kh, kw]; a conditional layer holds experts
[E, O, I/G, kh, kw]. And ``F.conv2d`` on a parameter is a convolution without a module to replace.
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
class WeightReads:
    """weights: for each layer (by name) whose weight or bias is used outside of it, the class that uses it.
    forwards: for each layer whose ``forward`` is called directly, past its hooks, the class that calls it.
    elsewhere: layers of which a module outside of the model with the same parameters is called, from a closure say.
    functional: for each parameter (by name) that ``F.conv2d`` takes outside of all layers, the class that calls it.
    nameless: classes in which a convolution takes a parameter that the model does not register.
    """

    weights: dict[str, str] = field(default_factory=dict)
    forwards: dict[str, str] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)
    functional: dict[str, str] = field(default_factory=dict)
    nameless: set[str] = field(default_factory=set)


@contextmanager
def recording_reads(model: nn.Module, layers: Mapping[str, nn.Module], reads: WeightReads) -> Iterator[None]:
    """Add to ``reads`` what passes of ``model`` inside the block use. Reading a dtype, device or shape is no use."""
    recorder = _Recorder(model, layers, reads)
    handles = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and holds no Python layers
            continue
        handles.append(module.register_forward_pre_hook(partial(recorder.enter, module), prepend=True))
        handles.append(module.register_forward_hook(partial(recorder.leave, module), always_call=True))
    try:
        with recorder:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchFunctionMode):
    """Notes every torch function that takes a parameter of ``model`` outside of the layer that owns it."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], reads: WeightReads) -> None:
        super().__init__()
        self._reads = reads
        self._model = model
        self._layers = layers
        self._running: list[nn.Module] = []
        self._parameters_at_first = self._parameters_by_name()
        self._names, self._owners = self._index()

    def enter(self, module: nn.Module, _: nn.Module, inputs: Any) -> None:
        if module is self._model:
            self._running.clear()
            self._names, self._owners = self._index()  # on the meta device the model has other parameters
        self._running.append(module)

    def leave(self, module: nn.Module, _: nn.Module, inputs: Any, output: Any) -> None:
        while self._running and self._running.pop() is not module:
            pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._running:
            self._note(func, args, kwargs, result)
        return result

    def _parameters_by_name(self) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
        layers = self._layers.items()
        own: list[tuple[str, Tensor]] = [(name, p) for name, layer in layers for p in layer.parameters(recurse=False)]
        return list(self._model.named_parameters()), own

    def _index(self) -> tuple[dict[int, str], dict[int, list[tuple[str, nn.Module]]]]:
        """By identity of a parameter: its name, and the layers that own it. Those at first too: a closure uses them."""
        names: dict[int, str] = {}
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for of_model, of_layers in (self._parameters_at_first, self._parameters_by_name()):
            names.update((id(parameter), name) for name, parameter in of_model)
            for name, parameter in of_layers:
                entries = owners.setdefault(id(parameter), [])
                if (name, self._layers[name]) not in entries:
                    entries.append((name, self._layers[name]))
        return names, owners

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func is torch.conv2d:
            self._note_convolution(kwargs.get("weight", args[1] if len(args) > 1 else None))
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if id(leaf) in self._names]
        if not leaves or str(getattr(func, "__name__", "")).startswith("new_"):
            return
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return
        for leaf in leaves:
            for name, layer in self._owners.get(id(leaf), []):  # several layers where they share the tensor
                if layer not in self._running:
                    self._note_use(name, layer, leaf)

    def _note_use(self, name: str, layer: nn.Module, parameter: Tensor) -> None:
        user = type(self._running[-1]).__name__
        callers = _forwards_on_the_stack(type(layer))
        if any(caller._parameters is layer._parameters for caller in callers):
            self._reads.forwards[name] = user
        elif any(own is parameter for caller in callers for own in caller._parameters.values()):
            self._reads.elsewhere.add(name)
        else:
            self._reads.weights[name] = user

    def _note_convolution(self, weight: Any) -> None:
        user = type(self._running[-1]).__name__
        if id(weight) not in self._names:
            if isinstance(weight, nn.Parameter):
                self._reads.nameless.add(user)
        elif id(weight) not in self._owners and not any(layer in self._running for layer in self._layers.values()):
            self._reads.functional[self._names[id(weight)]] = user


def _forwards_on_the_stack(cls: type[nn.Module]) -> list[nn.Module]:
    """Modules of class ``cls`` whose ``forward`` called, at some depth, the function being run."""
    modules = []
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(owner, cls):
            modules.append(owner)
        frame = frame.f_back
    return modules
