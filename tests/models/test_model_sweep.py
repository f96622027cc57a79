"""A piece of the sweep that fits into CI: one model of each way that a model can be called, and a page of rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.sweep.__main__ import main
from tests.sweep.markdown_table import HEADER, to_markdown
from tests.sweep.model_list import Case, torchvision_cases, torchvision_left_aside
from tests.sweep.run_trials import read_rows, run, run_onnx
from tests.sweep.trial import Row

PIECE = ("mobilenet_v3_small", "lraspp_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "raft_small")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torchvision's own
def test_a_piece_of_torchvision(tmp_path: Path) -> None:
    cases = [case for case in torchvision_cases() if case.source.partition(":")[2] in PIECE]
    rows = list(run(cases, tmp_path / "rows.jsonl", timeout=300))
    assert len(rows) == len(PIECE)
    for row in rows:
        assert not row.failure
        assert row.converted == row.convolutions > 0
        assert row.loaded
        assert row.stepped
        assert row.eval is not None
        assert row.eval < 1e-4
        assert bool(row.folded) != (row.source == "torchvision:raft_small")  # which has no batch norms
        assert row.fused is not None
        assert min(row.fused, row.fused_exact or row.fused) < 1e-4
    assert list(run(cases, tmp_path / "rows.jsonl", timeout=300)) == []  # an interrupted sweep goes on where it was
    few = [case for case in cases if case.source in ("torchvision:mobilenet_v3_small", "torchvision:raft_small")]
    small, flow = run_onnx(few, tmp_path / "rows.jsonl", timeout=300)
    assert small.onnx is not None
    assert small.converted
    assert "missing 1 required positional argument" in flow.no_onnx  # two images
    assert list(run_onnx(few, tmp_path / "rows.jsonl", timeout=300)) == []


def test_every_torchvision_model_is_swept_or_left_aside() -> None:
    assert len(torchvision_cases()) + len(torchvision_left_aside()) == 121


@pytest.mark.filterwarnings("ignore")
def test_what_fails_is_a_row_and_not_the_end(tmp_path: Path) -> None:
    (row,) = run([Case("torchvision:no_such_model")], tmp_path / "rows.jsonl", timeout=100)
    assert "Unknown torchvision model" in row.failure
    assert read_rows(tmp_path / "rows.jsonl") == {row.source: row}


def test_the_page_tells_failures_and_reasons(tmp_path: Path) -> None:
    measured = (1e-6, None, 2e-15, True, 3, 2e-4, 1e-12, True)
    good = Row("torchvision:a", "classification", 9, (2, 3, 96, 96), 5, 4, {"a reason": 1}, (), *measured)
    refused = [replace(good, source=f"torchvision:{name}", no_onnx=f"for {name}") for name in "cd"]
    page = to_markdown([replace(good, onnx=3e-6), Row("torchvision:b", "video", failure="Died: here\n more"), *refused])
    assert "4 models: 3 converted, 0 without a 2D convolution, 1 failed; 12 of 15 convolutions." in page
    assert "ONNX: 3 tried, 1 equal." in page
    cells = "2x3x96x96 | 5 | 4 | 1: a reason | 1e-06 | not run | 2e-15 | yes | yes | 3: 2e-04 (1e-12)"
    line = f"| torchvision:a | {cells} | 3e-06 |"
    assert line in page
    assert f"| torchvision:d | {cells} | no (2) |" in page
    assert "\n2. no ONNX file: for d\n" in page
    assert HEADER.count("|") == 2 * line.count("|")
    assert "- not converted: torchvision:b: Died: here\n" in page
    assert main(["-o", str(tmp_path / "none.jsonl"), "--table", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text().startswith("# Models tried")
