"""Have the experts become different kernels?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.layers import conditional_layers


@dataclass(frozen=True)
class Experts:
    """The kernels of one layer.

    cosine: mean over pairs of experts; 1 for equal kernels. apart: mean of ``|W_e - mean| / |mean|``.
    moved: mean of ``|W_e - W| / |W|`` from the original weight ``W``; ``None`` when it is not known.
    """

    name: str
    experts: int
    cosine: float
    apart: float
    moved: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_experts(model: nn.Module, original: nn.Module | None = None) -> tuple[Experts, ...]:
    """Similarity of experts of each layer that has several. original: the model before conversion, if at hand."""
    plain = dict(original.named_modules()) if original is not None else {}
    found = []
    for name, layer in conditional_layers(model).items():
        if layer.experts < 2:
            continue
        kernels = layer.weight.detach().float().flatten(1)  # [E, |W|]
        weight = getattr(plain.get(name), "weight", None)
        start = weight.detach().float().flatten().to(kernels) if isinstance(weight, Tensor) else None
        moved = _distance(kernels, start) if start is not None and start.numel() == kernels.shape[1] else None
        found.append(Experts(name, layer.experts, _cosine(kernels), _distance(kernels, kernels.mean(dim=0)), moved))
    return tuple(found)


def _cosine(kernels: Tensor) -> float:
    unit = F.normalize(kernels, dim=1)
    count = len(kernels)
    return float(((unit @ unit.T).sum() - count) / (count * (count - 1)))


def _distance(kernels: Tensor, centre: Tensor) -> float:
    return float((kernels - centre).norm(dim=1).mean() / centre.norm().clamp_min(1e-12))
