"""``report``: measure a model and return a ``Report``, which prints and writes its measurements."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text
from torch import nn

from condconv_surgery.errors import require_at_least_one
from condconv_surgery.layers import routers
from condconv_surgery.recipe import recipe_of
from condconv_surgery.reporting.images.network_routing import measure_routing
from condconv_surgery.reporting.images.recorded_accuracy import RecordedAccuracy
from condconv_surgery.reporting.images.report_images import find_images
from condconv_surgery.reporting.measure.expert_similarity import measure_experts
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.measure.memory_and_latency import measure_cost
from condconv_surgery.reporting.measure.other_counters import predicted
from condconv_surgery.reporting.measure.profile import profile
from condconv_surgery.reporting.measure.provenance import provenance_now
from condconv_surgery.reporting.render import csv_markdown
from condconv_surgery.reporting.render.answers import report_answer
from condconv_surgery.reporting.render.html_page import report_fragment, report_page
from condconv_surgery.reporting.render.prediction_tables import render_predictions
from condconv_surgery.reporting.render.table_rows import other_counters
from condconv_surgery.reporting.render.terminal import Printable, render_experts, render_profile, render_routing
from condconv_surgery.runtime.class_names import classes_of
from condconv_surgery.runtime.wrappers import unwrapped


@dataclass(frozen=True, repr=False)
class Report(Printable, Measurements):
    """The measurements of one model, and their output formats: ``print(report)`` shows them as text."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values: ``parameters``, ``macs``, ``layers``, ..."""
        return {
            "title": self.title,
            **self.profile.to_dict(),
            "other_counters": {"why": other_counters(self.profile), "macs": predicted(self.profile)},
            "cost": self.cost.to_dict() if self.cost else None,
            "experts": [asdict(row) for row in self.experts],
            "answer": report_answer(self),
            "predictions": self.predictions.to_dict() if self.predictions else None,
            "routing": self.routing.to_dict() if self.routing else None,
            "accuracy": self.accuracy,
            "recorded": asdict(self.recorded) if self.recorded else None,
            "provenance": asdict(self.provenance),
        }

    def to_csv(self) -> str:
        return csv_markdown.to_csv(self.profile)

    def to_markdown(self) -> str:
        return csv_markdown.to_markdown(self)

    def to_html(self) -> str:
        return report_page(self)

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        return report_fragment(self)

    def of_run(self, run: Path) -> Report:
        """The same with what ``run``, which trained the model, recorded: how many of the images it trained on."""
        predictions = self.predictions.of_run(run) if self.predictions else None
        routing = replace(self.routing, predictions=predictions) if self.routing and predictions else self.routing
        return replace(self, predictions=predictions, routing=routing)

    def _tables(self, width: int) -> Group:
        parts = [render_profile(self.profile, self.title, width, self.cost), render_experts(self.experts)]
        parts += [render_routing(self.routing, self.experts, width)] if self.routing else []
        parts += [render_predictions(self.predictions)] if self.predictions else []
        return Group(*parts, "", Text(self._answer(), style="bold"))

    def _answer(self) -> str:
        return report_answer(self)

    def write_plots(self, folder: str | Path) -> list[Path]:
        """Write PNG and SVG of the cost and, with images, of the routing; return the files."""
        from condconv_surgery.reporting.render import plots
        from condconv_surgery.reporting.render.matplotlib_figures import write_figures

        figures = {"layers": plots.layer_costs(self.profile, self.title)} if self.profile.macs.total else {}
        if self.routing and self.routing.layers:
            figures["experts"] = plots.mean_gates(self.routing)
            most_variable = max(self.routing.layers, key=lambda layer: layer.variation)
            figures["gates_by_class"] = plots.gates_by_class(most_variable, self.routing.classes)
        if self.predictions and 1 < len(self.predictions.confusion) <= plots.MAX_CLASSES:
            figures["confusion"] = plots.confusion_matrix(self.predictions)
        return write_figures(Path(folder), figures)


def report(
    model: nn.Module,
    *,
    inputs: Any = None,
    data: str | Path | None = None,
    limit: int = 1000,
    batch: int = 8,
    latency: bool = False,
    original: nn.Module | None = None,
    recorded: RecordedAccuracy | float | None = None,
) -> Report:
    """Measure ``model``, converted or not. Prints nothing and leaves the model unchanged.

    inputs: one tensor, a tuple of arguments, a dict of keyword arguments or an ``InputSpec``; default: the input of the
    model's recipe.
    data: labelled images, for predictions and routing: what ``finetune`` reads, or a run directory (the validation
    images of that run); of more than ``limit``, equally many of each class.
    batch: the second batch size for memory and, with ``latency``, for time. original: the model before conversion,
    to measure how far its experts have moved. recorded: top-1 known from elsewhere, 0 to 1.
    Raises ``InputError`` when the model does not run on the input, or the folder holds no labelled images.
    """
    require_at_least_one("batch", batch, 8)
    model = unwrapped(model)
    images = find_images(data, limit) if data is not None else None
    classes = classes_of(model)
    routing = measure_routing(model, images, classes=classes) if images is not None else None
    predictions = routing.predictions if routing else None
    return Report(
        title_of(model),
        profile(model, inputs),
        measure_cost(model, inputs, batch=batch, latency=latency),
        measure_experts(model, original),
        predictions,
        routing if routers(model) else None,
        RecordedAccuracy(recorded) if isinstance(recorded, (int, float)) else recorded,
        provenance_now(f"{len(predictions.images)} images of {predictions.where}" if predictions else ""),
    )


def title_of(model: nn.Module) -> str:
    """The source in the model's recipe, else the class name."""
    recipe = recipe_of(model)
    return recipe.source.name if recipe is not None and recipe.source.name else type(model).__name__
