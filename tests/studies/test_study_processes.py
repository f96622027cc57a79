"""A study under torchrun: all processes train each run, and the first one writes the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import small_study
from tests.images import write_images
from tests.small_study import study_options
from tests.training.forked import forked, several


@pytest.mark.slow
def test_processes_give_the_record_of_one(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", each=12)
    records = []
    for processes in (1, 2):
        output = tmp_path / f"study-{processes}"
        given = {
            "arms": ["static", "condconv:2"],
            "options": study_options(),
            "data": str(data),
        }
        file = tmp_path / f"{processes}.json"
        file.write_text(json.dumps({**given, "seeds": 2, "rates": 2, "output": str(output)}))
        how = (small_study.main,) if processes == 1 else (several, small_study.main, processes, 0)
        process = forked(*how, [str(file)], output=file.with_suffix(".txt"))
        process.join(300)
        assert process.exitcode == 0, file.with_suffix(".txt").read_text()
        records.append(json.loads((output / "study.json").read_text())["record"])
    one, two = records
    assert one["settings"] == two["settings"]
    assert (one["environment"]["processes"], two["environment"]["processes"]) == ("1", "2")
    for own, other in zip(one["arms"], two["arms"], strict=True):
        assert own["lr"] == other["lr"]
        assert [run["correct"] for run in own["runs"]] == [run["correct"] for run in other["runs"]]
        assert [run["seed"] for run in own["runs"]] == [1, 2]
