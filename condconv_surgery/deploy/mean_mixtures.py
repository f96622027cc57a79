"""The mean mixture of each router over images, and how much its mixtures vary between them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.layers import Router, routers
from condconv_surgery.layers.find_layers import routed_layers, router_hooks
from condconv_surgery.layers.gate_statistics import GateMoments
from condconv_surgery.models.classifier_logits import main_logits
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.runtime.modes import device_of, dtype_of, in_mode

Labelled = tuple[Tensor, Tensor | None]
"""Images [B, C, H, W] and their logits' indices [B], where they are known."""


@dataclass
class _Sums:
    """Of the rows of one router's mixtures, in float64: number, sums and sums of squares; moments of the gates."""

    count: int = 0
    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)
    gates: GateMoments | None = None

    def add(self, mixture: Mixture) -> None:
        rows = {i: part.detach().double().cpu() for i, part in enumerate(mixture) if part is not None}
        if not rows:
            return
        self.count += len(next(iter(rows.values())))
        for i, part in rows.items():
            self.first[i] = self.first.get(i, torch.zeros(())) + part.sum(0)
            self.second[i] = self.second.get(i, torch.zeros(())) + part.square().sum(0)
        if 0 in rows:
            moments = GateMoments.of(rows[0])
            self.gates = moments if self.gates is None else self.gates.with_those_of(moments)

    def mean(self) -> Mixture:
        return Mixture(*((self.first[i] / self.count)[None] if i in self.first else None for i in range(4)))

    def variation(self, experts: Iterable[Tensor]) -> float:
        """To first order, how much kernels differ between images, relative to their mean; of several layers the most.

        The gates count by the kernels that they mix, the scales by themselves: independent parts add as squares.
        """
        squares = 0.0
        for i in range(1, 4):
            if i in self.first:
                mean = self.first[i] / self.count
                variance = (self.second[i] / self.count - mean.square()).clamp_min(0.0)
                squares += float(variance.mean() / mean.square().mean().clamp_min(1e-30))
        if self.gates is not None:
            squares += max(self.gates.kernel_variation(own) for own in experts) ** 2
        return math.sqrt(squares)


@dataclass(frozen=True)
class MeanMixture:
    """mixture: batch 1, in float64 on the CPU. variation: see ``_Sums.variation``. rows: in the mean."""

    mixture: Mixture
    variation: float
    rows: int


def mean_mixtures(model: nn.Module, batches: Iterable[Labelled]) -> dict[str, MeanMixture]:
    """The mean mixture of each router over images, by the name of its layer or block.

    A router that no image reaches (of a head that is used in training only) has the mixture of a zero input.
    """
    sums = {name: _Sums() for name in routers(model)}

    def record(name: str, router: nn.Module, inputs: Any, mixture: Mixture) -> None:
        sums[name].add(mixture)

    with in_mode(model, training=False), torch.no_grad():
        with router_hooks(model, record):
            for images, _ in batches:
                model(images.to(device_of(model), dtype_of(model)))
        layers, found = routed_layers(model), {}
        for name, router in routers(model).items():
            if not sums[name].count:
                found[name] = MeanMixture(mixture_of_zeros(router), 0.0, 0)
            else:
                variation = sums[name].variation(layer.weight for layer in layers[name])
                found[name] = MeanMixture(sums[name].mean(), variation, sums[name].count)
    return found


def top1(
    model: nn.Module,
    batches: Iterable[Labelled],
    frozen: Collection[str] = (),
    means: Mapping[str, MeanMixture] | None = None,
) -> float | None:
    """Top-1 of ``model``, 0 to 1, with the mixtures of the routers in ``frozen`` replaced by their means.

    None when no label is known.
    """

    def replace(name: str, router: nn.Module, inputs: Any, mixture: Mixture) -> Mixture | None:
        if means is None or name not in frozen:
            return None
        return means[name].mixture.for_images_of(mixture)

    correct, count = 0, 0
    with in_mode(model, training=False), torch.no_grad(), router_hooks(model, replace):
        for images, labels in batches:
            if labels is None:
                continue
            output = model(images.to(device_of(model), dtype_of(model)))
            logits = main_logits(output)
            correct += int((logits.argmax(1).cpu() == labels).sum())
            count += len(labels)
    return correct / count if count else None


def mixture_of_zeros(router: Router) -> Mixture:
    """The mixture of one zero input, in float64 on the CPU."""
    width = next(parameter.shape[-1] for parameter in router.parameters() if parameter.dim() == 2)
    example = next(router.parameters())
    mixture: Mixture = router(example.new_zeros(1, width))
    return Mixture(*(None if part is None else part.double().cpu() for part in mixture))
