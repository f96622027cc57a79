"""How different the experts of each layer are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers


@dataclass(frozen=True)
class Experts:
    """Similarity of the kernels of one layer.

    cosine: mean over pairs of experts; 1 for equal kernels. apart: mean of ``|W_e - mean| / |mean|``.
    moved: mean of ``|W_e - W| / |W|`` from the original weight ``W``; ``None`` if unknown.
    """

    name: str
    experts: int
    cosine: float
    apart: float
    moved: float | None = None


@torch.no_grad()
def measure_experts(model: nn.Module, original: nn.Module | None = None) -> tuple[Experts, ...]:
    """Similarity of the experts of each layer with several. original: the model before conversion.

    Raises ``InputError`` for experts that are not finite, and for an ``original`` without any of the layers.
    """
    plain = dict(original.named_modules()) if original is not None else {}
    rows = []
    for name, layer in conditional_layers(model).items():
        if layer.experts < 2 or layer.weight.is_meta:
            continue
        kernels = layer.float_experts().detach().float().flatten(1)  # [E, |W|]
        weight = getattr(plain.get(name), "weight", None)
        start = weight.detach().float().flatten().to(kernels) if isinstance(weight, Tensor) else None
        moved = _distance(kernels, start) if start is not None and start.numel() == kernels.shape[1] else None
        apart = _distance(kernels, kernels.mean(dim=0))
        cosine = _cosine(kernels)
        if not math.isfinite(cosine):
            raise InputError(
                f"The experts of {name} are not finite.",
                "A report needs finite weights.",
                "an artifact from before training diverged",
            )
        rows.append(Experts(name, layer.experts, cosine, apart, moved))
    if original is not None and rows and all(row.moved is None for row in rows):
        raise InputError(
            f"The original has no layer {rows[0].name} of this shape, nor any other of {len(rows)} converted ones.",
            "It is the model before conversion, with layers of the same names.",
            "another original=, or none",
        )
    return tuple(rows)


def _cosine(kernels: Tensor) -> float:
    products = kernels @ kernels.T  # [E, E]; no second copy of the kernels
    lengths = products.diagonal().clamp_min(1e-24).sqrt()
    count = len(kernels)
    return float(((products / lengths / lengths[:, None]).sum() - count) / (count * (count - 1)))


def _distance(kernels: Tensor, centre: Tensor) -> float:
    distances = torch.stack([(kernel - centre).norm() for kernel in kernels])
    return float(distances.mean() / centre.norm().clamp_min(1e-12))
