"""The forward pass that is counted and timed: its arguments, and running it on the meta device where possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from condconv_surgery.recipe import InputSpec
from condconv_surgery.runtime.meta_device import META, meta_state, on_device
from condconv_surgery.runtime.model_call import Keywords, arguments_of, image_arguments, values_of
from condconv_surgery.runtime.modes import device_of, dtype_of, in_mode, input_spec_of, without_gradients
from condconv_surgery.runtime.snapshot import preserving_state

R = TypeVar("R")


def arguments_for(model: nn.Module, inputs: Any = None) -> tuple[Any, ...]:
    """The arguments of one forward pass.

    inputs: ``None`` (the model's own ``InputSpec``), an ``InputSpec``, one tensor, a tuple of all arguments, a mapping
        of keywords (``arguments_of``), or the argument of a detector. An image created here has batch 1, is on the meta
        device and has the model's dtype.
    """
    if inputs is None:
        inputs = input_spec_of(model)
    if isinstance(inputs, InputSpec):
        size = (1, inputs.channels, inputs.height, inputs.width)
        return image_arguments(model, torch.empty(size, dtype=dtype_of(model), device="meta"))
    return arguments_of(model, inputs)


def one_sample(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first sample of a batch; arguments without a common batch dimension are returned unchanged."""
    values = values_of(arguments)
    batched = all(isinstance(value, Tensor) and value.dim() >= 2 for value in values)
    if not batched or len({value.shape[0] for value in values}) != 1:
        return arguments
    return tuple(pytree.tree_map(lambda tensor: tensor[:1], arguments))


def repeated(arguments: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """Repeat one sample's arguments to a batch of ``batch``."""

    def expand(value: Any) -> Any:
        return value.expand(batch, *value.shape[1:]).contiguous() if isinstance(value, Tensor) else value

    return tuple(
        Keywords(zip(a, map(expand, a.values()), strict=True)) if isinstance(a, Keywords) else expand(a)
        for a in arguments
    )


def run_without_values(model: nn.Module, arguments: tuple[Any, ...], run: Callable[[tuple[Any, ...]], R]) -> R:
    """``run(arguments)`` in eval mode without gradients, on the meta device where the model allows it.

    Where its code needs values, ``run`` gets noise on the model's device. Leaves the model unchanged.
    """
    with in_mode(model, training=False), without_gradients(model):
        try:
            with preserving_state(model), meta_state(model):
                return run(on_device(arguments, META))
        except Exception:  # boxes, topk, .item(): code that needs values
            pass
        with preserving_state(model):
            return run(materialized(arguments, device_of(model)))


def materialized(arguments: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """Replace meta tensors by standard normal noise from a fixed seed, and move all tensors to ``device``."""
    generator = torch.Generator().manual_seed(0)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_meta:
            leaf = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        return leaf.to(device)

    return tuple(pytree.tree_map(fill, arguments))
