"""Each function takes a compiled, parallel or averaged model as the model inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

import condconv_surgery as cs
from condconv_surgery.models.layouts.layout_registry import LAYOUTS, PLAIN, write_layout
from tests.images import write_images
from tests.small_networks import small_net

EXAMPLE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
RUN = {"data": {"workers": 0, "image_size": 16, "batch_size": 4}, "schedule": {"epochs": 1}}

Wrap = Callable[[nn.Module], nn.Module]

WRAPPERS: dict[str, Wrap] = {
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "two": lambda m: torch.compile(AveragedModel(m), backend="eager"),
}

every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return cs.convert(net, cs.CondConv(experts=2), example=EXAMPLE).model.eval()


@every_wrapper
def test_what_is_saved_is_the_model_inside(model: nn.Module, wrap: Wrap, tmp_path: Path) -> None:
    cs.save(wrap(model), tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))
    cs.save_pretrained(wrap(model), tmp_path / "folder")
    assert torch.equal(cs.load(tmp_path / "folder")(EXAMPLE), model(EXAMPLE))


@every_wrapper
def test_what_is_deployed_is_the_model_inside(
    model: nn.Module, wrap: Wrap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYOUTS, "plain", PLAIN)
    results = {
        "fold": cs.fold(wrap(model), example=EXAMPLE).model,
        "collapse": cs.collapse(wrap(model), EXAMPLE).model,
        "round_experts": cs.round_experts(wrap(model), "bfloat16").model,
    }
    assert {name: type(result) for name, result in results.items()} == dict.fromkeys(results, type(model))
    cs.export(wrap(model), tmp_path / "m.pt2", to="pt2", size=16)  # which compares the file's outputs itself
    assert (tmp_path / "m.pt2").exists()
    assert write_layout(wrap(model), "plain", tmp_path / "plain.safetensors").keys() == model.state_dict().keys()
    assert cs.report(wrap(model), inputs=EXAMPLE).title == cs.report(model, inputs=EXAMPLE).title


@every_wrapper
def test_what_a_run_trains_is_the_model_inside(model: nn.Module, wrap: Wrap, tmp_path: Path) -> None:
    folder, wrapped = write_images(tmp_path / "data", each=4), wrap(model)
    cs.finetune(wrapped, RUN, data=folder, output=tmp_path / "run", progress=False)
    loaded = cs.load(tmp_path / "run" / "last.safetensors")
    inside = next(m for m in wrapped.modules() if type(m) is type(model))
    assert torch.equal(loaded(EXAMPLE), inside.eval()(EXAMPLE))


def test_a_model_compiled_in_place_is_saved_as_it_is(tmp_path: Path) -> None:
    model = cs.convert(small_net(), cs.CondConv(experts=2), example=EXAMPLE).model.eval()
    expected = model(EXAMPLE)
    model.compile(backend="eager")
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors", trust="tests")
    assert loaded._compiled_call_impl is None
    assert torch.equal(loaded(EXAMPLE), expected)
