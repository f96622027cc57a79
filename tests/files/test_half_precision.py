"""A file in half precision is converted in float32 and stored as it came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from condconv_surgery.cli.main import app
from torch import nn

import condconv_surgery as cs
from condconv_surgery.models.half_precision import to_dtypes, to_float32
from condconv_surgery.models.sources import load_model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_command_converts_in_float32_and_stores_as_it_came(
    dtype: torch.dtype, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    original = torchvision.models.shufflenet_v2_x0_5(weights=None).to(dtype)
    torch.save(original.state_dict(), tmp_path / "m.pt")
    command = ["convert", str(tmp_path / "m.pt"), "--experts", "2", "--input-size", "64"]
    app([*command, "--include", "stage2*", "-o", str(tmp_path / "m.safetensors")], standalone_mode=False)
    said = capfd.readouterr().err
    assert f"Stored      in {str(dtype).removeprefix('torch.')}, as it came" in said
    difference = float(said.partition("Difference  eval: ")[2].split()[0])
    assert difference < 1e-4  # of float32
    model = cs.load(tmp_path / "m.safetensors")
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.float()(x), original.float().eval()(x), atol=1e-3, rtol=0)


def test_each_tensor_gets_its_dtype_back() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=False).half(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
    )
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    dtypes = to_float32(net)
    assert dtypes == {"1.weight": torch.float16}
    model = cs.convert(net, cs.CondConv(experts=2), example=torch.randn(2, 3, 16, 16)).model
    to_dtypes(model, dtypes)
    halves = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float16}
    assert halves == {"1.weight", "1.router.linear.weight", "1.router.linear.bias"}
    assert all(torch.equal(expert, before["1.weight"]) for expert in model[1].weight)


MIXED = {
    "kernels in bfloat16": (4, torch.bfloat16, "bfloat16 and float32", torch.float32),
    "weights in float64": (2, torch.float64, "float32 and float64", torch.float64),
}


@pytest.mark.parametrize("kind", MIXED)
def test_several_dtypes_become_the_one_that_holds_all(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dims, dtype, names, common = MIXED[kind]
    original = torchvision.models.shufflenet_v2_x0_5(weights=None)
    state = {name: t.to(dtype) if t.dim() == dims else t for name, t in original.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    model = load_model(tmp_path / "m.pt")
    assert f"weights in {names}: all are taken in {str(common).removeprefix('torch.')}" in caplog.text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype))
        assert tensor.dtype == (common if state[name].is_floating_point() else torch.int64)
    assert model(torch.zeros(1, 3, 64, 64, dtype=common)).dtype == common
