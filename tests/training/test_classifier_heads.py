from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalLinear, conditional_like
from condconv_surgery.recipe import CondConv, InputSpec, recipe_of
from condconv_surgery.training import fit_heads
from condconv_surgery.training.classifier_heads import find_heads
from condconv_surgery.training.monitor.nonfinite import first_nonfinite

SPEC = InputSpec(height=64, width=64)
CLASSES = ("a", "b", "c")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("squeezenet1_1", "classifier.1"),
        ("densenet121", "classifier"),
        ("convnext_tiny", "classifier.2"),
        ("vit_b_32", "heads.head"),
    ],
)
def test_the_last_layer_is_found(name: str, head: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=11)
    spec = InputSpec() if name.startswith("vit") else SPEC
    assert find_heads(model, spec) == [head]


def test_auxiliary_heads_are_found_and_exchanged() -> None:
    model = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False, num_classes=11)
    assert fit_heads(model, CLASSES, SPEC) == {"fc": 3, "aux2.fc2": 3, "aux1.fc2": 3}
    outputs = model.train()(torch.zeros(2, 3, 64, 64))
    assert [tuple(t.shape) for t in outputs] == [(2, 3)] * 3


def test_looking_for_the_head_leaves_the_model_as_it_was() -> None:
    model = torchvision.models.resnet18(weights=None)
    model.layer1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    find_heads(model, SPEC)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


class AliasedNorm(nn.Module):
    """One batch norm with two names, as in models that share normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.first = self.second = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.conv(self.first(self.conv(x)).mean(1, True).expand_as(x))).mean((2, 3)))


def test_a_module_with_two_names_keeps_its_buffers() -> None:
    """``torch.func.functional_call`` leaves copies behind in a module that it knows by two names."""
    model = AliasedNorm()
    nn.init.constant_(model.first.running_mean, 3.0)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.first.named_buffers()}
    fit_heads(model, CLASSES, InputSpec(height=8, width=8))
    first_nonfinite(model.train(), [torch.randn(2, 3, 8, 8)])
    for name, buffer in model.first.named_buffers():
        same, before = buffers[name]
        assert buffer is same
        assert torch.equal(buffer, before)


def test_a_head_of_the_right_width_is_kept_and_classes_are_noted() -> None:
    model = torchvision.models.resnet18(weights=None, num_classes=3)
    head = model.fc
    assert fit_heads(model, CLASSES, SPEC) == {}
    assert model.fc is head
    recipe = recipe_of(model)
    assert recipe is not None
    assert (recipe.classes, recipe.heads, recipe.input) == (CLASSES, {}, SPEC)


def test_a_new_head_is_noted_in_the_recipe() -> None:
    model = torchvision.models.resnet18(weights=None)
    assert fit_heads(model, CLASSES, SPEC) == {"fc": 3}
    recipe = recipe_of(model)
    assert recipe is not None
    assert recipe.heads == {"fc": 3}
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_a_converted_head_stays_converted() -> None:
    model = nn.Sequential(nn.Flatten(), conditional_like(nn.Linear(12, 10), CondConv(experts=3)))
    spec = InputSpec(height=2, width=2)
    assert fit_heads(model, CLASSES, spec) == {"1": 3}
    assert isinstance(model[1], ConditionalLinear)
    assert model[1].weight.shape == (3, 3, 12, 1, 1)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3)).repeat(1, 3)


def test_a_model_without_a_last_layer_is_refused() -> None:
    with pytest.raises(InputError, match=r"No last layer found.*\n.*nn\.Linear or an nn\.Conv2d"):
        find_heads(Pooled(), InputSpec(height=8, width=8))


def test_an_output_that_is_no_logits_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 4, 6, 6\)"):
        find_heads(nn.Sequential(nn.Conv2d(3, 4, 3)), InputSpec(height=8, width=8))
