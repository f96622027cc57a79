"""Delta files: what a model has and its base has not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.artifact.container import read_delta
from condconv_surgery.models.sources import load_model
from condconv_surgery.runtime.tensor_hash import hash_tensors
from tests.conftest import Run

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = "torchvision:shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "base.pt"
    torch.save(torchvision.models.shufflenet_v2_x0_5(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(base: Path) -> nn.Module:
    """Converted, with experts, routers, a norm and a plain convolution moved as by a run; a new head."""
    model = cs.convert(load_model(base), cs.CondConv(experts=4), example=X, exclude=["conv5.*"]).model
    torch.manual_seed(1)
    model.fc = nn.Linear(1024, 9)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.startswith(("stage3", "conv5", "stage2.0.branch1.1")):
                tensor.add_(0.01 * torch.randn_like(tensor))
    return model.eval()


def test_a_fresh_conversion_is_a_few_routers(base: Path, tmp_path: Path) -> None:
    model = cs.convert(load_model(base), cs.CondConv(experts=4), example=X).model
    cs.save(model, tmp_path / "whole.safetensors")
    record = cs.save(model, tmp_path / "delta.safetensors", base=base)
    assert record.error == 0
    assert (record.base, len(record.repeated)) == ("base.pt", 55)
    with safe_open(tmp_path / "delta.safetensors", "pt") as file:
        assert all(".router." in name for name in file.keys())  # noqa: SIM118
    sizes = [(tmp_path / f"{kind}.safetensors").stat().st_size for kind in ("delta", "whole")]
    assert sizes[0] < 0.08 * sizes[1]
    loaded = cs.load(tmp_path / "delta.safetensors", base=base)
    assert torch.equal(loaded(X), model.eval()(X))


def test_an_exact_delta_is_bit_identical(base: Path, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    record = cs.save(trained, path, base=base)
    assert (record.error, record.rounded) == (0, {})
    loaded = cs.load(path, base=load_model(base))
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert read_delta(path) == record


def test_rounded_differences_are_off_by_what_is_stated(base: Path, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    cs.save(trained, tmp_path / "exact.safetensors", base=base)
    record = cs.save(trained, path, base=base, precision="bfloat16")
    loaded = cs.load(path, base=base)
    expected = trained.state_dict()
    gaps = {name: float((tensor - expected[name]).abs().max()) for name, tensor in loaded.state_dict().items()}
    assert max(gaps.values()) == record.error
    assert 0 < record.error < 0.05 * 2**-8  # 8 bits of the largest difference
    off = {name for name, gap in gaps.items() if gap}
    assert off <= record.rounded.keys()
    assert {"stage3.0.branch1.0.weight", "conv5.0.weight"} <= off
    assert not any("router" in name or name.endswith("bias") for name in off)
    assert path.stat().st_size < 0.6 * (tmp_path / "exact.safetensors").stat().st_size
    torch.testing.assert_close(loaded(X), trained(X), atol=1e-3, rtol=0)


def test_routers_stay_exact_over_a_base_that_is_converted_too(trained: nn.Module, tmp_path: Path) -> None:
    tuned = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    record = cs.save(tuned, tmp_path / "d.safetensors", base=trained, precision="bfloat16")
    assert record is not None
    assert record.error > 0
    loaded = dict(cs.load(tmp_path / "d.safetensors", base=trained).named_parameters())
    routers = {name: tensor for name, tensor in tuned.named_parameters() if ".router." in name}
    assert routers
    assert all(torch.equal(loaded[name], tensor) for name, tensor in routers.items())


def test_a_converted_linear_and_a_bias(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = cs.convert(net, cs.CondConv(experts=2), example=X, classifier=True).model.eval()
    for changed in (False, True):
        if changed:
            with torch.no_grad():
                model[4].weight[0].add_(1), model[1].bias[1].add_(1)
        for precision in ("exact", "bfloat16"):
            record = cs.save(model, tmp_path / "m.safetensors", base=net, precision=precision)
            assert ("4.weight" in record.repeated) == (not changed)
            torch.testing.assert_close(cs.load(tmp_path / "m.safetensors", base=net)(X), model(X))


@pytest.mark.parametrize("precision", ["exact", "bfloat16"])
def test_a_model_of_another_dtype(base: Path, trained: nn.Module, tmp_path: Path, precision: str) -> None:
    half = copy.deepcopy(trained).bfloat16()
    record = cs.save(half, tmp_path / "m.safetensors", base=base, precision=precision)
    loaded = cs.load(tmp_path / "m.safetensors", base=base).state_dict()
    for name, tensor in half.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        torch.testing.assert_close(loaded[name], tensor, atol=record.error, rtol=0)


def test_the_base_is_found_by_its_name(
    base: Path, trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    state = torch.load(base, weights_only=True)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: state)
    assert cs.save(trained, path, base=SMALL).base == SMALL
    for loaded in (cs.load(path), load_model(path)):
        assert torch.equal(loaded(X), trained(X))


def all_moved(model: nn.Module) -> nn.Module:
    moved = copy.deepcopy(model)
    moved.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})
    return moved


def test_a_base_that_cannot_be_fetched_or_is_another(base: Path, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    cs.save(trained, path, base=base)
    with pytest.raises(InputError, match=r'differences from base.pt, which is needed(.|\n)*base="FILE"'):
        cs.load(path)
    with pytest.raises(InputError, match="has other weights"):
        cs.load(path, base=torchvision.models.shufflenet_v2_x0_5(weights=None))
    with pytest.raises(InputError, match="has none of the model's"):
        cs.save(trained, path, base=nn.Linear(2, 2))
    other = torchvision.models.shufflenet_v2_x0_5(weights=None)
    with pytest.raises(InputError, match=r'All \d+ tensors of the model differ(.|\n)*precision="bfloat16"'):
        cs.save(all_moved(other), path, base=other)
    with pytest.raises(InputError, match=r'with base=(.|\n)*precision="bfloat16"'):
        cs.save(trained, path, base=base, precision="int8")
    with pytest.raises(InputError, match="must be one of: exact, bfloat16, int8"):
        cs.save(trained, path, base=base, precision="int4")


Change = Callable[[dict[str, Tensor], dict], object]


@pytest.mark.parametrize(
    "change",
    {
        "a list": lambda tensors, delta: delta.update(equal=1),
        "no name": lambda tensors, delta: delta.pop("base"),
        "a name that is not there": lambda tensors, delta: delta["equal"].append("nothing"),
        "a shape that is none": lambda tensors, delta: delta["repeated"].update({"conv1.0.weight": [3, 7]}),
        "a difference of another shape": lambda tensors, delta: delta["rounded"].update({"conv1.0.weight": "float32"}),
        "a dtype that is none": lambda tensors, delta: delta["rounded"].update(dict.fromkeys(delta["rounded"], "load")),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_changed_record_is_damaged(
    change: tuple[str, Change], base: Path, trained: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    cs.save(trained, path, base=base, precision="bfloat16")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    delta = json.loads(metadata["delta"])
    change[1](tensors, delta)
    digest = hash_tensors(tensors, headers=False)
    save_file(tensors, path, {**metadata, "delta": json.dumps(delta), "tensors_sha256": digest})
    with pytest.raises(DamagedFileError, match="delta"):
        cs.load(path, base=base)


def test_a_base_of_a_trusted_package_is_shared_from(
    condconv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--trust`` is for the base, too, and ``save`` takes it."""
    (tmp_path / "pkg_of_base.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trust = ("pkg_of_base",)
    whole, base = tmp_path / "whole.safetensors", tmp_path / "base.safetensors"
    net = load_model("pkg_of_base:net", trust=trust)
    cs.save(net, base)
    cs.save(cs.convert(net, cs.CondConv(experts=2), example=X).model, whole)
    for output in ("delta.safetensors", "folder"):
        code, _, err = condconv("share", whole, "--trust", *trust, "--base", base, "-o", tmp_path / output)
        assert code == 0, err
    with pytest.raises(InputError, match="pkg_of_base"):
        cs.save(cs.load(whole, trust=trust), tmp_path / "other.safetensors", base=base)
