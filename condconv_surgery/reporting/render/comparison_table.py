"""Several models in one table: the rows, CSV and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.render.csv_markdown import csv_text
from condconv_surgery.reporting.render.number_format import human, human_bytes

HEADERS = ("model", "converted", "parameters", "MACs", "weights", "latency", "top-1")


def rows_of(models: Sequence[Measurements]) -> list[list[str]]:
    """The cells under ``HEADERS``, formatted; a dash where nothing was measured."""
    rows = []
    for model in models:
        profile, latency = model.profile, model.latency
        rows.append(
            [
                model.title,
                f"{profile.converted} layers" if profile.converted else "-",
                human(profile.parameters),
                human(profile.macs.total),
                human_bytes(profile.weight_bytes),
                f"{latency.median * 1e3:.1f} ms" if latency else "-",
                "-" if model.accuracy is None else f"{model.accuracy:.1%}",
            ]
        )
    return rows


def sort_keys(model: Measurements) -> list[float]:
    """The numbers behind a row's cells; -1 for what was not measured."""
    profile, latency = model.profile, model.latency
    accuracy = -1.0 if model.accuracy is None else model.accuracy
    sizes = [profile.converted, profile.parameters, profile.macs.total, profile.weight_bytes]
    return [0, *sizes, latency.median if latency else -1.0, accuracy]


def measured_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """Indices of the columns in which something was measured; the first, the names, always."""
    return [i for i in range(len(rows[0])) if i == 0 or any(row[i] != "-" for row in rows)]


def to_csv(models: Sequence[Measurements]) -> str:
    """One line per model, plain numbers; a value that was not measured is empty."""
    rows: list[list[Any]] = [["model", "parameters", "macs", "weight_bytes", "latency_seconds", "accuracy"]]
    for model in models:
        profile, latency = model.profile, model.latency
        sizes = [profile.parameters, profile.macs.total, profile.weight_bytes]
        accuracy = "" if model.accuracy is None else model.accuracy
        rows.append([model.title, *sizes, latency.median if latency else "", accuracy])
    return csv_text(rows)


def to_markdown(models: Sequence[Measurements]) -> str:
    """One table, without columns in which nothing was measured."""
    rows = rows_of(models)
    columns = measured_columns(rows)
    lines = [[row[i] for i in columns] for row in (HEADERS, *rows)]
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|---|" + "---:|" * (len(columns) - 1), *body]) + "\n"
