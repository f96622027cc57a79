"""Loops that are not ours: the one in the documentation, and those of other libraries."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torchvision

import condconv_surgery as cs
from condconv_surgery.layers import routers
from condconv_surgery.recipe import recipe_of
from tests.images import write_images
from tests.training.forked import fresh_script

ROOT = Path(__file__).parents[2]


def test_the_loop_in_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/how-to/own-loop.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(block, "docs/how-to/own-loop.md", "exec"), names)
    model = cs.load(tmp_path / "tuned.safetensors")
    assert {float(router.temperature) for router in routers(model).values()} == {1.0}  # type: ignore[arg-type]
    assert not torch.equal(model.conv1.weight, names["teacher"].conv1.weight)  # type: ignore[attr-defined, union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["accelerate", "lightning"])
def test_the_examples_with_other_libraries_train(tmp_path: Path, library: str) -> None:
    if importlib.util.find_spec(library) is None:  # to import Lightning takes ten seconds
        pytest.skip(f"{library} is not installed")
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(weights=None)
    conversion = cs.convert(plain, cs.DynamicConv(experts=2), include=["layer1.0.*"], example=torch.randn(2, 3, 64, 64))
    cs.save(conversion.model, tmp_path / "converted.safetensors")
    folder = write_images(tmp_path / "data", each=16)
    arguments = ["converted.safetensors", folder, "tuned.safetensors", 2]
    done = fresh_script(ROOT / f"examples/with_{library}.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    tuned = cs.load(tmp_path / "tuned.safetensors")
    recipe = recipe_of(tuned)
    assert recipe is not None
    assert (recipe.classes, recipe.heads) == (("class0", "class1", "class2"), {"fc": 3})
    router = routers(tuned)["layer1.0.conv1"]
    assert float(router.temperature) == 1.0  # type: ignore[arg-type]
    assert not torch.equal(tuned.conv1.weight, plain.conv1.weight)
    started = routers(conversion.model)["layer1.0.conv1"].parameters()
    assert any(not torch.equal(one, other) for one, other in zip(started, router.parameters(), strict=True))
