"""Files for the runtimes that ``make integrations`` installs, each run in its runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import condconv_surgery as cs
from condconv_surgery.deploy.export_model import RUNTIMES
from condconv_surgery.deploy.file_latency import file_latency
from condconv_surgery.models.artifact.atomic_write import FullDiskError
from condconv_surgery.recipe import CondConv, ODConv, Variant
from tests.conftest import Run
from tests.exports.one_export import try_export
from tests.small_networks import mixed

CASES = [
    ("openvino", CondConv(4), {"dynamic_size": True}, ["kernel"]),
    ("openvino", ODConv(1), {}, ["kernel"]),
    ("openvino", CondConv(4), {"form": "matmul"}, ["matmul"]),
    ("openvino", ODConv(4), {"batch": 1}, ["kernel"]),
    ("openvino", ODConv(4), {"form": "taps"}, ["sum", "taps"]),
    ("ncnn", CondConv(4), {}, ["sum"]),
    ("ncnn", ODConv(1, spatial=False), {}, ["scale"]),
    ("ncnn", ODConv(4), {}, ["sum", "taps"]),
    ("litert", CondConv(4), {}, ["sum"]),
    ("litert", ODConv(1, spatial=False), {"batch": 2}, ["scale"]),
    ("litert", ODConv(4), {}, ["sum", "taps"]),
]


def require(runtime: str) -> None:
    for package in RUNTIMES[runtime].packages:
        pytest.importorskip(package)


@pytest.mark.parametrize(("to", "variant", "options", "forms"), CASES, ids=str)
def test_a_file_computes_what_the_model_computes(
    to: str, variant: Variant, options: dict[str, Any], forms: list[str], tmp_path: Path
) -> None:
    require(to)
    runtime, model = RUNTIMES[to], mixed(variant)
    path = tmp_path / f"m{runtime.suffix}"
    result = cs.export(model, path, to=to, size=32, **options)
    assert sorted(set(result.forms.values())) == forms
    assert result.difference < 1e-5
    images = torch.randn(options.get("batch") or (1 if runtime.fixed_batch else 5), 3, 32, 32)
    ((output,),) = runtime.run(path, [images])
    with torch.no_grad():
        torch.testing.assert_close(output, model(images), rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("to", "batches"), [("openvino", [1, 32]), ("litert", [1]), ("ncnn", [1])])
def test_latency_in_a_runtime(to: str, batches: list[int]) -> None:
    require(to)
    rows = file_latency(mixed(ODConv(4)), to=to, size=32, seconds=0.1)
    assert [row.batch for row in rows] == batches
    assert all(row.ratio == row.median / row.original > 0 for row in rows)
    assert set(rows[0].forms) == ({"kernel"} if to == "openvino" else {"sum", "taps"})


@pytest.mark.parametrize("to", ["openvino", "ncnn"])
def test_a_full_disk(to: str, small_disk: Path) -> None:
    require(to)
    path = small_disk / f"m{RUNTIMES[to].suffix}"
    with pytest.raises(FullDiskError, match="Try: another path, or free some space"):
        cs.export(mixed(CondConv(10)), path, to=to, batch=1, size=32)
    assert list(small_disk.iterdir()) == []


def test_openvino_keeps_the_metadata(tmp_path: Path) -> None:
    require("openvino")
    import openvino

    cs.export(mixed(CondConv(2)), tmp_path / "m.xml", to="openvino", size=32)
    model = openvino.Core().read_model(tmp_path / "m.xml")
    assert json.loads(model.get_rt_info(["condconv", "size"]).astype(str)) == [3, 32, 32]


def test_what_a_runtime_cannot_take(condconv: Run, tmp_path: Path) -> None:
    require("ncnn")
    model, artifact, path = mixed(CondConv(2)), tmp_path / "m.safetensors", tmp_path / "m.param"
    with pytest.raises(cs.InputError, match="It takes: scale, sum, taps"):
        cs.export(model, path, to="ncnn", form="matmul", size=32)
    with pytest.raises(cs.InputError, match="takes one size"):
        cs.export(model, path, to="ncnn", dynamic_size=True, size=32)
    with pytest.raises(cs.SurgeryError, match="one image at a time"):
        cs.export(model, path, to="ncnn", batch=2, size=32)
    cs.save(model, artifact)
    code, _, err = condconv("export", artifact, "--to", "ncnn", "--form", "loop", "--trust", "tests", "-o", path)
    assert code == 2, err
    assert "--form auto" in err
    assert not path.exists()


@pytest.mark.parametrize("runtime", ["openvino", "ncnn", "litert"])
@pytest.mark.parametrize(
    ("network", "variant"), [("mobilenet_v3_small", "CondConv 4"), ("resnet18", "ODConv 1, no spatial")]
)
def test_a_whole_network(runtime: str, network: str, variant: str) -> None:
    require(runtime)
    row = try_export(network, variant, runtime)
    assert not row.failure
    assert row.ratio < 1.05
