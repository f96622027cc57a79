"""The compiled routers are the same function as those of torch's operators, and leave alone what they cannot know."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from condconv_surgery.layers import ConvGeometry
from condconv_surgery.layers.router_base import Router, make_router
from condconv_surgery.native import kernels
from condconv_surgery.ops.backends.cpp import load_kernels
from condconv_surgery.ops.backends.cpp.cpp_routing import pool
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.needs_kernels import needs_kernels

pytestmark = needs_kernels

VARIANTS = [
    CondConv(experts=1),
    CondConv(experts=8),
    DynamicConv(experts=4, temperature=30.0),
    ODConv(experts=1),
    ODConv(experts=4),
    ODConv(experts=3, norm="none", activation="none", temperature=0.5),
    ODConv(experts=4, heads="all", min_hidden=5),
]
LAYERS = {
    "3x3": ConvGeometry.make(37, 20, 3),
    "1x1": ConvGeometry.make(16, 70, 1),
    "depthwise": ConvGeometry.make(24, 24, 5, groups=24),
}


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    with kernels(on=True):
        yield


def make(geometry: ConvGeometry, variant: Variant) -> Router:
    torch.manual_seed(0)
    router = make_router(geometry, variant).eval()
    for tensor in [*router.parameters(), *(b for name, b in router.named_buffers() if "running" in name)]:
        nn.init.normal_(tensor, std=0.7)
    if isinstance(getattr(router, "norm", None), nn.BatchNorm1d):
        router.norm.running_var.abs_()
    return router


def calls_of(router: Router, x: torch.Tensor) -> int:
    """How many calls into the compiled code the mixture of ``x`` takes."""
    with mock.patch.object(load_kernels, "_enabled", mock.Mock(wraps=load_kernels.kernels())) as code, torch.no_grad():
        router(x)
        return len(code.mock_calls)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_torch(layer: str, variant: Variant) -> None:
    router = make(LAYERS[layer], variant)
    for batch, size in ((1, (7, 7)), (1, (61, 3)), (5, (1, 1)), (33, (10, 13)), (0, (4, 4))):
        x = torch.randn(batch, LAYERS[layer].in_channels, *size)
        with torch.no_grad():
            actual, from_pooled = router(x), router(x.mean(dim=(2, 3)))
        expected = router(x)  # recorded, so by torch's operators
        assert calls_of(router, x) == 2
        for a, p, e in zip(actual, from_pooled, expected, strict=True):
            assert (a is None) == (e is None)
            if e is not None:
                assert a.shape == e.shape
                torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-6)
                torch.testing.assert_close(p, e, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("variant", [CondConv(experts=4), ODConv(experts=4), DynamicConv(experts=4)], ids=str)
def test_far_and_wrong_numbers(variant: Variant) -> None:
    router = make(LAYERS["3x3"], variant)
    for value in (1e4, -1e4, float("nan"), float("inf")):
        x = torch.full((2, 37, 3, 3), value)
        x[0] = 0.5
        expected = router(x)
        with torch.no_grad():
            actual = router(x)
        for a, e in zip(actual, expected, strict=True):
            if e is not None:
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_what_is_left_to_torch() -> None:
    x = torch.randn(2, 37, 6, 6)
    condconv, odconv = (make(LAYERS["3x3"], variant) for variant in (CondConv(experts=4), ODConv(experts=4)))
    assert calls_of(condconv, x) == calls_of(odconv, x) == 2
    assert calls_of(condconv.double(), x.double()) == 2  # asked twice, refused twice
    condconv.float()
    with torch.no_grad():
        assert condconv(x.to(memory_format=torch.channels_last)).gate.shape == (2, 4)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            condconv(torch.randn(2, 36, 6, 6))
        assert load_kernels.kernels().pool(x.double()) is None
        assert load_kernels.kernels().pool(x.to(memory_format=torch.channels_last)) is None
    odconv.train()
    assert calls_of(odconv, x) == 1  # pooled; the batch's statistics are for torch
    with kernels(on=False):
        assert pool(x) is None


@pytest.mark.parametrize(("batch", "left"), [(2, False), (500, True)])
def test_what_is_large_is_left_to_matrix_products(batch: int, left: bool) -> None:
    router, code, found = make(LAYERS["3x3"], ODConv(experts=4)), load_kernels.kernels(), []

    def attention(*given: object) -> object:
        found.append(code.attention(*given))
        return found[-1]

    x = torch.randn(batch, 37, 3, 3)
    with mock.patch.object(load_kernels, "_enabled", mock.Mock(wraps=code, attention=attention)), torch.no_grad():
        actual = router(x)
    assert [not each for each in found] == [left]
    for a, e in zip(actual, router(x), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-6)


def test_who_listens_is_heard() -> None:
    x, seen = torch.randn(2, 37, 6, 6), []
    for variant in (CondConv(experts=4), ODConv(experts=4)):
        router = make(LAYERS["3x3"], variant)
        first = router.linear if isinstance(variant, CondConv) else router.reduce
        for listen in (first.register_forward_hook, first.register_forward_pre_hook):
            handle = listen(lambda *_: seen.append(1))
            with torch.no_grad():
                router(x)
            handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        before = len(seen)
        with torch.no_grad():
            router(x)
        handle.remove()
        assert len(seen) - before >= 2  # the router and its map
    assert len(seen) >= 8


def test_a_map_that_something_wraps() -> None:
    router, x = make(LAYERS["3x3"], CondConv(experts=4)), torch.randn(2, 37, 6, 6)
    parametrizations.weight_norm(router.linear)
    assert parametrize.is_parametrized(router.linear)
    expected = router(x).gate
    with torch.no_grad():
        torch.testing.assert_close(router(x).gate, expected)


def test_a_map_whose_call_was_replaced_and_weights_that_are_no_parameters() -> None:
    router, x = make(LAYERS["3x3"], CondConv(experts=4)), torch.randn(2, 37, 6, 6)
    with torch.no_grad():
        expected = router(x).gate
        weight = router.linear.weight.detach()
        del router.linear.weight  # as DataParallel and FSDP do
        router.linear.weight = weight
        torch.testing.assert_close(router(x).gate, expected)
        router.linear.forward = lambda pooled: torch.zeros(len(pooled), 4)
        torch.testing.assert_close(router(x).gate, torch.full((2, 4), 0.25))


def test_nothing_to_pool() -> None:
    with torch.no_grad():
        assert pool(torch.randn(2, 3, 0, 4)) is None
