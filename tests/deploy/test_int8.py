"""INT8 files: which tensors are integers, and the accuracy that is left."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import condconv_surgery as cs
from condconv_surgery.deploy.export_model import metadata_of
from condconv_surgery.deploy.file_accuracy import in_batches
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import CondConv, InputSpec, ODConv, Variant
from condconv_surgery.training import fit_heads
from tests.conftest import Run
from tests.small_networks import mixed
from tests.training.forked import fresh_script

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_onnx.py"


@pytest.mark.parametrize(
    "variant", [ODConv(1, spatial=False), pytest.param(CondConv(2), marks=pytest.mark.slow)], ids=str
)
@torch.no_grad()
def test_convolutions_are_integers_and_routers_are_not(variant: Variant, tmp_path: Path) -> None:
    model, path, images = mixed(variant), tmp_path / "m.onnx", torch.randn(64, 3, 32, 32)
    result = cs.export(model, path, size=32, quantize="int8", data=[(images, model(images).argmax(1))])
    assert set(result.forms.values()) <= {"scale", "sum"}
    assert result.accuracy is not None
    assert result.accuracy[0] == 1.0, "the labels are the model's own"
    assert result.accuracy[1] >= 0.9
    graph = onnx.load(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    kernels = {tensor.name: tensor for tensor in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) >= 4
    for node in convolutions:
        dequantized = made_by[node.input[1]]
        assert dequantized.op_type == "DequantizeLinear"
        assert kernels[dequantized.input[0]].data_type == onnx.TensorProto.INT8
        assert kernels[dequantized.input[1]].dims[0] == kernels[dequantized.input[0]].dims[0], "a scale for each filter"
    for node in graph.node:
        if node.op_type == "Gemm":
            assert kernels[node.input[1]].data_type == onnx.TensorProto.FLOAT
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert metadata["size"] == [3, 32, 32]


def test_what_cannot_be_quantised(tmp_path: Path) -> None:
    model, images = mixed(ODConv(1)), torch.randn(4, 3, 32, 32)
    for options, words in (
        ({"quantize": "int4", "data": images}, "int8"),
        ({"quantize": "int8"}, "data=FOLDER"),
        ({"quantize": "int8", "data": images, "to": "pt2"}, "Only ONNX"),
        ({"quantize": "int8", "data": images, "form": "loop"}, "It takes: scale, sum, taps"),
    ):
        with pytest.raises(cs.InputError, match=words):
            cs.export(model, tmp_path / "m.onnx", size=32, **options)  # type: ignore[arg-type]


def test_the_last_batch_is_filled_up() -> None:
    images = torch.randn(5, 1, 2, 2)
    parts = in_batches(images, 4)
    assert [len(part) for part in parts] == [4, 4]
    assert torch.equal(torch.cat(parts)[:5], images)
    assert in_batches(images, None)[0] is images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "turned", "wide"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_example_sees_what_the_network_was_trained_on(
    channels: int, kind: str, interpolation: str, tmp_path: Path
) -> None:
    size = (32, 48) if kind == "wide" else (32, 32)
    spec = InputSpec(channels, *size, interpolation=interpolation)
    pixels = np.random.default_rng(0).integers(0, 256, (41, 53, 4), dtype=np.uint8)
    image = Image.fromarray(pixels if kind in ("RGBA", "LA") else np.ascontiguousarray(pixels[..., :3]))
    path, exif = tmp_path / ("i.tif" if kind == "CMYK" else "i.png"), Image.Exif()
    if kind == "turned":
        exif[274] = 6
    (image.convert(kind) if kind.isupper() else image).save(path, exif=exif)
    prepared = runpy.run_path(str(EXAMPLE))["prepared"]
    actual = prepared(path, metadata_of(nn.Conv2d(channels, 1, 1), spec))
    torch.testing.assert_close(torch.from_numpy(actual)[0], EvaluationTransform(spec)(Image.open(path)))


def test_the_example_refuses_deep_images(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "i.png")
    with pytest.raises(SystemExit, match="more than 8 bits"):
        runpy.run_path(str(EXAMPLE))["prepared"](tmp_path / "i.png", metadata_of(nn.Conv2d(3, 1, 1), InputSpec()))


def test_a_file_is_measured_and_served(condconv: Run, tmp_path: Path) -> None:
    """Top-1 of model and file on a folder; the example names the class that the model gives."""
    model, generator = mixed(ODConv(1, spatial=False)), np.random.default_rng(0)
    classes = ("a", "b", "c")
    fit_heads(model, classes, InputSpec(height=32, width=32))
    for name in classes:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (40, 52, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    artifact, path = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    cs.save(model, artifact)
    code, out, err = condconv(
        "export",
        artifact,
        "--to",
        "onnx",
        "--batch",
        "1",
        "--trust",
        "tests",
        "--data",
        tmp_path / "images",
        "-o",
        path,
        "--json",
    )
    assert code == 0, err
    top1 = json.loads(out)["top1"]
    assert top1["model"] == top1["file"]
    files = sorted((tmp_path / "images").glob("*/0.png"))
    done = fresh_script(EXAMPLE, path, *files, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    transform = EvaluationTransform(InputSpec(height=32, width=32))
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(file)) for file in files]))
    expected = [f"{file} {classes[int(index)]}" for file, index in zip(files, logits.argmax(1), strict=True)]
    assert done.stdout.splitlines() == expected
