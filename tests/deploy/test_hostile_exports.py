"""Exports that must fail: a full disk, a wrong path, data that cannot calibrate, a model that cannot be compared."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.deploy.export_model import RUNTIMES
from condconv_surgery.deploy.file_proof import prove_outputs
from condconv_surgery.deploy.runtimes.runtime_protocol import Request, Runtime
from condconv_surgery.errors import InputError, SurgeryError
from condconv_surgery.models.artifact.atomic_write import FULL, FullDiskError, replacing_files
from condconv_surgery.recipe import CondConv, ODConv
from tests.conftest import Run
from tests.small_networks import Amplifies, mixed

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    cs.save(mixed(CondConv(8)), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize(
    ("to", "experts", "words"),
    [
        ("onnx", 16, "The file takes about 0.1 MB"),  # before anything is written
        ("onnx", 10, "No space left on device"),  # the weights alone have space
        ("pt2", 8, "No space left on device"),  # torch's own writer would end the process
    ],
)
def test_a_full_disk(to: str, experts: int, words: str, condconv: Run, tmp_path: Path, small_disk: Path) -> None:
    artifact, path = tmp_path / "m.safetensors", small_disk / f"m.{to}"
    cs.save(mixed(CondConv(experts)), artifact)
    path.write_bytes(b"before")
    arguments = ("export", artifact, "--to", to, "--trust", "tests", "--batch", "1", "--input-size", "32")
    code, _, err = condconv(*arguments, "-o", path)
    assert code == 1, err
    assert words in err
    assert "Try: another path, or free some space" in err
    assert [file.name for file in small_disk.iterdir()] == [path.name]
    assert path.read_bytes() == b"before"
    if experts == 16:
        code, _, err = condconv(*arguments, "-o", tmp_path / path.name)
        assert code == 0, err


class Filling(Runtime):
    """Fills the disk, and raises what exporters raise then; or notices nothing."""

    name, suffix, extra, packages, preferred = "filling", ".onnx", "", (), ("loop",)

    def __init__(self, raises: Exception | None) -> None:
        self.raises = raises

    def write(self, model: nn.Module, request: Request, path: Path) -> dict[str, int]:
        with pytest.raises(OSError, match="No space left"), path.open("wb") as file:
            file.write(bytes(1 << 20))
        if self.raises is not None:
            raise self.raises
        return {}

    def run(self, path: Path, inputs: Any) -> list[list[Tensor]]:
        return [[torch.zeros(len(x), 5)] for x in inputs]


@pytest.mark.parametrize(
    "raises",
    [RuntimeError("PytorchStreamWriter failed"), OSError(28, "No space left on device"), SurgeryError("no"), None],
    ids=str,
)
def test_a_disk_that_fills_up_is_named(
    raises: Exception | None, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNTIMES, "filling", Filling(raises))
    with pytest.raises(FullDiskError, match=r"(?i)no space(.|\n)*Try: another path, or free some space") as caught:
        cs.export(mixed(CondConv(2)), small_disk / "m.onnx", to="filling", size=32)
    assert caught.value.exit_code == 1
    assert list(small_disk.iterdir()) == []


def test_an_artifact_on_a_full_disk(small_disk: Path) -> None:
    with pytest.raises(FullDiskError, match=r"(?i)no space(.|\n)*free some space"):
        cs.save(mixed(CondConv(16)), small_disk / "m.safetensors")
    assert list(small_disk.iterdir()) == []


def test_another_failure_keeps_its_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="own"), replacing_files(tmp_path / "m.onnx", size=FULL):
        raise ValueError("own")
    assert list(tmp_path.iterdir()) == []


def test_the_path(condconv: Run, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RUNTIMES["ncnn"], "require_packages", lambda: None)
    (tmp_path / "out.onnx").mkdir()
    for to, path, words in (
        ("onnx", tmp_path / "out.onnx", r"is a folder(.|\n)*Try: .*out.onnx/model.onnx"),
        ("onnx", tmp_path / "m.pt2", r"does not end in .onnx(.|\n)*Try: .*m.onnx"),
        ("ncnn", tmp_path / "m.bin", r"does not end in .param"),  # its weights would have this name
        ("pt2", tmp_path / "none" / "m.pt2", "could not be written"),
    ):
        with pytest.raises(InputError, match=words):
            cs.export(mixed(CondConv(2)), path, to=to, batch=1, size=32)
    code, _, err = condconv("export", artifact, "--to", "onnx", "-o", tmp_path / "out.onnx")
    assert code == 2, err
    assert "Try: another -o" in err
    assert {file.name for file in tmp_path.iterdir()} == {"m.safetensors", "out.onnx"}


@pytest.mark.parametrize(("to", "name"), [("ncnn", "m.param"), ("openvino", "m.xml")])
def test_weights_of_another_file_are_not_replaced(
    to: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO and ncnn both write a .bin: the second export would make the first one's model unreadable."""
    monkeypatch.setattr(RUNTIMES[to], "require_packages", lambda: None)
    (tmp_path / "m.bin").write_bytes(b"of another file")
    with pytest.raises(InputError, match=rf"m.bin is there, without .*{name}(.|\n)*Try: .*m_{to}\."):
        cs.export(mixed(CondConv(2)), tmp_path / name, to=to, size=32)
    assert (tmp_path / "m.bin").read_bytes() == b"of another file"


