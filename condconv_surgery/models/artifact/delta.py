"""What a model has and another one, its base, has not: the tensors of a delta file.

    equal       the base's tensor; every expert equal to it     not stored
    rounded     d = bfloat16(value - base)                      2 bytes an element; value' = base + d
    other       the value                                       as it is

Nothing is rounded unless asked for, and then only weights of the base: routers and norms are small and stay exact. A
bfloat16 has 8 bits, so value' is off by at most 2**-9 of the *difference*, which is small beside the weight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from condconv_surgery.errors import InputError
from condconv_surgery.layers.routed_block import ROUTER
from condconv_surgery.runtime.tensor_hash import hash_tensors

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Base:
    """The other model. name: by which ``load_model`` finds it. tensors: its state dict."""

    name: str
    tensors: Tensors

    @property
    def sha256(self) -> str:
        return hash_tensors(self.tensors)


@dataclass(frozen=True)
class DeltaRecord:
    """How the stored tensors and the base's give the model's.

    equal: names of the base's own tensors. repeated: experts that all equal the base's tensor, with their shape.
    rounded: names whose difference is stored, with the dtype of the model's tensor.
    error: the largest difference between a value of the model and what the file gives.
    """

    base: str
    base_sha256: str
    equal: tuple[str, ...]
    repeated: dict[str, tuple[int, ...]]
    rounded: dict[str, str]
    error: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DeltaRecord:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for any other JSON."""
        return cls(
            str(data["base"]),
            str(data["base_sha256"]),
            tuple(str(name) for name in data["equal"]),
            {str(name): tuple(int(side) for side in shape) for name, shape in data["repeated"].items()},
            {str(name): str(dtype) for name, dtype in data["rounded"].items()},
            float(data["error"]),
        )


@torch.no_grad()
def encode(tensors: Tensors, base: Base, rounded: bool) -> tuple[Tensors, DeltaRecord]:
    """What to store of ``tensors``, and how to read it. rounded: differences of weights in bfloat16.

    Raises ``InputError`` where the file would hold every tensor whole.
    """
    stored: Tensors = {}
    equal: list[str] = []
    repeated: dict[str, tuple[int, ...]] = {}
    differences: dict[str, str] = {}
    error = 0.0
    for name, on_device in tensors.items():
        tensor = on_device.cpu()
        own = _counterpart(base.tensors.get(name), tensor)
        same = own is not None and tensor.dtype == own.dtype and torch.equal(tensor, own.expand_as(tensor))
        if own is None:
            stored[name] = tensor
        elif same and tensor.shape == base.tensors[name].shape:
            equal.append(name)
        elif same:
            repeated[name] = tuple(tensor.shape)
        elif rounded and tensor.is_floating_point() and own.dim() > 1 and ROUTER not in name.split("."):
            stored[name] = (tensor.float() - own.float()).bfloat16()
            differences[name] = str(tensor.dtype).removeprefix("torch.")
            error = max(error, float((_plus(own, stored[name], tensor.dtype) - tensor).abs().max()))
        else:
            stored[name] = tensor
    if not (equal or repeated or differences):
        raise _nothing_shared(tensors, base)
    return stored, DeltaRecord(base.name, base.sha256, tuple(equal), repeated, differences, error)


@torch.no_grad()
def decode(stored: Tensors, record: DeltaRecord, base: Base) -> Tensors:
    """The model's tensors. Raises ``InputError`` for another base than that of ``encode``."""
    if base.sha256 != record.base_sha256:
        raise InputError(
            f"{base.name} has other weights (SHA-256 {base.sha256[:12]}) than the base of the delta file.",
            f"It holds the differences from {record.base} with SHA-256 {record.base_sha256[:12]}.",
            f'base="{record.base}", or the file of those weights',
        )
    tensors = dict(stored)
    tensors |= {name: base.tensors[name] for name in record.equal}
    for name, shape in record.repeated.items():
        tensors[name] = base.tensors[name].reshape(shape[1:]).expand(shape)
    for name, dtype in record.rounded.items():
        own = _counterpart(base.tensors[name], stored[name])
        if own is None:
            raise ValueError(f"{name} does not fit the base")
        tensors[name] = _plus(own, stored[name], getattr(torch, dtype))
    return tensors


def _nothing_shared(tensors: Tensors, base: Base) -> InputError:
    if any(_counterpart(base.tensors.get(name), tensor) is not None for name, tensor in tensors.items()):
        return InputError(
            f"All {len(tensors)} tensors of the model differ from those of {base.name}, as after training them all.",
            "Exact differences take as much space as the tensors themselves; in bfloat16 they take half.",
            'precision="bfloat16", or leave base= out for a whole file',
        )
    return InputError(
        f"{base.name} has none of the model's {len(tensors)} tensors.",
        "The base of a delta file is the model that was converted.",
        "leave base= out for a whole file",
    )


def _counterpart(own: Tensor | None, tensor: Tensor) -> Tensor | None:
    """The base's tensor of the shape of ``tensor`` or of one of its experts ([E, ...]); ``None`` for another shape."""
    if own is None or own.shape == tensor.shape:
        return own
    one = tensor.shape[1:]
    same = tensor.dim() > own.dim() and one.numel() == own.numel() and one[: own.dim()] == own.shape
    return own.reshape(one) if same else None


def _plus(own: Tensor, difference: Tensor, dtype: torch.dtype) -> Tensor:
    return (own.float() + difference.float()).to(dtype)
