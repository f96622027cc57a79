"""The text of a report at a fixed width, and the keys of its JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from condconv_surgery import CondConv, ODConv, convert, report
from condconv_surgery.reporting import Comparison, Provenance, Report
from condconv_surgery.reporting.render.answers import report_answer
from condconv_surgery.reporting.render.prediction_tables import render_predictions
from condconv_surgery.reporting.render.terminal import render_experts, render_profile, render_routing
from tests.measured_report import SPEC, network, shown

GOLDEN = Path(__file__).parents[1] / "golden"


def same_as_golden(name: str, text: str) -> None:
    """Set UPDATE_GOLDEN=1 to rewrite the files; then read them."""
    file = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("variant", [CondConv(4), ODConv(2)], ids=["condconv", "odconv"])
def test_golden_texts(variant: CondConv | ODConv) -> None:
    found = report(convert(network(), variant, prove=False).model)
    table = shown(render_profile(found.profile, found.title))
    assert max(len(line) for line in table.splitlines()) <= 80
    same_as_golden(f"{variant.kind}.txt", table)
    same_as_golden(f"{variant.kind}.md", replace(found, cost=None, provenance=Provenance()).to_markdown())
    same_as_golden(f"{variant.kind}.csv", found.to_csv())


def keys(value: object) -> object:
    """The shape of a JSON value: keys and types, the first element for a list."""
    if isinstance(value, dict):
        return {name: keys(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [keys(value[0])] if value else []
    return type(value).__name__


def test_golden_json_schema(measured: Report) -> None:
    data = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    same_as_golden("schema.json", json.dumps(keys(data), indent=1) + "\n")


def test_long_names_and_many_experts_fit_80_columns() -> None:
    inner = nn.ModuleDict({"a_very_long_name_of_a_block_that_somebody_chose": network()})
    model = nn.Sequential(inner["a_very_long_name_of_a_block_that_somebody_chose"])
    wrapped = nn.Sequential()
    wrapped.add_module("a_very_long_name_of_a_block_that_somebody_chose", model)
    found = report(convert(wrapped, ODConv(32), example=torch.randn(1, 3, 32, 32), prove=False).model, inputs=SPEC)
    lines = shown(render_profile(found.profile, found.title)).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert not any("E+" in line for line in lines)
    assert any(line.startswith("…") and ".5 " in line for line in lines), "names of layers differ at their end"


def test_everything_on_a_terminal_fits_80_columns(measured: Report) -> None:
    assert measured.cost is not None
    assert measured.routing is not None
    assert measured.predictions is not None
    parts = [
        render_profile(measured.profile, measured.title, cost=measured.cost),
        render_experts(measured.experts),
        render_routing(measured.routing, measured.experts),
        render_predictions(measured.predictions),
    ]
    for part in parts:
        assert max(len(line) for line in shown(part).splitlines()) <= 80
    assert "layers could be static" in shown(render_routing(measured.routing)).replace("\n", " ")


def test_as_text_a_report_is_what_it_prints(
    measured: Report, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its thousands of values: a script prints a report, an interpreter shows one."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # of the terminal, not of a text
    for shown_as in (measured, Comparison((measured, measured))):
        text = str(shown_as)
        assert "\x1b" not in text
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        shown_as.print(width=80)
        assert capsys.readouterr().out.rstrip() == text
    assert repr(measured) == f"<Report: {report_answer(measured)}>"
    assert measured.predictions is not None
    assert repr(measured.predictions).startswith(f"<Predictions: {len(measured.predictions.images)} images, top-1 ")


def test_csv_sums_to_its_last_line(measured: Report) -> None:
    header, *rows, total = csv.reader(io.StringIO(measured.to_csv()))
    for column in range(header.index("parameters_before"), len(header)):
        assert sum(int(row[column]) for row in rows) == int(total[column]), header[column]