def test_a_read_only_folder(condconv: Run, artifact: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"could not be written: .*Read-only(.|\n)*Try: another path"):
        cs.export(mixed(CondConv(2)), small_disk / "m.onnx", batch=1, size=32)
    code, _, err = condconv("export", artifact, "--to", "onnx", "-o", small_disk / "m.onnx")
    assert code == 2, err
    assert "must be a folder that exists and is writable" in err


@pytest.mark.parametrize("to", [name for name in RUNTIMES if name != "onnx"])
def test_forms_that_a_runtime_has_not(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the runtime is not installed here."""
    monkeypatch.setattr(RUNTIMES[to], "require_packages", lambda: None)
    with pytest.raises(InputError, match=r'"loop" is not for this runtime(.|\n)*scale(.|\n)*Try: form="auto"'):
        cs.export(mixed(CondConv(2)), tmp_path / f"m{RUNTIMES[to].suffix}", to=to, form="loop", size=32)
    assert list(tmp_path.iterdir()) == []


def images_in(folder: Path, count: int) -> Path:
    (folder / "a").mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "a" / f"{i}.png")
    return folder


def test_data_that_cannot_calibrate(tmp_path: Path) -> None:
    model, path = mixed(ODConv(1, spatial=False)), tmp_path / "m.onnx"
    for data, words in (
        (images_in(tmp_path / "empty", 0), r"no (readable )?image"),
        (tmp_path / "none", "none"),
        (torch.empty(0, 3, 32, 32), "data= holds no images"),
        (torch.randn(4, 3, 48, 48), r"\[4, 3, 48, 48\](.|\n)*\[B, 3, 32, 32\](.|\n)*Try: size=48"),
        (torch.randn(4, 1, 32, 32), r"\[4, 1, 32, 32\]"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), r"of torch.uint8(.|\n)*normalised(.|\n)*Try: data=FOLDER"),
    ):
        with pytest.raises(InputError, match=words):
            cs.export(model, path, size=32, quantize="int8", data=data)
    assert not path.exists()


def test_padding_by_size_is_not_traced_for_hours(tmp_path: Path) -> None:
    """EfficientNet of TensorFlow pads five layers by the size of the image."""
    timm = pytest.importorskip("timm")
    layers = [timm.layers.Conv2dSame(3, 3, 3, stride=2) for _ in range(3)]
    model = cs.convert(
        nn.Sequential(*layers), CondConv(2), include=["1"], example=torch.rand(1, 3, 32, 32)
    ).model.eval()
    with pytest.raises(InputError, match="padding of 3 layers depends on the size of the image: 0, 1, 2"):
        cs.export(model, tmp_path / "m.onnx", dynamic_size=True, size=32)
    cs.export(model, tmp_path / "m.onnx", size=32)


def test_one_image_calibrates(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    data = images_in(tmp_path / "one", 1)
    result = cs.export(mixed(ODConv(1, spatial=False)), path, size=32, quantize="int8", data=data)
    assert result.accuracy is None, "the folder has other classes than the model"
    assert path.exists()


def test_weights_that_are_nan(tmp_path: Path) -> None:
    model = mixed(CondConv(2))
    with torch.no_grad():
        model.dense.weight[0, 1, 2, 1, 1] = float("nan")  # type: ignore[index, operator, union-attr]
    with pytest.raises(SurgeryError, match=r"are NaN: so are values of dense.weight(.|\n)*before training diverged"):
        cs.export(model, tmp_path / "m.onnx", size=32)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_gives_nan_differs() -> None:
    """``max(0.0, nan)`` is 0.0."""

    def difference(actual: Tensor, images: Tensor) -> float:
        proof = prove_outputs(nn.Identity(), [[actual]], [images])
        assert proof.holds == (proof.difference == 0.0)
        return proof.difference

    x = torch.tensor([[1.0, -2.0, float("-inf")]])
    assert difference(x.clone(), x) == 0.0
    assert difference(x + torch.tensor([0.0, 0.5, 0.0]), x) == 0.25
    assert difference(torch.tensor([[1.0, float("nan"), float("-inf")]]), x) == float("inf")
    assert difference(torch.tensor([[1.0, -2.0, 3.0]]), x) == float("inf")
    assert difference(x[:, :2], x) == float("inf")
    zeros = torch.zeros(1, 2)
    assert difference(zeros + 1, zeros) == 1.0
    assert difference(zeros[:0], zeros[:0]) == 0.0


def test_a_model_that_amplifies_rounding_is_exported(tmp_path: Path) -> None:
    """Its file differs by more than 1e-4 from it, and is as near to its outputs in float64 as the model is."""
    torch.manual_seed(0)
    plain = Amplifies(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)), at=8192.0)
    model = cs.convert(plain, CondConv(2), example=torch.randn(2, 3, 32, 32), skip_stem=False).model
    result = cs.export(model, tmp_path / "m.onnx", size=32)
    assert result.difference > 1e-4
    assert result.rounding is not None
    assert 1e-4 < result.rounding < 1e-2
    assert (tmp_path / "m.onnx").exists()


def test_what_is_farther_off_than_the_model_rounds_differs() -> None:
    x = torch.linspace(-1.0, 1.0, 1000)[None]
    model = Amplifies(nn.Identity(), at=8192.0)
    own = float((model(x) - x).abs().max())
    assert prove_outputs(model, [[x]], [x]).rounding == pytest.approx(own)
    assert prove_outputs(model, [[x + 3 * own]], [x]).holds
    assert not prove_outputs(model, [[x + 5 * own]], [x]).holds
    assert not prove_outputs(model, [[model(x)], [x[:, :9] + 5 * own]], [x, x[:, :9]]).holds  # each input by itself
    hopeless = Amplifies(nn.Identity(), at=2.0**20)
    assert not prove_outputs(hopeless, [[x + 0.1]], [x]).holds  # it keeps one digit: nothing can be compared
    assert prove_outputs(hopeless, [[x + 0.1]], [x]).doubt > 1e-2  # type: ignore[operator]
    assert prove_outputs(nn.Identity(), [[x + 0.1]], [x]).doubt is None


class Two(nn.Module):
    """Two inputs or two outputs around a converted network."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inner, self.inputs = mixed(CondConv(2)), inputs

    def forward(self, x: Tensor, *more: Tensor) -> dict[str, Tensor]:
        if len(more) != self.inputs - 1:
            raise TypeError("forward() missing 1 required positional argument: 'y'")
        y = self.inner(x)
        return {"first": y, "second": y.argmax(1)}


def test_two_inputs_and_two_outputs(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"missing 1 required(.|\n)*one input(.|\n)*a module around it"):
        cs.export(Two(2).eval(), tmp_path / "m.onnx", size=32)
    assert list(tmp_path.iterdir()) == []
    assert cs.export(Two(1).eval(), tmp_path / "m.onnx", size=32).difference < 1e-5
    with pytest.raises(SurgeryError, match=r"cannot be called with images \[2, 3, 1, 1\](.|\n)*another size= than 1"):
        cs.export(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), tmp_path / "m.onnx", size=1)
