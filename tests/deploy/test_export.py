from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.deploy.file_proof import FileProof
from condconv_surgery.recipe import CondConv, DynamicConv, InputSpec, ODConv, Variant
from condconv_surgery.training import fit_heads
from tests.conftest import Run
from tests.dynamic_batch import dynamic_batch
from tests.exports.one_export import try_export
from tests.small_networks import mixed, small_net
from tests.variant_cases import scramble

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run(path: Path, images: Tensor) -> Tensor:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


slow = pytest.mark.slow  # an export takes seconds
CASES = [
    (CondConv(4), "auto", "kernel"),
    pytest.param(CondConv(4), "loop", "loop", marks=slow),
    pytest.param(ODConv(2), "taps", "sum, taps", marks=slow),
    (ODConv(1, spatial=False), "scale", "scale"),
    pytest.param(ODConv(4), "loop", "loop", marks=slow),
    pytest.param(CondConv(3), "sum", "sum", marks=slow),
    pytest.param(DynamicConv(4), "matmul", "matmul", marks=slow),
    pytest.param(ODConv(1), "auto", "kernel", marks=slow),
    pytest.param(ODConv(4), "auto", "kernel", marks=slow),
    pytest.param(ODConv(4, gates="sigmoid"), "matmul", "matmul", marks=slow),
]


@pytest.mark.parametrize(("variant", "form", "forms"), CASES, ids=str)
@torch.no_grad()
def test_equal_at_every_batch_and_size(variant: Variant, form: str, forms: str, tmp_path: Path) -> None:
    model, path = mixed(variant), tmp_path / "m.onnx"
    result = cs.export(model, path, form=form, dynamic_size=True, size=32)
    assert result.difference < 1e-5
    assert ", ".join(sorted(set(result.forms.values()))) == forms
    assert len(result.shapes) == 7
    for shape in ((1, 3, 32, 32), (5, 3, 48, 80), (2, 3, 33, 47)):
        images = torch.randn(shape)
        torch.testing.assert_close(run(path, images), model(images), rtol=1e-4, atol=1e-5)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert path.stat().st_size < weights * 1.05 + 100_000, "the graph itself, and the weights once"
    assert b".py" not in path.read_bytes(), "no stack traces, which have paths"
    onnx.checker.check_model(str(path))
    if form in ("sum", "scale", "taps"):
        graph = onnx.load(path).graph
        constants = {initializer.name for initializer in graph.initializer}
        assert all(node.input[1] in constants for node in graph.node if node.op_type == "Conv")
    if forms == "kernel":
        assert [node.op_type for node in onnx.load(path).graph.node] == ["Scan"], "the whole graph, image by image"


class Several(nn.Module):
    """Logits, a map, a constant, and on demand a mean over the batch. Its names are those of the loop."""

    def __init__(self, mean: bool = False) -> None:
        super().__init__()
        self.inner, self.mean = mixed(CondConv(2)), mean
        self.image, self.image_axis = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = self.inner(x) * self.image + self.image_axis
        constant = torch.zeros(len(x), 2)
        return (logits, x[:, :1] * 2, constant, *([logits.mean()] if self.mean else []))


@torch.no_grad()
def test_several_outputs_in_a_loop_over_images(tmp_path: Path) -> None:
    model, images = Several().eval(), torch.randn(4, 3, 32, 32)
    cs.export(model, tmp_path / "m.onnx", form="kernel", size=32)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    shapes = [output.shape for output in session.get_outputs()]
    assert shapes == [["batch", 5], ["batch", 1, 32, 32], ["batch", 2]]
    for expected, actual in zip(model(images), session.run(None, {"images": images.numpy()}), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-5)


def test_an_output_without_a_row_for_each_image_is_in_no_loop(tmp_path: Path) -> None:
    with pytest.raises(cs.InputError, match=r"one image at a time(.|\n)*Try: batch=1"):
        cs.export(Several(mean=True).eval(), tmp_path / "m.onnx", form="kernel", size=32)


class BySize(nn.Module):
    """Another function for odd widths, or for small images, as padding to a multiple of a stride is."""

    def __init__(self, decides: str) -> None:
        super().__init__()
        self.inner, self.decides = mixed(CondConv(2)), decides

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2 if self.decides == "odd" else x.shape[-1] < 32:
            x = 1 + x.flip(1)
        y: Tensor = self.inner(x)
        return y


