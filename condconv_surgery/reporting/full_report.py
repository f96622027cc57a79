"""``report``: one call from a model to everything that is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from torch import nn

from condconv_surgery.models.artifact.atomic_write import replacing
from condconv_surgery.recipe import recipe_of
from condconv_surgery.reporting.measure.expert_similarity import Experts, measure_experts
from condconv_surgery.reporting.measure.latency import Latency
from condconv_surgery.reporting.measure.model_profile import Profile
from condconv_surgery.reporting.measure.other_counters import other_counters, predicted
from condconv_surgery.reporting.measure.profile_model import profile
from condconv_surgery.reporting.measure.report_images import find_pictures
from condconv_surgery.reporting.measure.routing_statistics import Routing, measure_routing
from condconv_surgery.reporting.measure.run_cost import Cost, measure_cost
from condconv_surgery.reporting.render import tables
from condconv_surgery.reporting.render.html_page import report_fragment, report_page
from condconv_surgery.reporting.render.terminal import make_console, render_experts, render_profile, render_routing


@dataclass(frozen=True)
class Report:
    """The numbers of one model, and their forms.

    title: the model's source, or its class. profile: parameters and MACs. cost: memory and time. experts: how
    different the kernels are. routing: what the gates do, where there were pictures. recorded: top-1 of the run that
    trained it, 0 to 1, where it is known.
    """

    title: str
    profile: Profile
    cost: Cost | None = None
    experts: tuple[Experts, ...] = ()
    routing: Routing | None = None
    recorded: float | None = None

    @property
    def accuracy(self) -> float | None:
        """Top-1 on the pictures, else as the run recorded it."""
        seen = self.routing.accuracy if self.routing else None
        return self.recorded if seen is None else seen

    @property
    def latency(self) -> Latency | None:
        """At batch 1, where it was measured."""
        return self.cost.latency[0] if self.cost and self.cost.latency else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``parameters``, ``macs``, ``layers`` and the rest."""
        return {
            "title": self.title,
            **self.profile.to_dict(),
            "other_counters": {"why": other_counters(self.profile), "macs": predicted(self.profile)},
            "cost": self.cost.to_dict() if self.cost else None,
            "experts": [row.to_dict() for row in self.experts],
            "routing": self.routing.to_dict() if self.routing else None,
            "accuracy": self.accuracy,
        }

    def to_csv(self) -> str:
        """One line a layer, and a total."""
        return tables.to_csv(self.profile)

    def to_markdown(self) -> str:
        """Headings and tables."""
        return tables.to_markdown(self.profile, self.title, self.cost, self.routing)

    def to_html(self) -> str:
        """One page that needs nothing beside it."""
        return report_page(self)

    def _repr_html_(self) -> str:
        """For a notebook's cell."""
        return report_fragment(self)

    def print(self, width: int | None = None) -> None:
        """Tables on stdout, as wide as the terminal or ``width`` columns."""
        console = make_console(width)
        parts = [render_profile(self.profile, self.title, console.width, self.cost), render_experts(self.experts)]
        parts += [render_routing(self.routing, self.experts, console.width)] if self.routing else []
        console.print(Group(*parts))

    def write_plots(self, folder: str | Path) -> list[Path]:
        """PNG and SVG of the costs and, with pictures, of the routing; returns the files."""
        from condconv_surgery.reporting.render import figures as drawing
        from condconv_surgery.reporting.render import plots

        figures = {"layers": plots.layer_costs(self.profile, self.title)} if self.profile.macs.total else {}
        if self.routing and self.routing.layers:
            figures["experts"] = plots.experts_used(self.routing)
            liveliest = max(self.routing.layers, key=lambda layer: layer.variation)
            figures["gates_by_class"] = plots.gates_by_class(liveliest, self.routing.classes)
        return drawing.write(Path(folder), figures)


def report(
    model: nn.Module,
    *,
    inputs: Any = None,
    data: str | Path | None = None,
    limit: int = 1000,
    batch: int = 8,
    latency: bool = False,
    original: nn.Module | None = None,
    recorded: float | None = None,
) -> Report:
    """Measure ``model``, converted or not; nothing is printed and the model is as before.

    inputs: one tensor, a tuple of arguments, an ``InputSpec``; by default what the model's recipe says.
    data: a folder of labelled pictures, for the routing; of more than ``limit``, evenly many of each class.
    batch: the second batch size of memory and, with ``latency``, of time. original: the model before conversion, to
    say how far its experts have moved. recorded: top-1 that is known from elsewhere, 0 to 1.
    Raises ``InputError`` when the model does not run on the input, or the folder holds no labelled pictures.
    """
    recipe = recipe_of(model)
    pictures = find_pictures(data, limit) if data is not None else None
    counted = profile(model, inputs)
    classes = recipe.classes if recipe is not None else ()
    return Report(
        title_of(model),
        counted,
        measure_cost(model, inputs, batch=batch, latency=latency),
        measure_experts(model, original),
        measure_routing(model, pictures, classes=classes) if pictures is not None else None,
        recorded,
    )


def title_of(model: nn.Module) -> str:
    """The source in the model's recipe, else its class."""
    recipe = recipe_of(model)
    return recipe.source.name if recipe is not None and recipe.source.name else type(model).__name__


def write_page(page: str, path: str | Path) -> None:
    """Write an HTML page; the file is whole or as before."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")
