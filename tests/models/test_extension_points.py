"""A source of models and a layout of checkpoints, added from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.models import source_registry
from condconv_surgery.models.artifact.container import read_recipe
from condconv_surgery.models.layouts.layout_registry import LAYOUTS, Layout, register_layout, write_layout
from condconv_surgery.models.source_registry import ModelSource, named_source, register_source
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import CondConv, ODConv, Source, recipe_of
from tests.small_networks import small_net
from tests.variant_cases import scramble

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _registries_restored() -> Iterator[None]:
    sources, layouts = list(source_registry.SOURCES), dict(LAYOUTS)
    yield
    source_registry.SOURCES[:] = sources
    LAYOUTS.clear()
    LAYOUTS.update(layouts)


def build(source: Source) -> nn.Module:
    if source.name != "mine:thing":
        raise InputError(f"Unknown model {source.name!r}.")
    torch.manual_seed(0)
    return nn.Sequential(small_net(), nn.Linear(source.options.get("num_classes", 5), 3))


def test_a_named_source_loads_converts_and_comes_back_from_its_file(tmp_path: Path) -> None:
    register_source(named_source("mine", build))
    model = load_model("mine:thing")
    assert not model.training
    assert recipe_of(model).source == Source("mine:thing")
    converted = cs.convert(model, CondConv(experts=2), example=X, prove=False).model.eval()
    scramble(converted)
    cs.save(converted, tmp_path / "m.safetensors")
    assert read_recipe(tmp_path / "m.safetensors").source == Source("mine:thing")
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(X), converted(X))
    with pytest.raises(InputError, match="Unknown model 'mine:other'"):
        load_model("mine:other")


class PlainSubclass(nn.Conv2d):
    """As ``EfficientNetDepthwiseConv2d`` of transformers: another constructor, the same convolution."""


def test_a_converted_layer_may_have_been_a_subclass(tmp_path: Path) -> None:
    """What stands in its place is known by its geometry, so the source is enough to rebuild the model."""
    layers = (lambda: nn.Conv2d(3, 4, 3), lambda: PlainSubclass(4, 4, 3, groups=4))
    register_source(named_source("mine", lambda source: nn.Sequential(*(make() for make in layers))))
    converted = cs.convert(load_model("mine:thing"), CondConv(experts=2), example=X).model.eval()
    cs.save(converted, tmp_path / "m.safetensors")
    assert read_metadata(tmp_path / "m.safetensors").keys() == {"format", "recipe", "aliases", "tensors_sha256"}
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(X), converted(X))
    converted[1].geometry = replace(converted[1].geometry, stride=(2, 2))  # no longer what the source builds
    cs.save(converted, tmp_path / "m.safetensors")
    assert "skeleton" in read_metadata(tmp_path / "m.safetensors")


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_named_source_takes_weights_from_a_file_and_from_its_library(tmp_path: Path) -> None:
    trained = build(Source("mine:thing"))
    scramble(trained)
    register_source(named_source("mine", build, pretrained=lambda name: trained if name == "thing" else None))
    assert load_model("mine:thing") is trained
    torch.save(trained.state_dict(), tmp_path / "m.pt")
    for model in (
        load_model("mine:thing", weights=tmp_path / "m.pt"),
        load_model(tmp_path / "m.pt", arch="mine:thing"),
    ):
        assert model is not trained
        assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_source_may_be_a_file_that_it_alone_can_read(tmp_path: Path) -> None:
    """Asked before the sources that the package has; without ``build`` the modules are described in the artifact."""
    register_source(
        ModelSource("seeds", lambda text: text.endswith(".seed"), lambda text, options: small_net(seed=3).eval())
    )
    (tmp_path / "a.seed").write_text("3")
    model = load_model(tmp_path / "a.seed")
    cs.save(model, tmp_path / "m.safetensors")
    assert torch.equal(cs.load(tmp_path / "m.safetensors", trust=["tests"])(X), model(X))


def test_an_artifact_of_a_source_that_is_not_registered_asks_for_trust(tmp_path: Path) -> None:
    register_source(named_source("mine", build))
    cs.save(load_model("mine:thing"), tmp_path / "m.safetensors")
    source_registry.SOURCES[:] = [source for source in source_registry.SOURCES if source.name != "mine"]
    with pytest.raises(InputError, match=r"built by mine:thing(.|\n)*trust=\[.mine.\]"):
        cs.load(tmp_path / "m.safetensors")


def test_a_layout_is_written_and_read(tmp_path: Path) -> None:
    def write(model: nn.Module) -> dict[str, Tensor]:
        return {f"mine.{name}": tensor for name, tensor in model.state_dict().items()}

    register_source(named_source("mine", build))
    register_layout(
        Layout(
            "mine",
            write,
            matches=lambda state: all(name.startswith("mine.") for name in state),
            recognise=lambda state: Source("mine:thing"),
            read=lambda model, state: {name.removeprefix("mine."): tensor for name, tensor in state.items()},
        )
    )
    model = build(Source("mine:thing")).eval()
    scramble(model)
    torch.save(write(model), tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert torch.equal(loaded(X), model(X))
    converted = cs.convert(loaded, ODConv(experts=2), example=X, prove=False).model
    write_layout(converted, "mine", tmp_path / "theirs.safetensors")
    assert load_file(tmp_path / "theirs.safetensors").keys() == {f"mine.{name}" for name in converted.state_dict()}
    assert conditional_layers(converted)
    with pytest.raises(InputError, match=r"Unknown layout 'yours'(.|\n)*mine"):
        write_layout(converted, "yours", tmp_path / "theirs.safetensors")
