"""Files in which the names or the architecture say more than the shapes: distillation, wrapped parts, ``arch``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import recipe_of

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5).eval()


@pytest.fixture(scope="module")
def teacher() -> State:
    return torchvision.models.mobilenet_v2(num_classes=5).state_dict()


def outputs(content: Any, path: Path, **options: Any) -> Tensor:
    torch.save(content, path)
    with torch.no_grad():
        return load_model(path, **options)(X)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize("outer", ["", "module."])
def test_names_of_wrapped_parts_lose_the_wrapper(wrapper: str, outer: str, network: nn.Module, tmp_path: Path) -> None:
    state = {outer + n.replace("layer1.0.", f"layer1.0.{wrapper}."): t for n, t in network.state_dict().items()}
    expected = network(X)
    assert torch.equal(outputs(state, tmp_path / "m.pt"), expected)
    assert torch.equal(outputs(state, tmp_path / "m.pt", arch="torchvision:resnet18"), expected)


class Compiled(nn.Module):
    """A network that keeps a compiled part, as a function of the user builds it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"_orig_mod": nn.Conv2d(3, 4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["_orig_mod"](x)


def test_a_network_with_a_compiled_part_keeps_its_names(tmp_path: Path) -> None:
    model = Compiled()
    content = {"state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()}}
    assert torch.equal(outputs(content, tmp_path / "m.pt", arch="tests.files.test_whose_weights:Compiled"), model(X))


@pytest.mark.parametrize("form", ["keys", "prefixes"])
@pytest.mark.parametrize("arch", [None, "torchvision:resnet18"])
def test_of_a_distillation_the_student_is_taken(
    form: str, arch: str | None, network: nn.Module, teacher: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = {"student": network.state_dict(), "teacher": teacher}
    flat = {f"{key}.{name}": tensor for key, state in both.items() for name, tensor in state.items()}
    with caplog.at_level(logging.WARNING):
        actual = outputs(both if form == "keys" else {"state_dict": flat}, tmp_path / "m.pt", arch=arch)
    assert torch.equal(actual, network(X))
    assert "averaged" not in caplog.text
    assert "teacher" in caplog.text


def test_a_teacher_of_the_same_network_is_still_the_average(network: nn.Module, tmp_path: Path) -> None:
    own = network.state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    assert torch.equal(outputs({"student": other, "teacher": own}, tmp_path / "m.pt"), network(X))


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "tf_efficientnet_b0.ns_jft_in1k", "resnetblur18"])
def test_the_architecture_that_a_file_names_is_taken(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name.partition(".")[0], num_classes=5).eval()
    content = {"epoch": 3, "arch": name, "state_dict": model.state_dict()}
    assert torch.equal(outputs(content, tmp_path / "m.pt"), model(X))


def test_an_architecture_that_does_not_fit_is_not_taken(network: nn.Module, tmp_path: Path) -> None:
    torch.save({"arch": "tf_efficientnet_b0", "state_dict": network.state_dict()}, tmp_path / "m.pt")
    recipe = recipe_of(load_model(tmp_path / "m.pt"))
    assert recipe is not None
    assert recipe.source.name == "torchvision:resnet18"


def test_a_file_that_names_its_architecture_is_not_said_to_be_ambiguous(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    for arch in ("", "resnet18", "resnet18.a1_in1k"):
        caplog.clear()
        torch.save({"arch": arch, "state_dict": state}, tmp_path / "weights.pt")
        load_model(tmp_path / "weights.pt")
        assert ("timm:resnetblur18" in caplog.text) == (not arch)
