"""Several models in one table, and the accuracy that a run recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from condconv_surgery import report
from condconv_surgery.errors import InputError
from condconv_surgery.reporting import Comparison, Report, recorded_accuracy
from condconv_surgery.reporting.render.terminal import render_comparison
from tests.measured_report import SPEC, shown
from tests.small_networks import small_net


def test_comparison(measured: Report, tmp_path: Path) -> None:
    plain = replace(report(small_net(), inputs=SPEC), title="plain", recorded=0.5)
    both = Comparison((plain, measured))
    assert both.to_dict()["models"][0]["accuracy"] == 0.5
    text = shown(render_comparison(both.reports))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "50.0%" in text
    for form in (text, both.to_markdown(), both.to_html()):
        assert "latency" not in form, "a column in which nothing was measured"
        assert "top-1" in form
    assert both.to_markdown().count("\n") == 4
    assert len(both.to_csv().splitlines()) == 3
    assert "<svg" in both.to_html()
    assert [f.name for f in both.write_plots(tmp_path)] == ["comparison.png", "comparison.svg"]
    unknown = Comparison((replace(plain, recorded=None),))
    assert "<svg" not in unknown.to_html()
    with pytest.raises(InputError, match="No accuracy of these models is known"):
        unknown.write_plots(tmp_path)


def test_accuracy_that_a_run_recorded(tmp_path: Path) -> None:
    rows = [{"val_top1": 0.3, "best": True}, {"val_top1": 0.5, "best": True}, {"val_top1": 0.4, "best": False}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"val_t')
    for name in ("best", "last", "other"):
        (tmp_path / f"{name}.safetensors").touch()
    found = [recorded_accuracy(tmp_path / f"{name}.safetensors") for name in ("best", "last", "other", "missing")]
    assert found == [0.5, 0.4, None, None]
    assert recorded_accuracy("torchvision:resnet18") is None
