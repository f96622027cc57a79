"""The options in a run's folder: any folder can resume the run, so paths are absolute and names stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.state.written_options import with_absolute_paths


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("weights.pt", "{here}/weights.pt"),
        ("run", "{here}/run"),  # best.safetensors in it
        ("transformers:run", "transformers:{here}/run"),
        ("transformers:microsoft/resnet-50", "transformers:microsoft/resnet-50"),
        ("torchvision:resnet18", "torchvision:resnet18"),
        ("", ""),
    ],
)
def test_models_and_teachers_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "weights.pt").touch()
    (tmp_path / "start").mkdir()  # of this name, a teacher is the model before training
    expected = written.format(here=tmp_path)
    options = TrainingOptions().updated({"model": name, "output": "run", "distill": {"teacher": name}})
    assert with_absolute_paths(options).model == expected
    assert with_absolute_paths(options).distill.teacher == expected
    start = options.updated({"distill": {"teacher": "start"}})
    assert with_absolute_paths(start).distill.teacher == "start"
