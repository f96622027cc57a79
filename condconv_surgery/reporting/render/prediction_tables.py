"""Predictions as tables: accuracy by class, the most frequent confusions, calibration."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from condconv_surgery.errors import counted
from condconv_surgery.reporting.images.predictions import ClassAccuracy, Predictions
from condconv_surgery.reporting.render.csv_text import csv_text
from condconv_surgery.reporting.render.number_format import span

WORST = 5
"""Classes and confusions that a terminal shows."""


def worst_first(predictions: Predictions) -> list[ClassAccuracy]:
    """The classes, those with the smallest accuracy first."""
    return sorted(predictions.by_class, key=lambda row: (row.accuracy, -row.images))


def confusions(predictions: Predictions) -> list[tuple[int, str, str]]:
    """(images, class, predicted class) of all wrong predictions, the most frequent first."""
    columns = (*predictions.classes, "another class")
    found = [
        (count, predictions.classes[c], columns[other])
        for c, row in enumerate(predictions.confusion)
        for other, count in enumerate(row)
        if count and c != other
    ]
    return sorted(found, key=lambda row: -row[0])


def calibration_line(predictions: Predictions) -> str:
    """The calibration error in a sentence; empty where it is not known."""
    found = predictions.calibration
    if found is None or predictions.accuracy is None:
        return ""
    gap = found.confidence - predictions.accuracy
    side = "over-confident" if gap > 0 else "under-confident"
    bins = counted(len(found.bins), "bin")
    return (
        f"Calibration: mean confidence {found.confidence:.1%} against top-1 {predictions.accuracy:.1%} ({side}); "
        f"expected calibration error {100 * found.error:.1f} points over {bins}."
    )


def summary_lines(predictions: Predictions) -> list[str]:
    """Accuracy with its interval, calibration, the weakest classes and the most frequent confusions: four lines."""
    interval = predictions.interval
    if predictions.accuracy is None or interval is None:
        return [predictions.caveats]
    top = f"Top-1 {predictions.accuracy:.1%} ({span(interval)}, 95% interval) on "
    top += f"{len(predictions.images)} images of {predictions.where}. {predictions.caveats}".strip()
    worst = [f"{row.name} {row.right}/{row.images}" for row in worst_first(predictions) if row.right < row.images]
    confused = [f"{name} as {other} ({count})" for count, name, other in confusions(predictions)]
    lines = [top, calibration_line(predictions), _shown("Weakest classes", worst), _shown("Confused", confused)]
    return [line for line in lines if line]


def render_predictions(predictions: Predictions) -> RenderableType:
    """``summary_lines`` for a terminal."""
    return Group("", *map(Text, summary_lines(predictions)))


def predictions_csv(predictions: Predictions) -> str:
    """One line an image: ``image,label,predicted,confidence,correct``."""
    rows = predictions.rows()
    header = ("image", "label", "predicted", "confidence", "correct")
    return csv_text(
        [header, *([*map(row.get, header[:3]), f"{row['confidence']:.6f}", row["correct"]] for row in rows)]
    )


def _shown(title: str, parts: list[str]) -> str:
    hidden = len(parts) - WORST
    return f"{title}: {', '.join(parts[:WORST])}{f', and {hidden} more' if hidden > 0 else ''}." if parts else ""