@pytest.mark.parametrize("decides", ["odd", "small"])
@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_a_forward_that_decides_by_the_size(decides: str, to: str, tmp_path: Path) -> None:
    """A graph made at 32 pixels, and right at 64 and 96, would be wrong there."""
    with pytest.raises(cs.SurgeryError, match=r"Nothing was written(.|\n)*Try: dynamic_size=False"):
        cs.export(BySize(decides).eval(), tmp_path / f"m.{to}", to=to, dynamic_size=True, size=32)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_takes_even_sizes_only(tmp_path: Path) -> None:
    class Even(BySize):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] % 32:
                raise ValueError("multiples of 32")
            y: Tensor = self.inner(x)
            return y

    assert len(cs.export(Even("").eval(), tmp_path / "m.onnx", dynamic_size=True, size=32).shapes) == 6


def test_export_draws_no_random_numbers(tmp_path: Path) -> None:
    model, before = mixed(ODConv(2)), torch.get_rng_state()
    cs.export(model, tmp_path / "m.onnx", size=32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("batch", "form"), [(1, "kernel"), pytest.param(4, "grouped", marks=slow)])
@torch.no_grad()
def test_a_fixed_batch(batch: int, form: str, tmp_path: Path) -> None:
    model, path, images = mixed(ODConv(2)), tmp_path / "m.onnx", torch.randn(batch, 3, 32, 32)
    result = cs.export(model, path, form=form, batch=batch, size=32)
    assert result.shapes == ((batch, 3, 32, 32),)
    assert set(result.forms.values()) == {form}
    torch.testing.assert_close(run(path, images), model(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.10 reads its archives so
def test_a_program_that_needs_torch_alone(tmp_path: Path) -> None:
    model, path, images = mixed(CondConv(2)), tmp_path / "m.pt2", torch.randn(5, 3, 32, 32)
    result = cs.export(model, path, to="pt2", size=32)  # proven in a process that cannot import this package
    assert set(result.forms.values()) == {"matmul"}
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)
    assert json.loads(extra["metadata.json"])["size"] == [3, 32, 32]
    for package in (torch, cs):  # no trace of where this machine keeps its packages
        assert str(Path(package.__file__).parent).encode() not in path.read_bytes()


@pytest.mark.parametrize("variant", [CondConv(2), ODConv(2)], ids=str)
@torch.no_grad()
def test_torchs_own_exporter_takes_any_batch(variant: Variant, tmp_path: Path) -> None:
    """ONNX has the groups of a convolution as a constant: the batch cannot be among them."""
    model, path = mixed(variant), tmp_path / "m.onnx"
    torch.onnx.export(
        model,
        (torch.randn(2, 3, 32, 32),),
        path,
        input_names=["images"],
        dynamic_shapes=({0: dynamic_batch()},),
        verbose=False,
    )
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(run(path, images), model(images), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    for variant, options, words in (
        (ODConv(2), {"form": "sum"}, "added by kernel position[^T]*Possible for it: loop, matmul, taps"),
        (CondConv(2), {"form": "grouped"}, "must be fixed(.|\n)*Try: batch=8"),
        (CondConv(2), {"form": "kernel", "batch": 2}, "one image at a time(.|\n)*Try: batch=1"),
        (CondConv(2), {"form": "unfold"}, "Unknown form 'unfold'"),
        (CondConv(2), {"form": "loop", "to": "pt2"}, "not for this runtime(.|\n)*It takes: scale, kernel"),
        (CondConv(2), {"batch": 0}, "batch=1"),
        (CondConv(2), {"to": "tflite"}, "Unknown runtime 'tflite'"),
    ):
        with pytest.raises(cs.InputError, match=words):
            cs.export(mixed(variant), path.with_suffix(f".{options.get('to', 'onnx')}"), size=32, **options)
    path.write_bytes(b"before")
    monkeypatch.setattr(FileProof, "holds", False)
    with pytest.raises(cs.ProofError, match="Nothing was written"):
        cs.export(mixed(CondConv(2)), path, batch=1, size=32)
    with pytest.raises(cs.InputError, match="could not be written"):
        cs.export(mixed(CondConv(2)), tmp_path / "none" / "m.onnx", batch=1, size=32)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"before"


def test_the_command(condconv: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(weights=None, num_classes=3).eval()
    example = torch.randn(2, 3, 64, 64)
    model = cs.convert(plain, CondConv(2), include=["layer4.1.*"], example=example, prove=False).model.eval()
    scramble(model)
    fit_heads(model, ("a", "b", "c"), InputSpec(height=64, width=64))
    artifact, path = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    cs.save(model, artifact)
    code, out, err = condconv("export", artifact, "--to", "onnx", "-o", path, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["difference"] < 1e-4
    assert summary["opset"] == 18
    with torch.no_grad():
        torch.testing.assert_close(run(path, example), cs.load(artifact)(example), rtol=1e-4, atol=1e-4)
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert metadata["classes"] == ["a", "b", "c"]
    assert metadata["size"] == [3, 64, 64]
    assert metadata["variant"]["kind"] == "condconv"
    for arguments, words in (
        (("--to", "tflite", "-o", path), "Unknown runtime"),
        (("-o", path), "--to onnx"),
        (("--to", "onnx", "--layout", "timm", "-o", path), "--to onnx"),
        (("--to", "onnx", "-o", tmp_path / "m.safetensors"), ".onnx"),
        (("--to", "onnx", "--form", "scale", "-o", path), "--form auto"),
        (("--to", "pt2", "--form", "kernel", "-o", tmp_path / "m.pt2"), "--batch 1"),
        (("--layout", "timm", "--batch", "1", "-o", tmp_path / "m.safetensors"), "--to onnx"),
    ):
        code, _, err = condconv("export", artifact, *arguments)
        assert code == 2, err
        assert words in err


def test_a_plain_network_is_exported_too(tmp_path: Path) -> None:
    result = cs.export(small_net(), tmp_path / "m.onnx", size=16)
    assert result.forms == {}


def test_latency_of_the_file_against_the_original(condconv: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(weights=None, num_classes=3).eval()
    example = torch.randn(2, 3, 32, 32)
    model = cs.convert(plain, CondConv(2), include=["layer4.0.downsample.0"], example=example, prove=False).model
    fit_heads(model, ("a", "b", "c"), InputSpec(height=32, width=32))
    artifact = tmp_path / "m.safetensors"
    cs.save(model, artifact)
    code, out, err = condconv("report", artifact, "--runtime", "onnx", "--json")
    assert code == 0, err
    (rows,) = json.loads(out).values()
    assert [row["batch"] for row in rows] == [1, 32]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["median"] / row["original"])
        assert row["repeats"] >= 5
        assert row["forms"] == {"matmul": 1}
    code, out, err = condconv("report", artifact, "--runtime", "pt2")
    assert code == 0, err
    assert "batch 32" in out
    code, _, err = condconv("report", artifact, "--runtime", "tensorrt")
    assert code == 2
    assert "--runtime onnx" in err
    for unused in (("--html", tmp_path / "r.html"), ("--batch", "8"), ("--csv",), ("--data", tmp_path)):
        code, _, err = condconv("report", artifact, "--runtime", "onnx", *unused)
        assert (code, unused[0] in err) == (2, True), "it would do without what was asked for"
    cs.save(cs.fold(model, example=example).model, artifact)
    code, _, err = condconv("report", artifact, "--runtime", "onnx")
    assert code == 2
    assert "folded" in err


@slow
def test_a_whole_network() -> None:
    """A part of the table of exports (``python -m tests.exports``)."""
    row = try_export("resnet18", "CondConv 4", "onnx")
    assert not row.failure
    assert row.difference < 1e-4
    assert row.ratio < 1.05
    assert row.inputs == 7


@slow
@pytest.mark.parametrize(
    ("network", "include", "to"),
    [
        ("deeplabv3_mobilenet_v3_large", "classifier.0.*", "onnx"),
        ("lraspp_mobilenet_v3_large", "classifier.*", "pt2"),
        pytest.param("fcn_resnet50", "classifier.0", "pt2", marks=slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.10 reads its archives so
def test_segmentation_networks(network: str, include: str, to: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build = getattr(torchvision.models.segmentation, network)
    plain = build(weights=None, weights_backbone=None, num_classes=5)
    options = {"include": [include], "example": torch.randn(2, 3, 64, 64), "prove": False}
    model = cs.convert(plain.eval(), CondConv(2), **options).model.eval()
    scramble(model)
    path, images = tmp_path / f"m.{to}", torch.randn(5, 3, 64, 96)
    result = cs.export(model, path, to=to, size=64, dynamic_size=True)
    assert result.forms
    with torch.no_grad():
        actual = run(path, images) if to == "onnx" else torch.export.load(path).module()(images)["out"]
        expected = model(images)["out"]
        assert float((actual - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_what_torch_cannot_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A decision by values, as in the non-maximum suppression of torchvision's detectors: one error, and no graph."""

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mixed(CondConv(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y * 2 if y.sum() > 0 else y

    with pytest.raises(cs.SurgeryError, match="ONNX cannot take the model"):
        cs.export(Deciding().eval(), tmp_path / "m.onnx", size=32)
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []
