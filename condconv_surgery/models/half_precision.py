"""Models in half precision: convert in float32, store as the file came."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def to_float32(model: nn.Module) -> dict[str, torch.dtype]:
    """Make the half-precision tensors of ``model`` float32, in place; returns the dtype that each had, by name."""
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model).items() if tensor.dtype in HALVES}
    for name, tensor in _tensors(model).items():
        if name in dtypes:
            tensor.data = tensor.data.float()
    return dtypes


@torch.no_grad()
def to_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """The inverse of ``to_float32``, in place, also after a conversion.

    Of the routers that it added, a layer's takes the dtype of the layer's weight, a block's the most common of all.
    """
    usual = Counter(dtypes.values()).most_common(1)
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        owner, router, _ = name.partition("router.")
        weight = f"{owner}weight" if router else name
        dtype = dtypes.get(weight)
        if dtype is None and usual and router and weight not in tensors:
            dtype = usual[0][0]
        if dtype is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
