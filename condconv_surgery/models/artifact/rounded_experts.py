"""The experts of a model in bfloat16 or int8; every other tensor of a file stays as it is.

    bfloat16    2 bytes a value, off by at most 2**-8 of the value
    int8        w' = scale[e,o] * q,  q = round(w / scale[e,o]),  scale[e,o] = max |w[e,o]| / 127
                1 byte a value and 4 a filter, off by at most scale / 2

Reading gives float tensors of the dtype that was written, which can be trained. ``deploy.round_experts`` holds them
rounded in memory too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from condconv_surgery.errors import InputError

Tensors = dict[str, Tensor]

LARGEST = 127
SCALE = ".scale"
"""Behind the name of experts in int8: the name of their scales [E, O], float32."""


@dataclass(frozen=True)
class RoundedExperts:
    """What was rounded. precision: ``"bfloat16"`` or ``"int8"``. dtypes: of the model's experts, by their names.

    error: the largest difference between a weight of the model and what the file gives.
    """

    precision: str
    dtypes: dict[str, str]
    error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RoundedExperts:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for any other JSON."""
        dtypes = {str(name): str(dtype) for name, dtype in data["dtypes"].items()}
        return cls(str(data["precision"]), dtypes, float(data["error"]))


@torch.no_grad()
def rounded_tensors(tensors: Tensors, names: Collection[str], precision: str) -> tuple[Tensors, RoundedExperts]:
    """``tensors`` with those of ``names``, experts [E, O, I/G, kh, kw], rounded; and how to read them.

    Raises ``InputError`` where no experts would get smaller, or int8 cannot hold them.
    """
    size = 1 if precision == "int8" else 2
    experts = {name: tensors[name].cpu() for name in names if name in tensors and tensors[name].element_size() > size}
    if not experts:
        raise InputError(
            f'precision="{precision}": no experts would get smaller.',
            "It rounds the experts of conditional layers, and nothing else.",
            'precision="exact"',
        )
    stored, error = dict(tensors), 0.0
    for name, weight in experts.items():
        rounded = _to_int8(name, weight) if precision == "int8" else {name: weight.bfloat16()}
        stored |= rounded
        error = max(error, float((_restored(rounded, name, weight.dtype) - weight).abs().max()))
    dtypes = {name: str(weight.dtype).removeprefix("torch.") for name, weight in experts.items()}
    return stored, RoundedExperts(precision, dtypes, error)


@torch.no_grad()
def restore_experts(stored: Tensors, record: RoundedExperts) -> Tensors:
    """The tensors of the model. Raises ``AttributeError``, ``KeyError``, ``RuntimeError`` or ``TypeError`` for a record
    that does not fit."""
    experts = {name: _restored(stored, name, getattr(torch, dtype)) for name, dtype in record.dtypes.items()}
    scales = {f"{name}{SCALE}" for name in record.dtypes}
    return {name: experts.get(name, tensor) for name, tensor in stored.items() if name not in scales}


def _to_int8(name: str, weight: Tensor) -> Tensors:
    """The experts as integers, and a scale for each filter of each expert."""
    if not weight.isfinite().all():
        raise InputError(
            f"{name} has values that are NaN or infinite.", "int8 holds finite weights.", 'precision="exact"'
        )
    scale = weight.float().flatten(2).abs().amax(2) / LARGEST  # [E, O]
    steps = torch.where(scale > 0, scale, 1.0).double()[:, :, None, None, None]
    return {name: (weight / steps).round().clamp(-LARGEST, LARGEST).to(torch.int8), f"{name}{SCALE}": scale}


def _restored(stored: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    own = stored[name]
    if own.dtype != torch.int8:
        return own.to(dtype)
    return (own.float() * stored[f"{name}{SCALE}"][:, :, None, None, None]).to(dtype)
