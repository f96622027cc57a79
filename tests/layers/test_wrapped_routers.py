"""Linear maps of routers with hooks, adapters or quantised weights are called, never read past."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from condconv_surgery.layers import conditional_like
from condconv_surgery.recipe import Variant
from tests.variant_cases import EVERY_VARIANT, scramble

variants = pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
X = torch.randn(3, 32, 6, 6, generator=torch.Generator().manual_seed(0))


def make(variant: Variant, training: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = conditional_like(nn.Conv2d(32, 12, 3), variant)
    scramble(layer)
    return layer.train(training)


def maps(layer: nn.Module) -> list[str]:
    """The names of everything inside the router that has weights: its linear maps and its norm."""
    return [name for name, module in layer.named_modules() if isinstance(module, (nn.Linear, nn.BatchNorm1d))]


class Adapter(nn.Module):
    """A low-rank addition to a linear map, as PEFT's; it starts as nothing."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@variants
@modes
def test_hooks_on_each_map_are_called(variant: Variant, training: bool) -> None:
    layer = make(variant, training)
    expected = layer(X)
    for name in maps(layer):
        called = []
        module = layer.get_submodule(name)
        forward = module.register_forward_hook(lambda *_, called=called: called.append("forward"))
        layer(X)
        forward.remove()
        backward = module.register_full_backward_hook(lambda *_, called=called: called.append("backward"))
        layer(X.clone().requires_grad_()).sum().backward()
        backward.remove()
        assert called == ["forward", "backward"], name
    if not training:
        torch.testing.assert_close(layer(X), expected, rtol=0, atol=0)


@variants
@modes
def test_an_adapter_around_a_map_trains(variant: Variant, training: bool) -> None:
    layer = make(variant, training)
    expected = copy.deepcopy(layer)(X)
    for name in [name for name in maps(layer) if isinstance(layer.get_submodule(name), nn.Linear)]:
        adapted = copy.deepcopy(layer)
        adapter = Adapter(adapted.get_submodule(name))
        adapted.set_submodule(name, adapter)
        y = adapted(X)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        grad = adapter.up.weight.grad
        assert grad is not None, name
        assert bool(grad.any()) == bool(adapter.base.weight.grad.any()), name  # the softmax of one gate has none


@variants
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation_of_the_router(variant: Variant) -> None:
    layer = make(variant, training=False)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear}, torch.qint8)
    assert not any(isinstance(module, nn.Linear) for module in quantised.modules())
    torch.testing.assert_close(quantised(X), layer(X), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(quantised(X).float(), layer(X).float(), rtol=0.2, atol=0.2)
