"""Routers that users write or change compute the same with and without gradients, in one call or several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_like
from condconv_surgery.layers.condconv import CondConvRouter
from condconv_surgery.layers.conditional import ConditionalConv2d
from condconv_surgery.layers.odconv import ODConvRouter
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.recipe import CondConv, ODConv, Variant
from tests.variant_cases import scramble


class Softmax(CondConvRouter):
    """Another normalisation of the gates."""

    def mix(self, pooled: Tensor) -> Mixture:
        return Mixture(torch.softmax(self.linear(pooled), dim=1))


class Halved(ODConvRouter):
    """Other scales."""

    def mix(self, pooled: Tensor) -> Mixture:
        return Mixture(*(None if part is None else part / 2 for part in super().mix(pooled)))


class Wrapper(nn.Module):
    """A module around a router."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor) -> Mixture:
        mixture: Mixture = self.router(x)
        return mixture._replace(gate=mixture.gate / 3)


def subclassed(layer: ConditionalConv2d[Variant]) -> None:
    layer.router.__class__ = Softmax if isinstance(layer.router, CondConvRouter) else Halved


def patched(layer: ConditionalConv2d[Variant]) -> None:
    before = layer.router.mix
    layer.router.mix = lambda pooled: before(pooled / 10)  # type: ignore[method-assign,union-attr]


def wrapped(layer: ConditionalConv2d[Variant]) -> None:
    layer.router = Wrapper(layer.router)  # type: ignore[assignment]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", [CondConv(3), ODConv(3), ODConv(3, gates="sigmoid")], ids=repr)
@pytest.mark.parametrize("change", [subclassed, patched, wrapped])
def test_a_changed_router_is_what_computes(
    change: Callable[[ConditionalConv2d[Variant]], None], variant: Variant, batch: int
) -> None:
    layer = conditional_like(nn.Conv2d(4, 6, 3), variant).eval()
    scramble(layer)
    x = torch.randn(batch, 4, 8, 8)
    with torch.no_grad():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        without = layer(x)
    torch.testing.assert_close(without, layer(x), rtol=1e-4, atol=1e-5)
    layer.implementation = "loop"
    torch.testing.assert_close(without, layer(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(without, before, rtol=1e-2), "the change changes something"


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["pruned", "parametrized"])
def test_computed_weights_and_biases(kind: str, name: str) -> None:
    layer = conditional_like(nn.Conv2d(4, 6, 3), CondConv(3)).eval()
    if kind == "pruned":
        prune.l1_unstructured(layer, name, 0.5)
    else:
        parametrize.register_parametrization(layer, name, nn.Tanh())
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), per_gradient(layer, x), rtol=1e-4, atol=1e-5)


def per_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y: Tensor = layer(x)
    return y.detach()


@pytest.mark.parametrize("kind", ["pruned", "weight norm", "spectral norm of a router"])
@pytest.mark.parametrize("alone", [True, False])
def test_computed_experts_are_not_saved(kind: str, alone: bool, tmp_path: Path) -> None:
    model = nn.Sequential(conditional_like(nn.Conv2d(4, 6, 3), CondConv(3)))
    if kind == "pruned":
        prune.l1_unstructured(model[0], "weight", 0.5)
    elif kind == "weight norm":
        nn.utils.parametrizations.weight_norm(model[0])
    else:
        nn.utils.parametrizations.spectral_norm(model[0].router.linear)
    with pytest.raises(InputError, match="weight is computed before each call") as raised:
        cs.save(model, tmp_path / "m.safetensors", alone=alone)
    assert not (tmp_path / "m.safetensors").exists()
    eval(raised.value.fix, {"torch": torch, "model": model})
    cs.save(model, tmp_path / "m.safetensors", alone=alone)
