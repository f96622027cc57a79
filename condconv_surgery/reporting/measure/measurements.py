"""All measurements of one model: plain numbers, no rendering."""

from __future__ import annotations

from dataclasses import dataclass

from condconv_surgery.reporting.measure.cost_table import Profile
from condconv_surgery.reporting.measure.expert_similarity import Experts
from condconv_surgery.reporting.measure.latency import Latency
from condconv_surgery.reporting.measure.memory_and_latency import Cost
from condconv_surgery.reporting.measure.routing_statistics import Routing


@dataclass(frozen=True)
class Measurements:
    """The measurements of one model.

    title: the model's source, or its class. profile: parameters and MACs. cost: peak memory and latency.
    experts: how different the kernels are. routing: statistics of the gates, if images were given.
    recorded: top-1 that the training run recorded, 0 to 1, if known.
    """

    title: str
    profile: Profile
    cost: Cost | None = None
    experts: tuple[Experts, ...] = ()
    routing: Routing | None = None
    recorded: float | None = None

    @property
    def accuracy(self) -> float | None:
        """Top-1 on the images; without images, the value that the run recorded."""
        measured = self.routing.accuracy if self.routing else None
        return self.recorded if measured is None else measured

    @property
    def latency(self) -> Latency | None:
        """At batch 1, if it was measured."""
        return self.cost.latency[0] if self.cost and self.cost.latency else None
