"""Run a model for its shapes alone: the same modules with tensors on the meta device, no copy, no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

META = torch.device("meta")


@contextmanager
def meta_state(model: nn.Module) -> Iterator[None]:
    """Put every parameter and buffer of ``model`` on the meta device inside the block; tied tensors stay tied.

    (``torch.func.functional_call`` does not restore the tensors of a module that has two names.)
    """
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    on_meta: dict[int, Tensor] = {}

    def meta_tensor(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in on_meta:
            empty = torch.empty_like(tensor, device=META)
            parameter = isinstance(tensor, nn.Parameter)
            on_meta[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        return on_meta[id(tensor)]

    try:
        for module, parameters, buffers in before:
            module._parameters.update({name: meta_tensor(value) for name, value in parameters.items()})  # type: ignore[misc]
            module._buffers.update({name: meta_tensor(value) for name, value in buffers.items()})
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def on_device(nested: Any, device: torch.device) -> Any:
    """Copies of all tensors in nested arguments, on ``device``: a forward may change its input in place."""
    return pytree.tree_map(lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf, nested)
