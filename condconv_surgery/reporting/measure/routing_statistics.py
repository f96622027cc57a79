"""Does the routing do anything? Statistics of the gates of each layer over labelled pictures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.layers import gate_statistics
from condconv_surgery.recipe import InputSpec
from condconv_surgery.reporting.measure.observed_gates import frozen_right, observe
from condconv_surgery.reporting.measure.report_images import Pictures
from condconv_surgery.runtime.modes import input_spec_of

DEAD = 0.1
"""An expert is dead when no picture gives it more than this part of an equal share, 1/E."""

SATURATED = 0.9
"""An expert is saturated when it has more than this share on more than this part of the pictures."""

TOP_PICTURES = 4

QUANTILES = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)


@dataclass(frozen=True)
class LayerRouting:
    """The gates ``g`` [N, E] of one layer over N pictures of C classes; their shares have rows of sum 1. Nats.

    mean: mean gate of each expert, [E]. by_class: the same for each class, [C][E].
    quantiles: for each expert the gate's 5th, 50th and 95th percentile over pictures, [E][3].
    entropy: mean over pictures of H(shares). used: exp H(mean share), the effective number of experts, 1 to E.
    per_picture: exp(entropy), how many experts one picture has.
    variation: mean distance of a picture's gates from the mean, half of sum |g - mean|, 0 (static) to 1.
    information: mutual information of expert and class, H(mean share) less its mean within classes.
    between: share of the gates' variance that lies between classes, 0 to 1; the rest is within them.
    dead, saturated: indices of experts. top: for each expert, indices of the pictures that give it most.
    """

    name: str
    experts: int
    mean: tuple[float, ...]
    by_class: tuple[tuple[float, ...], ...]
    quantiles: tuple[tuple[float, ...], ...]
    entropy: float
    used: float
    per_picture: float
    variation: float
    information: float
    between: float
    dead: tuple[int, ...]
    saturated: tuple[int, ...]
    top: tuple[tuple[int, ...], ...]

    @property
    def verdict(self) -> str:
        """What it means, in words."""
        n = self.experts
        if self.used < 1.2:
            return f"uses {self.used:.1f} of {n} experts: static would do"
        if self.variation < 0.01:
            return "hardly varies: static would do"
        if self.dead:
            return f"{len(self.dead)} of {n} experts never used: {n - len(self.dead)} would do"
        if self.between > 0.5:
            return f"uses {self.used:.1f} of {n} experts, by class"
        return f"uses {self.used:.1f} of {n} experts, by picture"

    @property
    def advice(self) -> str:
        """``verdict`` in a few words, beside a column that says how many experts are used."""
        if self.static:
            return "static would do"
        return f"{len(self.dead)} never used" if self.dead else "by class" if self.between > 0.5 else "by picture"

    @property
    def static(self) -> bool:
        """A plain convolution would do."""
        return self.used < 1.2 or self.variation < 0.01

    def distinct_classes(self, most: int) -> tuple[int, ...]:
        """At most so many classes, those whose mean gates lie farthest from ``mean``, in their order."""

        def distance(c: int) -> float:
            return sum(abs(own - mean) for own, mean in zip(self.by_class[c], self.mean, strict=True))

        return tuple(sorted(sorted(range(len(self.by_class)), key=distance, reverse=True)[:most]))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Routing:
    """All layers with gates, and what conditioning is worth.

    accuracy, frozen: top-1 with live gates, and with every mixture fixed at its mean over these pictures; ``None``
        where the classes of the folder are not those of the model.
    uncertainty: standard error of ``accuracy - frozen``, from the pictures whose answer freezing changed.
    attention: for layers with attention, how much the scales differ between pictures (mean standard deviation).
    held_out: whether the pictures lay apart from those to train on.
    """

    layers: tuple[LayerRouting, ...]
    classes: tuple[str, ...]
    pictures: int
    accuracy: float | None
    frozen: float | None
    uncertainty: float | None
    attention: tuple[tuple[str, float], ...]
    files: tuple[str, ...] = ()
    held_out: bool = True

    @property
    def verdict(self) -> str:
        """What it means for the whole network, in words."""
        static = sum(layer.static for layer in self.layers)
        text = f"{static} of {len(self.layers)} layers would do as plain convolutions." if self.layers else ""
        if self.accuracy is None or self.frozen is None:
            return f"{text} Its classes are not those of the folder, so accuracy is unknown.".strip()
        return f"{text} {self._worth(self.accuracy, self.frozen)}{self._warning}".strip()

    def _worth(self, accuracy: float, frozen: float) -> str:
        over = f"{self.pictures} pictures"
        if not self.uncertainty and accuracy == frozen:
            same = f"top-1 {accuracy:.1%} with every gate as it is and frozen at its mean, {over}"
            return f"Conditioning changes no answer from right to wrong or back ({same})."
        gain = f"{100 * (accuracy - frozen):+.1f} ± {100 * (self.uncertainty or 0.0):.1f} points"
        both = f"top-1 {accuracy:.1%}, with every gate frozen at its mean {frozen:.1%}"
        return f"Conditioning is worth {gain} ({both}, {over})."

    @property
    def _warning(self) -> str:
        if self.held_out:
            return ""
        return " The folder has no val/: the model may have been trained on these very pictures."

    def to_dict(self) -> dict[str, Any]:
        return {
            "pictures": self.pictures,
            "classes": list(self.classes),
            "accuracy": self.accuracy,
            "frozen_accuracy": self.frozen,
            "worth_standard_error": self.uncertainty,
            "held_out": self.held_out,
            "verdict": self.verdict,
            "files": list(self.files),
            "layers": [layer.to_dict() for layer in self.layers],
            "attention_spread": dict(self.attention),
        }


def measure_routing(
    model: nn.Module,
    pictures: Pictures,
    *,
    classes: tuple[str, ...] = (),
    spec: InputSpec | None = None,
    batch: int = 32,
) -> Routing:
    """Two passes over ``pictures``: one with the gates as they are, one with them frozen at their means.

    classes: of the model's logits in order, to find the folder's classes by name; without them the folder's own order
        is taken, when there are as many.
    """
    spec = spec or input_spec_of(model)
    answers = _answers(pictures.classes, classes)
    seen = observe(model, pictures.batches(spec, batch), answers)
    known = answers is not None or (not classes and seen.width == len(pictures.classes))
    frozen = frozen_right(model, pictures.batches(spec, batch), seen.means, answers) if known else None
    gained = None if frozen is None else seen.right.double() - frozen.double()  # +1, 0 or -1 a picture
    return Routing(
        tuple(layer_routing(name, gates, seen.labels, len(pictures.classes)) for name, gates in seen.gates.items()),
        pictures.classes,
        len(pictures.files),
        seen.accuracy if known else None,
        None if frozen is None else float(frozen.double().mean()),
        None if gained is None else float(gained.std(correction=0)) / math.sqrt(len(gained)),
        tuple(seen.spreads.items()),
        pictures.files,
        pictures.held_out,
    )


def layer_routing(name: str, gates: Tensor, labels: Tensor, classes: int) -> LayerRouting:
    """The statistics of ``gates`` [N, E] of pictures with ``labels`` [N]."""
    gates = gates.double()
    shares = gate_statistics.shares(gates)
    entropy_of_mean = gate_statistics.entropy(shares.mean(dim=0))
    shares_by_class = _class_means(shares, labels, classes)  # [C, E]
    weights = torch.bincount(labels, minlength=classes).double() / len(labels)
    entropy = float(gate_statistics.entropy(shares).mean())
    experts = gates.shape[1]
    return LayerRouting(
        name=name,
        experts=experts,
        mean=tuple(gates.mean(dim=0).tolist()),
        by_class=tuple(tuple(row) for row in _class_means(gates, labels, classes).tolist()),
        quantiles=tuple(tuple(row) for row in torch.quantile(gates, QUANTILES, dim=0).T.tolist()),
        entropy=entropy,
        used=math.exp(float(entropy_of_mean)),
        per_picture=math.exp(entropy),
        variation=float(gate_statistics.total_variation(gates)),
        information=max(0.0, float(entropy_of_mean - (weights * gate_statistics.entropy(shares_by_class)).sum())),
        between=_between(gates, labels, weights),
        dead=tuple(i for i in range(experts) if float(shares[:, i].max()) < DEAD / experts),
        saturated=tuple(i for i in range(experts) if float((shares[:, i] > SATURATED).double().mean()) > SATURATED),
        top=tuple(tuple(shares[:, i].topk(min(TOP_PICTURES, len(shares))).indices.tolist()) for i in range(experts)),
    )


def _class_means(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[N, E] -> [C, E]; a class without pictures gets the mean of all."""
    mean = rows.mean(dim=0)
    return torch.stack([rows[labels == c].mean(dim=0) if bool((labels == c).any()) else mean for c in range(classes)])


def _between(gates: Tensor, labels: Tensor, weights: Tensor) -> float:
    """The share of the variance of ``gates`` that lies between classes of these ``weights`` [C]."""
    mean = gates.mean(dim=0)
    total = float(((gates - mean) ** 2).sum(dim=1).mean())
    between = float((weights[:, None] * (_class_means(gates, labels, len(weights)) - mean) ** 2).sum())
    return between / total if total > 1e-12 else 0.0


def _answers(folder: tuple[str, ...], model: tuple[str, ...]) -> Tensor | None:
    """The logit of each class of the folder, where the model knows them all by name."""
    if not model or not set(folder) <= set(model):
        return None
    return torch.tensor([model.index(name) for name in folder])
