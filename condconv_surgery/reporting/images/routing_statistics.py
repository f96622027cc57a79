"""Statistics of the gates of one layer over labelled images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from condconv_surgery.layers import gate_statistics
from condconv_surgery.layers.gate_statistics import CONSTANT_KERNEL

DEAD = 0.1
"""An expert is dead when no image gives it more than this fraction of an equal share, 1/E."""

SATURATED = 0.9
"""An expert is saturated when it has more than this share on more than this fraction of the images."""

TOP_IMAGES = 4

QUANTILES = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)


@dataclass(frozen=True)
class LayerRouting:
    """Statistics of the gates ``g`` [N, E] of one layer over N images of C classes. shares = g / sum_e g. Nats.

    mean: mean gate of each expert, [E]. by_class: the same for each class, [C][E].
    quantiles: for each expert the gate's 5th, 50th and 95th percentile over images, [E][3].
    entropy: mean over images of H(shares). used: exp H(mean share), the effective number of experts, 1 to E.
    per_image: exp(entropy), the effective number of experts of one image.
    variation: mean distance of an image's gates from the mean, half of sum |g - mean|, 0 (static) to 1.
    kernels: how much the mixed kernels differ between images (``gate_statistics.GateMoments``), the largest of the
        layers of a block; ``None`` where the kernels are unknown.
    information: mutual information of expert and class, H(mean share) minus its mean within classes.
    between: share of the gates' variance that lies between classes, 0 to 1; the rest is within them.
    dead, saturated: indices of experts. top: for each expert, indices of the images that give it the largest shares.
    """

    name: str
    experts: int
    mean: tuple[float, ...]
    by_class: tuple[tuple[float, ...], ...]
    quantiles: tuple[tuple[float, ...], ...]
    entropy: float
    used: float
    per_image: float
    variation: float
    kernels: float | None
    information: float
    between: float
    dead: tuple[int, ...]
    saturated: tuple[int, ...]
    top: tuple[tuple[int, ...], ...]

    @property
    def verdict(self) -> str:
        """The conclusion of these statistics as text."""
        n = self.experts
        if self.used < 1.2:
            return f"uses {self.used:.1f} of {n} experts: static layer suffices"
        if self.variation < 0.01:
            return "hardly varies: static layer suffices"
        if self.kernels is not None and self.kernels < CONSTANT_KERNEL:
            return "experts hardly differ: static layer suffices"
        if self.dead:
            return f"{len(self.dead)} of {n} experts never used: {n - len(self.dead)} suffice"
        if self.between > 0.5:
            return f"uses {self.used:.1f} of {n} experts, by class"
        return f"uses {self.used:.1f} of {n} experts, by image"

    @property
    def advice(self) -> str:
        """``verdict`` shortened, for a table with a column ``used``."""
        if self.static:
            return "static layer suffices"
        return f"{len(self.dead)} never used" if self.dead else "by class" if self.between > 0.5 else "by image"

    @property
    def static(self) -> bool:
        """Whether the gates or the mixed kernels hardly depend on the image: a static layer suffices."""
        hardly_differ = self.kernels is not None and self.kernels < CONSTANT_KERNEL
        return self.used < 1.2 or self.variation < 0.01 or hardly_differ

    def distinct_classes(self, most: int) -> tuple[int, ...]:
        """The ``most`` classes whose mean gates differ most from ``mean``, in class order."""

        def distance(c: int) -> float:
            return sum(abs(own - mean) for own, mean in zip(self.by_class[c], self.mean, strict=True))

        return tuple(sorted(sorted(range(len(self.by_class)), key=distance, reverse=True)[:most]))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def layer_routing(
    name: str, gates: Tensor, labels: Tensor, classes: int, kernels: Sequence[Tensor] = ()
) -> LayerRouting:
    """The statistics of ``gates`` [N, E] of images with ``labels`` [N]. kernels: experts [E, ...] mixed by them."""
    gates = gates.double()
    shares = gate_statistics.shares(gates)
    entropy_of_mean = gate_statistics.entropy(shares.mean(dim=0))
    shares_by_class = _class_means(shares, labels, classes)  # [C, E]
    weights = class_weights(labels, classes)
    entropy = float(gate_statistics.entropy(shares).mean())
    experts, moments = gates.shape[1], gate_statistics.GateMoments.of(gates)
    return LayerRouting(
        name=name,
        experts=experts,
        mean=tuple(gates.mean(dim=0).tolist()),
        by_class=tuple(tuple(row) for row in _class_means(gates, labels, classes).tolist()),
        quantiles=tuple(tuple(row) for row in torch.quantile(gates, QUANTILES, dim=0).T.tolist()),
        entropy=entropy,
        used=math.exp(float(entropy_of_mean)),
        per_image=math.exp(entropy),
        variation=float(gate_statistics.total_variation(gates)),
        kernels=max(map(moments.kernel_variation, kernels), default=None),
        information=max(0.0, float(entropy_of_mean - (weights * gate_statistics.entropy(shares_by_class)).sum())),
        between=share_between_classes(gates, labels, classes),
        dead=tuple(i for i in range(experts) if float(shares[:, i].max()) < DEAD / experts),
        saturated=tuple(i for i in range(experts) if float((shares[:, i] > SATURATED).double().mean()) > SATURATED),
        top=tuple(tuple(shares[:, i].topk(min(TOP_IMAGES, len(shares))).indices.tolist()) for i in range(experts)),
    )


def _class_means(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[N, E] -> [C, E]; a class without images gets the mean of all."""
    mean = rows.mean(dim=0)
    return torch.stack([rows[labels == c].mean(dim=0) if bool((labels == c).any()) else mean for c in range(classes)])


def share_between_classes(rows: Tensor, labels: Tensor, classes: int, least: float = 1e-12) -> float:
    """Share of the variance of ``rows`` [N, K] that lies between classes; 0 for a variance up to ``least``."""
    mean, weights = rows.mean(dim=0), class_weights(labels, classes)
    total = float(((rows - mean) ** 2).sum(dim=1).mean())
    between = float((weights[:, None] * (_class_means(rows, labels, classes) - mean) ** 2).sum())
    return between / total if total > least else 0.0


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """The fraction of the images in each class, [C]."""
    return torch.bincount(labels, minlength=classes).double() / len(labels)
