"""Tensors of a file that are no weights in floating point: quantised ones, integers, and those without values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

BYTES = (torch.int8, torch.uint8, *(kind for name, kind in vars(torch).items() if name.startswith("float8_")))
"""What quantised weights are stored in, beside their scales."""


def dense(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """``state`` with sparse tensors as dense ones. Raises ``InputError`` for a quantised one or one without values."""
    for name, tensor in state.items():
        if tensor.is_quantized:
            raise _quantised(name, tensor, what)
        if tensor.is_meta:
            raise InputError(
                f"{what}: {name} is on the meta device: it has no values.",
                "A file holds the values of every tensor.",
                "torch.save(model.state_dict(), 'model.pt') with the weights loaded",
            )
    return {name: tensor if tensor.layout is torch.strided else tensor.to_dense() for name, tensor in state.items()}


def require_floats(state: Mapping[str, Tensor], what: str) -> None:
    """Raise ``InputError`` for weights in bytes."""
    for name, tensor in state.items():
        if tensor.dtype in BYTES and tensor.dim() > 1 and name.endswith("weight"):
            raise _quantised(name, tensor, what)


def require_kinds_of(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raise ``InputError`` where the model has real numbers and the file something else."""
    for name, target in model.state_dict().items():
        tensor = state.get(name, target)
        if target.dtype not in FLOATS or tensor.dtype in FLOATS:
            continue
        if tensor.dtype in BYTES:
            raise _quantised(name, tensor, what)
        raise InputError(
            f"{what}: {name} is {_dtype(tensor)}, where the model has {_dtype(target)}.",
            "Weights are real numbers in floating point; nothing else is rounded or cut to them.",
            "torch.save(model.state_dict(), 'model.pt') with the weights as they were trained",
        )


def _quantised(name: str, tensor: Tensor, what: str) -> InputError:
    return InputError(
        f"{what} holds a quantised network: {name} is {_dtype(tensor)}.",
        "Conversion needs the trained weights in floating point; quantise after training, by condconv export.",
        "torch.save(model.state_dict(), 'model.pt') with the model before it was quantised",
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
