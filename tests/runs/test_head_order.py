"""Heads that were trained on the same classes in another order: rows follow the names of the classes."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_like
from condconv_surgery.recipe import CondConv, InputSpec, ODConv, Recipe, attach_recipe, recipe_of
from condconv_surgery.studies import QuickCheck, quick_check
from condconv_surgery.training import finetune, fit_heads
from tests.images import write_images
from tests.small_networks import SmallNet, small_net
from tests.small_study import study_options
from tests.training.test_training_run import StopAt, assert_same, options_for, weights
from tests.variant_cases import scramble

SPEC = InputSpec(height=16, width=16)
BEFORE, CLASSES = ("class2", "class0", "class1"), ("class0", "class1", "class2")
ORDER = [1, 2, 0]
"""The old logit of each of ``CLASSES``."""


def trained_on(classes: tuple[str, ...], head: nn.Module | None = None) -> SmallNet:
    """A network with random weights whose recipe has these classes."""
    model = small_net(classes=len(classes), dropout=0.0)
    if head is not None:
        model.head = head  # type: ignore[assignment]
    attach_recipe(model, replace(recipe_of(model) or Recipe(), classes=classes))
    return model.eval()


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    linear = nn.Linear(8, 3)
    found = {
        "linear": linear,
        "weight norm": nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)),
        "condconv": conditional_like(linear, CondConv(experts=3)),
        "odconv": conditional_like(linear, ODConv(experts=2)),
        "no bias": nn.Linear(8, 3, bias=False),
    }
    for head in found.values():
        scramble(head)
    return found


@pytest.mark.parametrize("kind", heads())
def test_logits_follow_the_names_of_their_classes(kind: str) -> None:
    model = trained_on(BEFORE, heads()[kind])
    images = torch.randn(4, 3, 16, 16)
    before = model(images)
    parameters = list(model.parameters())
    assert fit_heads(model, CLASSES, SPEC) == {}
    torch.testing.assert_close(model(images), before[:, ORDER])
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    fit_heads(model, CLASSES, SPEC)  # as a resumed run does: nothing is permuted twice
    torch.testing.assert_close(model(images), before[:, ORDER])


def test_auxiliary_heads_are_reordered_too() -> None:
    model = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False, num_classes=3)
    attach_recipe(model, Recipe(classes=BEFORE))
    old = {name: model.get_submodule(name).weight.clone() for name in ("fc", "aux1.fc2", "aux2.fc2")}
    fit_heads(model, CLASSES, InputSpec(height=64, width=64))
    assert all(torch.equal(model.get_submodule(name).weight, weight[ORDER]) for name, weight in old.items())


@pytest.mark.parametrize("before", [("cat", "dog", "owl"), ("class1", "class1", "class0"), ()])
def test_other_classes_or_unclear_names_leave_the_head_as_it_is(before: tuple[str, ...]) -> None:
    model = trained_on(before or CLASSES)
    attach_recipe(model, Recipe(classes=before))
    weight = model.head.weight.clone()
    fit_heads(model, CLASSES, SPEC)
    assert torch.equal(model.head.weight, weight)


class Scaled(SmallNet):
    """Its head is not its last layer: classes have scales of their own behind it."""

    def __init__(self) -> None:
        super().__init__(classes=3)
        self.scales = nn.Parameter(torch.tensor([1.0, 10.0, -5.0]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales


def test_a_head_in_front_of_an_ordered_layer_is_an_error_and_stays_as_it_was() -> None:
    model = Scaled().eval()
    attach_recipe(model, Recipe(classes=BEFORE))
    weight = model.head.weight.clone()
    with pytest.raises(InputError, match=r"another order, and its head head cannot be reordered.*\n.*class2, class0"):
        fit_heads(model, CLASSES, SPEC)
    assert torch.equal(model.head.weight, weight)


@pytest.fixture
def expert(tmp_path: Path) -> SmallNet:
    """Trained on the images of ``tmp_path / "data"``, its classes then put in another order by hand."""
    folder = write_images(tmp_path / "data", each=20)
    model = small_net(dropout=0.0)
    result = finetune(model, options_for(folder, "first", epochs=10).updated({"optimizer": {"lr": 0.05}}))
    assert result.best_top1 == 1.0
    with torch.no_grad():
        for tensor in model.head.parameters():
            tensor.copy_(tensor[[2, 0, 1]])
    recipe = recipe_of(model)
    assert recipe is not None
    attach_recipe(model, replace(recipe, classes=BEFORE))
    return model


def test_a_run_starts_from_the_right_classes_and_says_so(tmp_path: Path, expert: SmallNet) -> None:
    options = options_for(tmp_path / "data", epochs=1).updated({"optimizer": {"lr": 1e-6}})
    stop = StopAt(0, signal.SIGINT)
    assert finetune(expert, options, callback=stop).top1 == 1.0
    assert (
        "The head is kept for the same classes, its rows in the order of the data; "
        "the order was class2, class0, class1." in stop.lines
    )


def test_a_note_says_where_the_classes_are_others(tmp_path: Path) -> None:
    data, stop = write_images(tmp_path / "data"), StopAt(0, signal.SIGINT)
    finetune(trained_on(("cat", "dog", "owl")), options_for(data, epochs=1), callback=stop)
    line = "The head is kept for the same number of classes, but these are others; they were called cat, dog, owl."
    assert line in stop.lines


@pytest.mark.parametrize("from_memory", [False, True])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, from_memory: bool) -> None:
    data = write_images(tmp_path / "data")
    teacher = {"distill": {"teacher": "start", "weight": 0.5}}
    whole, cut = (options_for(data, name).updated(teacher) for name in ("whole", "cut"))
    finetune(trained_on(BEFORE), whole)
    model = trained_on(BEFORE)
    finetune(model, cut, callback=StopAt(5, signal.SIGINT))
    finetune(model if from_memory else trained_on(BEFORE), cut, resume=True)
    assert_same(weights(whole), weights(cut))


def test_a_comparison_starts_from_the_right_classes(
    tmp_path: Path, expert: SmallNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("condconv_surgery.training.run.draw_curves", lambda rows, path: None)
    options = study_options(optimizer={"lr": 1e-6}, schedule={"epochs": 1})
    found = quick_check(expert, options, data=tmp_path / "data", output=tmp_path / "study", progress=False)
    assert isinstance(found, QuickCheck)
    assert found.val_top1 == (1.0, 1.0)
