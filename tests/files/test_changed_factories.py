"""A model of a user's factory that was changed after it was built is saved as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact.container import read_recipe
from condconv_surgery.recipe import attach_recipe, recipe_of

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.act, self.fc = nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.act(self.stem(x)))))
        return self.fc(self.scale * x.mean((2, 3)))


class WithLambda(Net):
    """Cannot be described: only its factory rebuilds it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = lambda x: x


def make() -> nn.Module:
    return Net()


def make_with_lambda() -> nn.Module:
    return WithLambda()


FACTORY, OPAQUE = f"{__name__}:make", f"{__name__}:make_with_lambda"

CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "activation": lambda m: setattr(m, "act", nn.SiLU()),
    "head": lambda m: setattr(m, "fc", nn.Linear(8, 10)),
    "no norm": lambda m: setattr(m, "norm", nn.Identity()),
    "attribute": lambda m: setattr(m, "scale", 0.5),
    "stride": lambda m: setattr(m.stem, "stride", (2, 2)),
}


def converted(name: str, change: Callable[[nn.Module], object] = lambda m: None) -> nn.Module:
    torch.manual_seed(0)
    model = cs.load_model(name)
    change(model)
    return cs.convert(model, cs.CondConv(experts=2), example=EXAMPLE).model.eval()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_saved_and_saved_again(change: str, tmp_path: Path) -> None:
    model = converted(FACTORY, CHANGES[change])
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors", trust="tests")
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))
    cs.save(loaded, tmp_path / "again.safetensors")
    assert torch.equal(cs.load(tmp_path / "again.safetensors", trust="tests")(EXAMPLE), model(EXAMPLE))


@pytest.mark.parametrize("name", [FACTORY, OPAQUE])
def test_an_unchanged_one_is_built_by_its_factory(name: str, tmp_path: Path) -> None:
    model = converted(name)
    cs.save(model, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors", trust="tests")
    cs.save(loaded, tmp_path / "again.safetensors")
    assert read_recipe(tmp_path / "again.safetensors").source.name == name
    assert b'"skeleton"' not in (tmp_path / "again.safetensors").read_bytes()
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))


def test_a_change_that_cannot_be_described_is_an_error(tmp_path: Path) -> None:
    model, path = converted(OPAQUE, CHANGES["activation"]), tmp_path / "m.safetensors"
    with pytest.raises(InputError, match=r"no longer what .*:make_with_lambda builds(.|\n)*alone=False"):
        cs.save(model, path)
    cs.save(model, path, alone=False)
    with pytest.raises(InputError, match=r"does not say how its model is built(.|\n)*model=MyNet"):
        cs.load(path, trust="tests")
    own = WithLambda()
    own.act = nn.SiLU()
    assert torch.equal(cs.load(path, model=own)(EXAMPLE), model(EXAMPLE))


@pytest.mark.parametrize("width", [5, 6])
def test_a_new_head_of_a_run_is_part_of_the_recipe(width: int, tmp_path: Path) -> None:
    """``heads`` names the width 5; another head is a change."""
    model = converted(FACTORY)
    model.fc = nn.Linear(8, width)
    attach_recipe(model, replace(recipe_of(model), heads={"fc": 5}))
    cs.save(model, tmp_path / "m.safetensors")
    assert (b'"skeleton"' in (tmp_path / "m.safetensors").read_bytes()) is (width != 5)
    assert torch.equal(cs.load(tmp_path / "m.safetensors", trust="tests")(EXAMPLE), model(EXAMPLE))
