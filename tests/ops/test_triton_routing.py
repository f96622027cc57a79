"""Routers in Triton are the same function as those of torch's operators; without a GPU its interpreter runs them."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from condconv_surgery.layers import conditional_like
from condconv_surgery.layers.router_base import Router
from condconv_surgery.ops.backends.triton import availability
from condconv_surgery.ops.backends.triton import pooling_kernels as pooling
from condconv_surgery.ops.backends.triton import router_kernels as gates
from condconv_surgery.ops.backends.triton.triton_routing import route
from condconv_surgery.ops.router_forms import SigmoidGates
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.dynamic_batch import dynamic_batch
from tests.ops.test_cpp_routing import LAYERS, VARIANTS, make
from tests.ops.test_triton_backend import cuda


def launches_of(router: Router, x: torch.Tensor) -> int:
    """How many of Triton's launches the mixture of ``x`` takes."""
    with (
        mock.patch.object(gates, "launch", wraps=gates.launch) as of_gates,
        mock.patch.object(pooling, "launch", wraps=pooling.launch) as of_pooling,
        torch.no_grad(),
    ):
        router(x)
        return len(of_gates.mock_calls) + len(of_pooling.mock_calls)


def compare(router: Router, x: torch.Tensor, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    with torch.no_grad():
        actual = router(x)
    with mock.patch.object(availability, "is_here", return_value=False):
        expected = router(x)  # by torch's operators
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert (a.shape, a.dtype) == (e.shape, e.dtype)
            torch.testing.assert_close(a, e, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_interpreted_routers_equal_torch(layer: str, variant: Variant, interpreted: None) -> None:
    router = make(LAYERS[layer], variant)
    x = torch.randn(1, LAYERS[layer].in_channels, 2, 3)
    assert launches_of(router, x) == 2
    for batch in (1, 18):
        compare(router, torch.randn(batch, LAYERS[layer].in_channels))
    compare(router, torch.randn(0, LAYERS[layer].in_channels, 3, 3))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, by which they are interpreted
@pytest.mark.parametrize("variant", [CondConv(experts=4), ODConv(experts=4), DynamicConv(experts=4)], ids=str)
def test_far_and_wrong_numbers(variant: Variant, interpreted: None) -> None:
    router = make(LAYERS["3x3"], variant)
    for value in (1e4, -1e4, float("nan"), float("inf")):
        x = torch.full((2, 37), value)
        x[0] = 0.5
        compare(router, x, rtol=1e-4, atol=1e-6)


def test_half_precision_of_all_numbers(interpreted: None) -> None:
    for variant in (CondConv(experts=4), ODConv(experts=4)):
        router = make(LAYERS["3x3"], variant).half()
        x = torch.randn(3, 37, 4, 4, dtype=torch.float16)
        assert launches_of(router, x) == 2
        compare(router, x, rtol=4e-3, atol=2e-3)


def test_what_is_left_to_torch(interpreted: None) -> None:
    x = torch.randn(2, 37, 6, 6)
    condconv, odconv = (make(LAYERS["3x3"], variant) for variant in (CondConv(experts=4), ODConv(experts=4)))
    assert launches_of(make(LAYERS["3x3"], CondConv(experts=33)), x) == 1
    assert launches_of(make(LAYERS["3x3"], ODConv(experts=33)), x) == 1
    assert launches_of(make(LAYERS["3x3"], ODConv(experts=4, min_hidden=257)), x) == 1
    assert launches_of(copy.deepcopy(condconv).double(), x.double()) == 0
    with FlopCounterMode(display=False):
        assert launches_of(condconv, x) == launches_of(odconv, x) == 0
    odconv.train()
    assert launches_of(odconv, x) == 1  # pooled; the batch's statistics are for torch
    heard = []
    condconv.linear.register_forward_hook(lambda *_: heard.append(1))
    assert launches_of(condconv, x) == 1
    assert heard == [1]
    for router in (make(LAYERS["3x3"], CondConv(experts=4)), make(LAYERS["3x3"], ODConv(experts=4))):
        with torch.no_grad(), pytest.raises(RuntimeError, match="mat1 and mat2"):
            router(torch.randn(2, 36, 6, 6))
    wrapped = make(LAYERS["3x3"], DynamicConv(experts=4))
    wrapped.linear = nn.Sequential(wrapped.linear)
    assert launches_of(wrapped, x) == 1
    pooled = x.mean(dim=(2, 3))
    linear = make(LAYERS["3x3"], CondConv(experts=4)).linear
    assert route(pooled, SigmoidGates(linear, 0.5)) is None  # it is recorded
    with torch.no_grad():
        assert route(pooled, SigmoidGates(linear, 0.5)) is not None
        assert route(pooled, SigmoidGates(linear.half(), 0.5)) is None
        assert route(pooled.t().contiguous().t(), SigmoidGates(linear.float(), 0.5)) is None


@pytest.mark.parametrize("variant", [CondConv(experts=2), ODConv(experts=2)], ids=str)
def test_a_program_without_gradients_takes_any_batch(variant: Variant, interpreted: None, monkeypatch) -> None:
    monkeypatch.setattr(availability, "is_here", torch.compiler.assume_constant_result(lambda device: True))
    layer = conditional_like(nn.Conv2d(3, 4, 3, padding=1), variant).eval()
    x = torch.randn(3, 3, 5, 7)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: dynamic_batch()},))
        for batch in (2, 5):
            other = torch.randn(batch, 3, 5, 7)
            torch.testing.assert_close(program.module()(other), layer(other), rtol=4e-3, atol=4e-3)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_compiled_routers_equal_torch(layer: str, variant: Variant) -> None:
    router = make(LAYERS[layer], variant).cuda()
    for batch, size in ((1, (7, 7)), (5, (1, 1)), (33, (20, 30))):
        x = torch.randn(batch, LAYERS[layer].in_channels, *size, device="cuda")
        assert launches_of(router, x) == 2
        compare(router, x, rtol=2e-4, atol=2e-5)
        compare(router, x.to(memory_format=torch.channels_last), rtol=2e-4, atol=2e-5)
    with torch.autocast("cuda", torch.bfloat16):
        # torch rounds the mean to bfloat16
        compare(router, torch.randn(4, LAYERS[layer].in_channels, 7, 7, device="cuda").bfloat16(), rtol=2e-2, atol=2e-2)
