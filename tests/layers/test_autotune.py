"""Autotuning changes neither what a model computes nor its state."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from condconv_surgery.layers import autotune, conditional_layers, conditional_like
from condconv_surgery.recipe import CondConv, ODConv, Variant
from tests.variant_cases import scramble


def model_of(variant: Variant) -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(6, 12, 3, padding=1), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, 3, groups=6)]
    layers = [conditional_like(part, variant) for part in parts]
    model = nn.Sequential(*layers, nn.BatchNorm2d(6), nn.Flatten(), conditional_like(nn.Linear(6 * 49, 5), variant))
    scramble(model)
    return model


@pytest.mark.parametrize("variant", [CondConv(experts=3), ODConv(experts=3), ODConv(experts=1)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_the_function_and_the_state_stay(variant: Variant, training: bool) -> None:
    model = model_of(variant).train(training)
    x = torch.randn(4, 6, 9, 9)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.eval()(x)
    autotune(model.train(training), x, repeats=1)
    assert all(module.training is training for module in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for batch in (4, 1, 2):
        torch.testing.assert_close(model.eval()(x[:batch]), expected[:batch], rtol=0, atol=1e-4)


def test_a_faster_implementation_is_set_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("condconv_surgery.layers.autotune")  # the name in the package is the function
    times = {"auto": 1.0, "unfold": 0.95, "grouped": 0.5}
    monkeypatch.setattr(module, "_seconds", lambda layer, x, mixture, name, training, repeats: times.get(name, 2.0))
    model = model_of(CondConv(experts=3))
    assert autotune(model, torch.randn(4, 6, 9, 9)) == dict.fromkeys(conditional_layers(model), "grouped")
    times["grouped"] = 0.95  # not worth a change
    assert autotune(model, torch.randn(4, 6, 9, 9)) == {}
    assert {layer.implementation for layer in conditional_layers(model).values()} == {"auto"}
