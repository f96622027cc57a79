"""Several models in one table: the rows, CSV and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from condconv_surgery.errors import counted
from condconv_surgery.reporting.images.paired_models import differences_to_first
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.render.answers import caveats, comparison_answer
from condconv_surgery.reporting.render.csv_text import csv_text
from condconv_surgery.reporting.render.number_format import human, human_bytes
from condconv_surgery.reporting.render.short_names import unique_short_names
from condconv_surgery.reporting.study.paired_difference import Difference
from condconv_surgery.reporting.study.study_results import points

HEADERS = ("model", "converted", "parameters", "MACs", "weights", "latency", "top-1", "difference")


def rows_of(models: Sequence[Measurements]) -> list[list[str]]:
    """The cells under ``HEADERS``, formatted; a dash where nothing was measured. model: its short name.

    top-1: a star marks what a run recorded. difference: points to the first model, with the 95% interval.
    """
    rows, names = [], unique_short_names([model.title for model in models])
    for model, difference in zip(models, differences_to_first(models), strict=True):
        profile, latency = model.profile, model.latency
        rows.append(
            [
                names[model.title],
                counted(profile.converted, "layer") if profile.converted else "-",
                human(profile.parameters),
                human(profile.macs.total),
                human_bytes(profile.weight_bytes),
                f"{latency.median * 1e3:.1f} ms" if latency else "-",
                _top1(model),
                "-" if difference is None else points(difference),
            ]
        )
    return rows


def sort_keys(model: Measurements, difference: Difference | None) -> list[float]:
    """The numbers behind a row's cells; -1 for what was not measured."""
    profile, latency = model.profile, model.latency
    accuracy = -1.0 if model.accuracy is None else model.accuracy
    sizes = [profile.converted, profile.parameters, profile.macs.total, profile.weight_bytes]
    return [0, *sizes, latency.median if latency else -1.0, accuracy, -1.0 if difference is None else difference.mean]


def measured_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """Indices of the columns in which something was measured; the first, the names, always."""
    return [i for i in range(len(rows[0])) if i == 0 or any(row[i] != "-" for row in rows)]


def to_csv(models: Sequence[Measurements]) -> str:
    """One line per model, plain numbers; a value that was not measured is empty.

    The difference is to the first model, ``difference_half`` half of its 95% interval.
    """
    header = "model,parameters,macs,weight_bytes,latency_seconds,accuracy,accuracy_low,accuracy_high,images"
    rows: list[list[Any]] = [[*header.split(","), "difference", "difference_half"]]
    for model, difference in zip(models, differences_to_first(models), strict=True):
        profile, latency = model.profile, model.latency
        sizes = [profile.parameters, profile.macs.total, profile.weight_bytes]
        accuracy = "" if model.accuracy is None else model.accuracy
        scores = [accuracy, *(model.accuracy_interval or ("", "")), model.accuracy_images or ""]
        paired = ("", "") if difference is None else (difference.mean, difference.half)
        rows.append([model.title, *sizes, latency.median if latency else "", *scores, *paired])
    return csv_text(rows)


def to_markdown(models: Sequence[Measurements]) -> str:
    """The answer, one table without columns in which nothing was measured, and what limits the comparison."""
    rows = rows_of(models)
    columns = measured_columns(rows)
    lines = [[row[i] for i in columns] for row in (HEADERS, *rows)]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    table = "\n".join([head, "|---|" + "---:|" * (len(columns) - 1), *body])
    return "\n\n".join([f"**{comparison_answer(models)}**", table, *caveats(models)]) + "\n"


def _top1(model: Measurements) -> str:
    """``93.3%``; with a star where it is what a run recorded."""
    if model.accuracy is None:
        return "-"
    return f"{model.accuracy:.1%}{'' if model.measured else ' *'}"
