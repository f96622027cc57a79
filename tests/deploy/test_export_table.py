"""The page of exports tried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from condconv_surgery.deploy.runtimes.onnx_file import Onnx
from tests.exports import one_export
from tests.exports.__main__ import main
from tests.exports.one_export import Row, try_export

pytest.importorskip("onnxruntime")


def test_the_page_is_written_from_rows(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    good = Row("resnet18", "ODConv 1", "onnx", {"scale": 3, "loop": 16}, 46.2, 1.001, 4e-6, 6)
    bad = Row("resnet18", "ODConv 4", "onnx", {}, failure="cannot take the model")
    rows.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in (good, bad)))
    assert main(["-o", str(rows), "--table", str(page)]) == 0, "nothing was run"
    text = page.read_text()
    assert "| resnet18 | ODConv 1 | 16 loop, 3 scale | 46.2 | 1.001 | 4e-06 |" in text
    assert "| resnet18 | ODConv 4 | failed: cannot take the model | | | |" in text
    assert "2 of 25 tried, 1 exported and equal." in text
    assert "onnxruntime " in text


def test_a_file_that_is_too_large_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        forms, shapes, difference = {"a": "sum"}, ((1, 3, 8, 8),), 0.0

    def export(model: object, path: Path, **options: object) -> Result:
        path.write_bytes(bytes(12_000_000))
        return Result()

    monkeypatch.setattr(one_export.cs, "export", export)
    monkeypatch.setattr(one_export, "trained_alike", lambda *given: one_export.torchvision.models.squeezenet1_1())
    row = try_export("squeezenet1_1", "CondConv 4", Onnx.name)
    assert row.failure == "the file has 2.428 of the weights' bytes"
