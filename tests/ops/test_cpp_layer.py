"""A whole layer in one operator is the same function as its steps, and is not taken where a step must be seen."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, conditional_like
from condconv_surgery.native import kernels
from condconv_surgery.ops.backends.cpp import load_kernels
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.needs_kernels import needs_kernels
from tests.variant_cases import scramble

pytestmark = needs_kernels

VARIANTS = [
    CondConv(experts=4),
    DynamicConv(experts=3),
    ODConv(experts=1),
    ODConv(experts=4),
    ODConv(experts=4, heads="all", norm="none", activation="none"),
    ODConv(experts=4, gates="sigmoid"),
    ODConv(experts=3, gates="sigmoid", spatial=False, norm="none"),
]
PLAIN = {
    "3x3": nn.Conv2d(12, 20, 3, padding=1),
    "no bias, stride 2": nn.Conv2d(12, 20, 3, stride=2, bias=False),
    "1x1": nn.Conv2d(12, 20, 1),
    "depthwise 5x5": nn.Conv2d(12, 12, 5, padding=2, groups=12),
    "groups": nn.Conv2d(12, 20, 3, padding=1, groups=4),
    "same, dilated": nn.Conv2d(12, 8, (3, 1), padding="same", dilation=2),
}


def layer_of(plain: nn.Conv2d, variant: Variant) -> ConditionalConv2d[Any]:
    torch.manual_seed(0)
    layer = conditional_like(plain, variant).eval()
    scramble(layer)
    return layer


def operators_of(layer: nn.Module, x: torch.Tensor) -> list[str]:
    """The operators of the compiled code that a call of ``layer`` takes."""
    with mock.patch.object(load_kernels, "_enabled", mock.Mock(wraps=load_kernels.kernels())) as code, torch.no_grad():
        layer(x)
        return [name for name, _, _ in code.mock_calls]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_one_operator_equals_the_steps(name: str, variant: Variant) -> None:
    layer = layer_of(PLAIN[name], variant)
    for x in (torch.randn(1, 12, 6, 7), torch.randn(5, 12, 6, 7)):
        with kernels(on=False):
            expected = layer(x)
        with kernels(on=True):
            with torch.no_grad():
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
                last = layer(x.to(memory_format=torch.channels_last))
                torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
            scales_alone = len(x) > 1 and layer.experts == 1 and layer.router.spatial is None
            assert [call for call in operators_of(layer, x) if call.endswith("_layer")] == (
                [] if scales_alone else ["sigmoid_layer" if isinstance(variant, CondConv) else "attention_layer"]
            )


@pytest.mark.parametrize(
    "variant", [CondConv(experts=3), ODConv(experts=3), ODConv(experts=3, gates="sigmoid")], ids=str
)
def test_who_listens_to_a_router_is_heard(variant: Variant) -> None:
    layer, x, seen = layer_of(PLAIN["3x3"], variant), torch.randn(1, 12, 6, 6), []
    assert layer.router is not None
    first = getattr(layer.router, "linear", None) or next(iter(layer.router.children()))
    for module in (layer.router, first):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            layer(x)
        handle.remove()
    assert len(seen) == 2


def test_what_is_not_one_operator() -> None:
    layer, x = layer_of(PLAIN["3x3"], CondConv(experts=3)), torch.randn(2, 12, 6, 6)
    assert operators_of(layer, x) == ["sigmoid_layer"]
    layer(x)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x[0]).shape == (20, 6, 6)
        assert layer(x[:0]).shape == (0, 20, 6, 6)
        with pytest.raises(InputError, match=r"\[B, 12, H, W\]"):
            layer(torch.randn(2, 11, 6, 6))
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            layer_of(PLAIN["no bias, stride 2"], CondConv(experts=3))(torch.randn(2, 12, 2, 2))
        mixture = layer.route(x)
    with mock.patch.object(load_kernels, "_enabled", mock.Mock(wraps=load_kernels.kernels())) as code, torch.no_grad():
        layer(x, mixture)
    assert [name for name, _, _ in code.mock_calls] == ["convolve_without_autograd"]
    layer.implementation = "grouped"
    assert "sigmoid_layer" not in operators_of(layer, x)


def test_an_ungated_bias_is_added() -> None:
    layer, x = layer_of(PLAIN["3x3"], CondConv(experts=3)), torch.randn(1, 12, 6, 6)
    with torch.no_grad():
        before = layer(x)
        layer.ungated_bias = nn.Parameter(torch.randn(20))
        torch.testing.assert_close(layer(x), before + layer.ungated_bias[:, None, None])
