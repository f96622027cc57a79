"""A variant from outside of the package goes wherever the package's own go."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, conditional_layers, conditional_like, routed_blocks
from condconv_surgery.layers.router_base import ROUTERS
from condconv_surgery.recipe import VARIANTS, CondConv, UnknownVariantError, Variant, make_variant, variant
from tests.training.forked import fresh_command, fresh_python
from tests.variant_cases import scramble

ROOT = Path(__file__).parents[2]
HOME = "tests.layers.outside_variant"


@pytest.fixture
def outside() -> Iterator[ModuleType]:
    """The module that registers the variant, forgotten again after the test."""
    module = importlib.import_module(HOME)
    try:
        yield module
    finally:
        del VARIANTS["softmaxconv"], ROUTERS[module.SoftmaxConv], sys.modules[HOME]


def network() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1))
    return nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def test_it_is_converted_trained_copied_and_saved(outside: ModuleType, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 10, 10)
    conversion = cs.convert(network(), outside.SoftmaxConv(experts=3, sharpness=2.0), example=x, classifier=True)
    model = conversion.model
    assert conversion.difference is not None  # the proof ran and passed
    assert list(conditional_layers(model)) == ["1.0", "1.3", "4"]
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    scramble(model)
    expected = copy.deepcopy(model).eval()(x)
    assert torch.equal(model.eval()(x), expected)
    cs.save(model, tmp_path / "m.safetensors")
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(x), expected)


def test_another_process_loads_it_when_its_package_is_trusted(outside: ModuleType, tmp_path: Path) -> None:
    path, x = tmp_path / "m.safetensors", torch.ones(1, 3, 10, 10)
    model = cs.convert(network(), outside.SoftmaxConv(experts=3), example=x).model.eval()
    scramble(model)
    cs.save(model, path)
    code = (
        "import sys, torch, condconv_surgery as cs;"
        "print(cs.load(sys.argv[1], {})(torch.ones(1, 3, 10, 10)).sum().item())"
    )
    trusting = fresh_python(code.format("trust=['tests']"), path, folder=ROOT)
    assert float(trusting.stdout) == pytest.approx(model(x).sum().item(), rel=1e-5), trusting.stderr
    refused = fresh_python(code.format("trust=[]"), path, folder=ROOT)
    assert "UnknownVariantError" in refused.stderr
    assert f"import {HOME}, or trust=" in refused.stderr


def test_the_command_line_finds_it_by_its_module(tmp_path: Path) -> None:
    model = ["torchvision:squeezenet1_1", "--weights", "none", "--input-size", "64", "-o", tmp_path / "m.safetensors"]
    command = ["convert", *model, "--json", "--variant", f"{HOME}:softmaxconv"]
    done = fresh_command(*command, "--trust", "tests", folder=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["variant"] == "softmaxconv"
    untrusted = fresh_command(*command, folder=ROOT)
    assert untrusted.returncode == 2
    assert "must be trusted" in untrusted.stderr


def test_the_layer_is_the_general_one_or_a_subclass(outside: ModuleType) -> None:
    plain = nn.Conv2d(4, 6, 3)
    assert type(conditional_like(plain, outside.SoftmaxConv())) is ConditionalConv2d
    assert type(conditional_like(plain, CondConv())).__name__ == "CondConv2d"


def test_a_variant_without_a_router_says_what_to_write() -> None:
    @variant("unrouted")
    @dataclass(frozen=True)
    class Unrouted(Variant):
        pass

    try:
        with pytest.raises(InputError, match=r"Unrouted has no router(.|\n)*CondConv, (.|\n)*@router_for\(Unrouted\)"):
            conditional_like(nn.Conv2d(4, 4, 3), Unrouted())
    finally:
        del VARIANTS["unrouted"]


def test_a_variant_without_a_name_says_what_to_write() -> None:
    @dataclass(frozen=True)
    class Unnamed(CondConv):
        pass

    with pytest.raises(InputError, match=r"Unnamed has no name(.|\n)*@variant\(\"unnamed\"\)"):
        conditional_like(nn.Conv2d(4, 4, 3), Unnamed())


def test_a_name_is_given_once() -> None:
    with pytest.raises(InputError, match="'condconv' is registered twice"):

        @variant("condconv")
        @dataclass(frozen=True)
        class Another(Variant):
            pass

    assert VARIANTS["condconv"] is CondConv


def test_a_module_is_imported_only_if_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownVariantError, match=r'trust=\["nosuch"\]'):
        make_variant("nosuch.variants:mine")
    with pytest.raises(UnknownVariantError, match="cannot be imported: No module named 'nosuch'"):
        make_variant("nosuch.variants:mine", trust=("nosuch",))


def test_a_block_can_route_by_it(outside: ModuleType) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(self.first(x).relu())

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Block())
    converted = cs.convert(model, outside.SoftmaxConv(routing="block"), example=torch.randn(2, 3, 6, 6)).model
    assert list(routed_blocks(converted)) == ["1"]
