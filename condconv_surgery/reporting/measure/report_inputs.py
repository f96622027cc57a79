"""The input on which a model is counted and timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from condconv_surgery.recipe import InputSpec
from condconv_surgery.runtime.modes import input_spec_of


def arguments_for(model: nn.Module, inputs: Any = None) -> tuple[Any, ...]:
    """The arguments of one forward pass.

    inputs: ``None`` (the model's own ``InputSpec``), an ``InputSpec``, one tensor, a tuple of all arguments, or what a
        detector takes. A picture made here is one, on the meta device, in the dtype of the model.
    """
    if inputs is None:
        inputs = input_spec_of(model)
    if isinstance(inputs, InputSpec):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return (torch.empty(1, inputs.channels, inputs.height, inputs.width, dtype=dtype, device="meta"),)
    return inputs if isinstance(inputs, tuple) else (inputs,)


def one_sample(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first sample of a batch; arguments without a common batch dimension are left as they are."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    batched = all(isinstance(argument, Tensor) for argument in arguments) and all(t.dim() >= 2 for t in tensors)
    if not batched or len({t.shape[0] for t in tensors}) != 1:
        return arguments
    return tuple(t[:1] for t in tensors)


def repeated(arguments: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """One sample's arguments as a batch of ``batch`` equal ones."""
    return tuple(a.expand(batch, *a.shape[1:]).contiguous() if isinstance(a, Tensor) else a for a in arguments)


def materialized(arguments: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """Meta tensors as standard normal noise from a fixed seed, all tensors on ``device``."""
    generator = torch.Generator().manual_seed(0)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_meta:
            leaf = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        return leaf.to(device)

    return tuple(pytree.tree_map(fill, arguments))
