"""All measurements of one model: plain numbers, no rendering."""

from __future__ import annotations

from dataclasses import dataclass, field

from condconv_surgery.reporting.images.network_routing import Routing
from condconv_surgery.reporting.images.predictions import Predictions
from condconv_surgery.reporting.images.recorded_accuracy import RecordedAccuracy
from condconv_surgery.reporting.measure.cost_table import Profile
from condconv_surgery.reporting.measure.expert_similarity import Experts
from condconv_surgery.reporting.measure.latency import Latency
from condconv_surgery.reporting.measure.memory_and_latency import Cost
from condconv_surgery.reporting.measure.provenance import Provenance
from condconv_surgery.reporting.study.binomial_interval import binomial_interval


@dataclass(frozen=True)
class Measurements:
    """The measurements of one model.

    title: the model's source, or its class. profile: parameters and MACs. cost: peak memory and latency.
    experts: how different the kernels are. predictions: on the images, if some were given.
    routing: statistics of the gates over the images; ``None`` for an unconverted network.
    recorded: top-1 that the training run recorded, if known. provenance: file, data, command, date, versions.
    """

    title: str
    profile: Profile
    cost: Cost | None = None
    experts: tuple[Experts, ...] = ()
    predictions: Predictions | None = None
    routing: Routing | None = None
    recorded: RecordedAccuracy | None = None
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def accuracy(self) -> float | None:
        """Top-1 on the images; without images, the value that the run recorded."""
        if self.predictions and self.measured:
            return self.predictions.accuracy
        return self.recorded.top1 if self.recorded else None

    @property
    def measured(self) -> bool:
        """Is ``accuracy`` that on the images, not the recorded one?"""
        return self.predictions is not None and self.predictions.accuracy is not None

    @property
    def accuracy_images(self) -> int:
        """Number of images of ``accuracy``; 0 where it is not known."""
        if self.predictions and self.measured:
            return len(self.predictions.images)
        return self.recorded.images if self.recorded else 0

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """95% interval of ``accuracy`` over images; ``None`` where their number is not known."""
        if self.accuracy is None or not self.accuracy_images:
            return None
        return binomial_interval(round(self.accuracy * self.accuracy_images), self.accuracy_images)

    @property
    def latency(self) -> Latency | None:
        """At batch 1, if it was measured."""
        return self.cost.latency[0] if self.cost and self.cost.latency else None
