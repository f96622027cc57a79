"""Artifacts whose experts are stored in bfloat16 or int8: sizes, errors in closed form, and files that were altered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.layers import ConditionalConv2d, conditional_layers, conditional_like
from condconv_surgery.models.artifact.container import read_rounded
from condconv_surgery.runtime.tensor_hash import hash_tensors
from tests.conftest import Run
from tests.small_networks import mixed, small_net
from tests.variant_cases import EVERY_VARIANT, scramble

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PRECISIONS = ("bfloat16", "int8")


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(weights=None)
    model = cs.convert(plain, cs.CondConv(experts=4), example=X, include=["layer[34].*"], prove=False).model.eval()
    scramble(model)
    return model


def stored_in(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def allowed_error(weight: Tensor, precision: str) -> Tensor:
    """The largest error of each weight: half a step of its filter, or 2**-9 of the power of two above the weight."""
    if precision == "int8":
        scale = weight.flatten(2).abs().amax(2)[:, :, None, None, None] / 127
        return scale * (0.5 + 1e-5)  # and the rounding of float32
    return weight.abs() * 2**-8


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
def test_errors_are_within_half_a_step(variant: Any, precision: str, tmp_path: Path) -> None:
    model, path = mixed(variant), tmp_path / "m.safetensors"
    layers = conditional_layers(model)
    with torch.no_grad():
        layers["dense"].weight[0, 0] = 0  # a filter without a scale
        layers["dense"].weight[0, 1] *= 1e4  # of its own scale
    record = cs.save(model, path, precision=precision)  # type: ignore[arg-type]
    loaded, expected = cs.load(path, trust=["tests"]).state_dict(), model.state_dict()
    names = {f"{name}.weight" for name in layers}
    assert record.dtypes == dict.fromkeys(names, "float32")
    assert read_rounded(path) == record
    largest = 0.0
    for name, tensor in loaded.items():
        assert tensor.dtype == expected[name].dtype
        if name not in names:
            assert torch.equal(tensor, expected[name]), "routers, biases and plain layers stay exact"
            continue
        gap = (tensor - expected[name]).abs()
        assert (gap <= allowed_error(expected[name], precision)).all()
        assert float(gap.max()) > 0
        largest = max(largest, float(gap.max()))
    assert record.error == largest
    assert torch.equal(loaded["dense.weight"][0, 0], torch.zeros(16, 3, 3))


def test_the_scale_is_that_of_a_filter_of_an_expert(tmp_path: Path) -> None:
    """Weights that are whole multiples of their filter's step are stored exactly, whatever the other filters have."""
    layer = conditional_like(nn.Conv2d(4, 3, 3), cs.CondConv(experts=2))
    steps = torch.tensor([[1.0, 2.0**-10, 2.0**10], [0.5, 4.0, 2.0**-20]])[:, :, None, None, None]
    whole = torch.randint(-127, 128, layer.weight.shape, generator=torch.Generator().manual_seed(0)).float()
    whole[:, :, 0, 0, 0] = 127
    with torch.no_grad():
        layer.weight.copy_(whole * steps)
    record = cs.save(nn.Sequential(layer), tmp_path / "m.safetensors", precision="int8")
    _, tensors = stored_in(tmp_path / "m.safetensors")
    assert torch.equal(tensors["0.weight"], whole.to(torch.int8))
    assert torch.equal(tensors["0.weight.scale"], steps[:, :, 0, 0, 0])
    assert record.error == 0
    assert torch.equal(cs.load(tmp_path / "m.safetensors")[0].weight, layer.weight)


@pytest.mark.parametrize(("precision", "bytes_of_a_value"), [("bfloat16", 2), ("int8", 1)])
def test_the_size_of_the_file(resnet: nn.Module, precision: str, bytes_of_a_value: int, tmp_path: Path) -> None:
    cs.save(resnet, tmp_path / "whole.safetensors")
    cs.save(resnet, tmp_path / "small.safetensors", precision=precision)  # type: ignore[arg-type]
    (_, whole), (_, small) = (stored_in(tmp_path / f"{name}.safetensors") for name in ("whole", "small"))
    experts = {f"{name}.weight" for name in conditional_layers(resnet)}
    for name, tensor in small.items():
        expected = whole[name].numel() * bytes_of_a_value if name in experts else None
        assert name.endswith(".weight.scale") or tensor.nbytes == (expected or whole[name].nbytes)
    scales = sum(tensor.nbytes for name, tensor in small.items() if name.endswith(".scale"))
    assert scales == (0 if precision == "bfloat16" else sum(4 * whole[name][:, :, 0, 0, 0].numel() for name in experts))
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("small", "whole")]
    assert sizes[0] < sizes[1] * (0.28 if precision == "int8" else 0.52), "experts are 97% of this model"


