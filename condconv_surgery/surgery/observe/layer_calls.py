"""One forward pass with hooks: which layers are called, in which order, how often, with which shapes.

The pass runs on the meta device where it can: the model's own code, no memory, no arithmetic. A model with hooks of
its user runs on real tensors: a hook may print, keep or change what it sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from condconv_surgery.runtime.meta_device import META, meta_state, on_device
from condconv_surgery.runtime.model_call import call
from condconv_surgery.runtime.modes import device_of, has_foreign_hooks, in_mode, without_gradients
from condconv_surgery.runtime.snapshot import preserving_state


@dataclass
class Calls:
    """The calls of one module: the shape of the first input of each call.

    order: place of its first call among the first calls of all modules.
    elsewhere: the module of which this one is a clone was called instead (``clone_and_run``).
    head: a convolution that gives the logits (``_is_head``).
    """

    order: int
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    elsewhere: bool = False
    head: bool = False


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], arguments: tuple[Any, ...], training: bool
) -> dict[str, Calls]:
    """The calls of ``layers`` (by name) in one forward pass of ``model``; those never called are absent.

    The model is as before afterwards. Raises what its forward raises.
    """
    with in_mode(model, training), without_gradients(model):
        # Data-dependent code (boxes, topk, .item()) and tensors outside the state dict cannot run on meta.
        if not has_foreign_hooks(model):
            with suppress(Exception), preserving_state(model), meta_state(model), recording(layers) as calls:
                return _with_head(calls, layers, call(model, on_device(arguments, META)))
        with preserving_state(model), recording(layers) as calls:
            return _with_head(calls, layers, call(model, on_device(arguments, device_of(model))))


@contextmanager
def recording(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Calls]]:
    """The calls of ``layers`` (by name) within the block."""
    calls: dict[str, Calls] = {}

    def hook(name: str, layer: nn.Module) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = calls.setdefault(name, Calls(order=len(calls)))
            call.elsewhere |= module is not layer
            tensor = first_input(module, args, kwargs)
            if isinstance(tensor, Tensor):
                call.inputs.append(tuple(tensor.shape))

        return record

    handles = [layer.register_forward_hook(hook(name, layer), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _with_head(calls: dict[str, Calls], layers: Mapping[str, nn.Module], output: Any) -> dict[str, Calls]:
    """``calls``; the last layer is marked where it is a convolutional head."""
    last = max(calls, key=lambda name: calls[name].order, default=None)
    if last is not None:
        calls[last].head = _is_head(layers[last], output)
    return calls


def _is_head(layer: nn.Module, output: Any) -> bool:
    """Is the layer, the last of a forward pass, a 1x1 convolution to the logits [B, K], as in SqueezeNet?

    It has a bias: one without is followed by a norm, and its channels are features.
    """
    first = output[0] if isinstance(output, tuple) and output else getattr(output, "logits", output)
    return (
        isinstance(layer, nn.Conv2d)
        and set(layer.kernel_size) == {1}
        and layer.bias is not None
        and layer.groups == 1
        and isinstance(first, Tensor)
        and first.dim() == 2
        and first.shape[1] == layer.out_channels
    )


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of the module's forward, by position or by keyword; ``None`` when it has none."""
    if args:
        return args[0]
    return next((kwargs[name] for name in inspect.signature(module.forward).parameters if name in kwargs), None)
