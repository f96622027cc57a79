"""A converted YOLO through Ultralytics' own train, val, predict, resume, fuse and export."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from tests.integrations.trained_yolo import ROOT, SIDE, SMALL, description_of, train_detector, write_shapes

ultralytics = pytest.importorskip("ultralytics")

from ultralytics import YOLO  # noqa: E402
from ultralytics.nn.tasks import DetectionModel  # noqa: E402

from condconv_surgery.integrations.ultralytics import (  # noqa: E402
    ConditionalDetectionTrainer,
    ConditionalYOLO,
    convert_yolo,
)
from condconv_surgery.integrations.ultralytics.yolo_trainers import put_layers_of  # noqa: E402

EXAMPLE = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
PAGE = ROOT / "docs/how-to/ultralytics.md"
FEW = {**SMALL, "amp": False, "optimizer": "AdamW", "lr0": 1e-3, "warmup_epochs": 0, "nbs": 8}
"""An optimizer step for each batch; with Ultralytics' nominal batch of 64 it would be each eighth."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained checkpoint and its data."""
    return train_detector(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tuned(plain: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoints of a short fine-tuning of the converted network."""
    file, data = plain
    folder = tmp_path_factory.mktemp("tuned")
    yolo = convert_yolo(YOLO(file), cs.CondConv(experts=4), example=EXAMPLE)
    yolo.train(data=data, epochs=2, project=folder, name="run", **FEW)
    return folder / "run" / "weights"


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().float() for name, layer in conditional_layers(network).items()}


def moved_layers(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """Those whose weights changed by more than rounding to the half precision of a checkpoint."""
    return [
        name
        for name, weight in before.items()
        if weight.shape != after[name].shape or not torch.allclose(after[name], weight, atol=1e-4, rtol=1e-3)
    ]


def test_the_map_of_a_converted_network_is_that_of_the_plain_one(plain: tuple[Path, Path], tmp_path: Path) -> None:
    file, data = plain
    before = YOLO(file).val(data=data, project=tmp_path, **SMALL).box.map
    yolo = convert_yolo(YOLO(file), cs.CondConv(experts=4), example=EXAMPLE)
    after = yolo.val(data=data, project=tmp_path, **SMALL).box.map
    assert before > 0.5
    assert after == pytest.approx(before, abs=1e-3)


def test_training_keeps_the_layers_and_moves_their_weights(plain: tuple[Path, Path], tuned: Path) -> None:
    before = weights_of(convert_yolo(YOLO(plain[0]), cs.CondConv(experts=4), example=EXAMPLE).model)
    for name in ("best.pt", "last.pt"):
        after = weights_of(YOLO(tuned / name).model)
        assert after.keys() == before.keys()
        moved = moved_layers(before, after)
        assert len(moved) > 0.9 * len(before)  # a branch of the head without an object has no gradient
        assert any(not torch.equal(after[layer][0], after[layer][1]) for layer in moved)


def test_a_checkpoint_validates_and_predicts_without_our_class(
    plain: tuple[Path, Path], tuned: Path, tmp_path: Path
) -> None:
    data = plain[1]
    ours, theirs = ConditionalYOLO(tuned / "best.pt"), YOLO(tuned / "best.pt")
    scores = [yolo.val(data=data, project=tmp_path, **SMALL).box.map for yolo in (ours, theirs)]
    assert scores[0] == scores[1] > 0.5
    image = data.parent / "images" / "0.png"
    boxes = [yolo.predict(image, imgsz=SIDE, verbose=False)[0].boxes.xyxy for yolo in (ours, theirs, ours.fuse())]
    assert len(boxes[0]) == 1
    torch.testing.assert_close(boxes[0], boxes[1])
    torch.testing.assert_close(boxes[0], boxes[2], atol=1e-2, rtol=1e-4)


def test_an_interrupted_training_resumes(plain: tuple[Path, Path], tmp_path: Path) -> None:
    file, data = plain

    def interrupt(trainer: Any) -> None:
        raise KeyboardInterrupt

    yolo = convert_yolo(YOLO(file), cs.CondConv(experts=2), example=EXAMPLE)
    count = len(conditional_layers(yolo.model))
    yolo.add_callback("on_model_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        yolo.train(data=data, epochs=2, project=tmp_path, name="run", **FEW)
    again = ConditionalYOLO(tmp_path / "run" / "weights" / "last.pt")
    again.train(resume=True)
    assert again.trainer.epoch == 1
    assert again.trainer.start_epoch == 1
    assert len(conditional_layers(again.model)) == count
    assert len(again.trainer.optimizer.state) > count


def test_other_classes_keep_the_number_of_conditional_layers(plain: tuple[Path, Path], tmp_path: Path) -> None:
    file, data = plain
    three = data.with_name("three.yaml")
    three.write_text(data.read_text() + "  2: none\n")
    yolo = convert_yolo(YOLO(file), cs.ODConv(experts=2), example=EXAMPLE)
    before = weights_of(yolo.model)
    yolo.train(data=three, epochs=1, val=False, project=tmp_path, **{**FEW, "lr0": 1e-8})
    after = weights_of(yolo.model)
    assert after.keys() == before.keys()
    assert yolo.names == {0: "square", 1: "disc", 2: "none"}
    kept = [name for name in after if after[name].shape == before[name].shape]
    assert len(kept) >= len(after) - 3
    assert all(torch.allclose(after[name], before[name], atol=1e-3) for name in kept)


def test_trained_class_branches_survive_another_number_of_classes(tmp_path: Path) -> None:
    """The hidden width of a class branch depends on the number of classes: 80 and 32 here."""
    yolo = YOLO(description_of("yolov8n", tmp_path / "yolov8n.yaml", classes=80))
    network = convert_yolo(yolo, cs.CondConv(experts=2), example=EXAMPLE).model
    built = DetectionModel(network.yaml, nc=2, verbose=False)
    put_layers_of(network, built)
    before, after = weights_of(network), weights_of(built)
    assert after.keys() == before.keys()
    assert [name for name in before if name not in moved_layers(before, after)] == [
        name for name in before if not re.fullmatch(r"model\.22\.cv3\.\d\.2", name)
    ]
    assert all(parameter.requires_grad for name, parameter in built.named_parameters() if ".dfl." not in name)
    assert built(EXAMPLE)["scores"].shape[1] == 2


def test_a_trainer_that_would_lose_the_layers_stops(plain: tuple[Path, Path], tuned: Path, tmp_path: Path) -> None:
    options = {"data": plain[1], "epochs": 1, "project": tmp_path, **FEW}
    with pytest.raises(InputError, match=r"train a plain network[\s\S]*ConditionalYOLO"):
        YOLO(tuned / "best.pt").train(**options)
    with pytest.raises(InputError, match=r"no conditional layer[\s\S]*convert_yolo"):
        YOLO(plain[0]).train(trainer=ConditionalDetectionTrainer, **options)
    fused = ConditionalYOLO(tuned / "best.pt")
    fused.fuse()
    with pytest.raises(InputError, match=r"is fused[\s\S]*before fuse"):
        fused.train(**options)


def test_onnx_with_a_dynamic_batch_and_size(plain: tuple[Path, Path], tuned: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    yolo = ConditionalYOLO(tuned / "last.pt")
    before = [layer.implementation for layer in conditional_layers(yolo.model).values()]
    file = yolo.export(format="onnx", dynamic=True, imgsz=SIDE)
    assert [layer.implementation for layer in conditional_layers(yolo.model).values()] == before
    session = onnxruntime.InferenceSession(file)
    for shape in ((1, 3, SIDE, SIDE), (5, 3, SIDE, SIDE), (3, 3, SIDE + 32, SIDE + 64)):
        images = torch.rand(shape)
        with torch.no_grad():
            expected = yolo.model.eval()(images)[0].numpy()
        (actual,) = session.run(None, {"images": images.numpy()})
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()
    image = plain[1].parent / "images" / "0.png"
    boxes = [one.predict(image, imgsz=SIDE, verbose=False)[0].boxes.xyxy for one in (yolo, YOLO(file, task="detect"))]
    torch.testing.assert_close(*boxes, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(
    ("task", "name"), [("segment", "yolo11n-seg"), ("pose", "yolo11n-pose"), ("classify", "yolo11n-cls")]
)
def test_each_head_trains_and_validates(task: str, name: str, tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "shapes", side=64, task=task)
    file = description_of(name, tmp_path / f"{name}.yaml")
    YOLO(file, task=task).save(tmp_path / "plain.pt")
    yolo = convert_yolo(YOLO(tmp_path / "plain.pt"), cs.DynamicConv(experts=2), example=torch.rand(2, 3, 64, 64))
    before = weights_of(yolo.model)
    yolo.train(data=data, epochs=1, project=tmp_path, **{**FEW, "imgsz": 64})
    after = weights_of(yolo.model)
    assert after.keys() == before.keys()
    assert len(moved_layers(before, after)) > 0.5 * len(before)
    assert yolo.metrics is not None
    assert len(yolo.predict(torch.rand(2, 3, 64, 64), imgsz=64, verbose=False)) == 2


def test_an_optimizer_that_treats_experts_otherwise_is_named(
    plain: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ultralytics takes it by itself for more than 10,000 iterations."""
    yolo = convert_yolo(YOLO(plain[0]), cs.CondConv(experts=2), example=EXAMPLE)
    with caplog.at_level("WARNING", logger="ultralytics"):
        yolo.train(data=plain[1], epochs=1, project=tmp_path, **{**FEW, "optimizer": "MuSGD"})
    assert "get its SGD part alone" in caplog.text
    experts = {id(layer.weight) for layer in conditional_layers(yolo.trainer.model).values()}
    by_muon = [p for group in yolo.trainer.optimizer.param_groups if group["use_muon"] for p in group["params"]]
    assert by_muon
    assert not experts & {id(parameter) for parameter in by_muon}


def test_the_page_for_yolo_runs(plain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, data = plain
    shutil.copy(file, tmp_path / "yolo11n.pt")
    shutil.copy(data, tmp_path / "shapes.yaml")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, PAGE.name, "exec"), names)
    assert len(conditional_layers(names["yolo"].model)) == 62


def test_the_example_runs(plain: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples/with_ultralytics.py", tmp_path / "out", plain[0]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "conditional layers after training: 62" in done.stdout
    assert "8 images in ONNX Runtime" in done.stdout