@torch.no_grad()
def test_outputs_stay_near(resnet: nn.Module, tmp_path: Path) -> None:
    expected = resnet(X)
    for precision, limit in (("bfloat16", 0.02), ("int8", 0.1)):
        cs.save(resnet, tmp_path / "m.safetensors", precision=precision)  # type: ignore[arg-type]
        loaded = cs.load(tmp_path / "m.safetensors")
        gap = float((loaded(X) - expected).abs().max() / expected.abs().max())
        assert 0 < gap < limit
        assert next(loaded.parameters()).requires_grad, "it is trained, folded and exported as any other"


def test_a_model_of_half_precision_and_a_shared_layer(tmp_path: Path) -> None:
    layer = conditional_like(nn.Conv2d(4, 4, 3, padding=1), cs.CondConv(experts=2))
    scramble(layer)
    model, path = nn.Sequential(layer, nn.ReLU(), layer).eval().half(), tmp_path / "m.safetensors"
    record = cs.save(model, path, precision="int8")
    assert record.dtypes == {"0.weight": "float16"}
    loaded = cs.load(path)
    assert loaded[0] is loaded[2]
    assert loaded[0].weight.dtype == torch.float16
    bound = allowed_error(layer.weight.float(), "int8") + layer.weight.float().abs() * 2**-11
    assert ((loaded[0].weight.float() - layer.weight.float()).abs() <= bound).all()


def test_what_cannot_be_rounded(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for model in (small_net(), mixed(cs.CondConv(2)).half()):
        with pytest.raises(InputError, match=r'no experts would get smaller(.|\n)*precision="exact"'):
            cs.save(model, path, precision="bfloat16")
    model = mixed(cs.CondConv(2))
    with torch.no_grad():
        model.dense.weight[1, 2, 3, 1, 1] = float("nan")  # type: ignore[index, operator, union-attr]
    with pytest.raises(InputError, match=r"dense\.weight has values that are NaN"):
        cs.save(model, path, precision="int8")
    assert list(tmp_path.iterdir()) == []
    cs.save(model, path, precision="exact")


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


@pytest.mark.parametrize(
    "change",
    {
        "no error": lambda tensors, record: record.pop("error"),
        "a list": lambda tensors, record: record.update(dtypes=[1]),
        "a name that is not there": lambda tensors, record: record["dtypes"].update(nothing="float32"),
        "a dtype that is none": lambda tensors, record: record["dtypes"].update({"dense.weight": "load"}),
        "no scale": lambda tensors, record: tensors.pop("dense.weight.scale"),
        "a scale of another shape": lambda tensors, record: tensors.update({"dense.weight.scale": torch.ones(2)}),
        "a record that lacks one": lambda tensors, record: record["dtypes"].pop("dense.weight"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_changed_record_is_damaged(change: tuple[str, Change], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    cs.save(mixed(cs.CondConv(2)), path, precision="int8")
    metadata, tensors = stored_in(path)
    record = json.loads(metadata["rounded"])
    change[1](tensors, record)
    digest = hash_tensors(tensors, headers=False)
    save_file(tensors, path, {**metadata, "rounded": json.dumps(record), "tensors_sha256": digest})
    with pytest.raises(DamagedFileError):
        cs.load(path, trust=["tests"])


def test_the_command(condconv: Run, resnet: nn.Module, tmp_path: Path) -> None:
    whole, small = tmp_path / "m.safetensors", tmp_path / "small.safetensors"
    cs.save(resnet, whole)
    code, out, err = condconv("share", whole, "--int8", "-o", small, "--json")
    assert code == 0, err
    summary = json.loads(out)
    record = read_rounded(small)
    assert record is not None
    assert (summary["experts"], summary["base"], summary["weight_error"]) == ("int8", None, record.error)
    assert summary["bytes"] < 0.28 * summary["bytes_of_model"]
    code, _, err = condconv("share", whole, "--bf16", "-o", tmp_path / "folder")
    assert code == 0, err
    assert "Experts     in bfloat16" in err
    assert "experts in bfloat16; weights off by at most" in (tmp_path / "folder" / "README.md").read_text()
    code, _, err = condconv("share", whole, "--int8", "--bf16", "-o", small)
    assert code == 2
    layers = [layer for layer in cs.load(small).modules() if isinstance(layer, ConditionalConv2d)]
    assert len(layers) == 10
    plain = tmp_path / "plain.safetensors"
    cs.save(cs.load_model("torchvision:shufflenet_v2_x0_5", weights="none"), plain)
    code, _, err = condconv("share", plain, "--int8", "-o", small)
    assert code == 2
    assert "--int8: no experts would get smaller" in err
    assert "leave --bf16 and --int8 out" in err
