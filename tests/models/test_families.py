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

FAMILIES: dict[str, str] = {}
for _name in torchvision.models.list_models(exclude="quantized_*"):
    FAMILIES.setdefault(torchvision.models.get_model_builder(_name).__module__.rpartition(".")[2], _name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.values())
@pytest.mark.parametrize("known", [True, False], ids=["source", "skeleton"])
def test_a_family_survives_its_file(name: str, known: bool, tmp_path: Path) -> None:
    """By its source; and, where the source is forgotten and a module changed, by its description."""
    torch.manual_seed(0)
    model = load_model(f"torchvision:{name}", weights="none")
    if not known:
        attach_recipe(model, Recipe())
        model.add_module("mark", nn.Identity())
    save(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert ("skeleton" in file.metadata()) is not known
    loaded = load(tmp_path / "m.safetensors")
    assert describe(loaded, without_hooks=True) == describe(model, without_hooks=True)
    for ours, theirs in (
        (loaded.state_dict(), model.state_dict()),
        (transient_tensors(loaded), transient_tensors(model)),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert recipe_of(loaded).source == (Source(f"torchvision:{name}") if known else Source())


@pytest.mark.parametrize("name", ["swin_t", "ssdlite320_mobilenet_v3_large", "googlenet"])
def test_a_description_describes_what_it_rebuilds(name: str) -> None:
    model = load_model(f"torchvision:{name}", weights="none")
    rows = describe(model)
    assert describe(rebuild(rows)) == rows
