"""One model of every torchvision family through a file and back: the same modules, the same tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import safe_open
from torch import nn

from condconv_surgery.models.artifact.save_load import load, save
from condconv_surgery.models.artifact.skeleton import describe, rebuild, transient_tensors
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import Recipe, Source, attach_recipe, recipe_of


def parameters_of(name: str) -> int:
    return min(weights.meta["num_params"] for weights in torchvision.models.get_model_weights(name))


FAMILIES: dict[str, str] = {}
"""The smallest network of each."""
for _name in sorted(torchvision.models.list_models(exclude="quantized_*"), key=parameters_of, reverse=True):
    FAMILIES[torchvision.models.get_model_builder(_name).__module__.rpartition(".")[2]] = _name


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.values())
def test_a_family_survives_its_file(name: str, tmp_path: Path) -> None:
    """By its source; and, where the source is forgotten and a module changed, by its description."""
    torch.manual_seed(0)
    model = load_model(f"torchvision:{name}", weights="none")
    assert recipe_of(through_a_file(model, tmp_path, described=False)).source == Source(f"torchvision:{name}")
    attach_recipe(model, Recipe())
    model.add_module("mark", nn.Identity())
    assert recipe_of(through_a_file(model, tmp_path, described=True)).source == Source()


def through_a_file(model: nn.Module, folder: Path, described: bool) -> nn.Module:
    """Saved and loaded, and compared."""
    file = folder / f"{described}.safetensors"
    save(model, file)
    with safe_open(file, "pt") as opened:
        assert ("skeleton" in opened.metadata()) is described
    loaded = load(file)
    assert describe(loaded, without_hooks=True) == describe(model, without_hooks=True)
    for ours, theirs in (
        (loaded.state_dict(), model.state_dict()),
        (transient_tensors(loaded), transient_tensors(model)),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    return loaded


@pytest.mark.parametrize("name", ["swin_t", "ssdlite320_mobilenet_v3_large", "googlenet"])
def test_a_description_describes_what_it_rebuilds(name: str) -> None:
    model = load_model(f"torchvision:{name}", weights="none")
    rows = describe(model)
    assert describe(rebuild(rows)) == rows
