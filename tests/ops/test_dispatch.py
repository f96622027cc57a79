"""One list of backends: a fourth one is added from outside the package, and used for every part of a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from re import findall

import pytest
import torch
from torch import Tensor, nn

from condconv_surgery.layers import Mixture, conditional_like
from condconv_surgery.ops import dispatch
from condconv_surgery.ops.backends.backend_protocol import Backend
from condconv_surgery.ops.backends.eager import EagerBackend
from condconv_surgery.ops.choose_implementation import choose
from condconv_surgery.ops.geometry import ConvArguments, ConvGeometry
from condconv_surgery.ops.router_forms import Attention, RouterForm, SigmoidGates
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.variant_cases import scramble

PACKAGE = Path(__file__).parents[2] / "condconv_surgery"


class FourthBackend(Backend):
    """Computes with another backend and counts what it is asked for."""

    name = "fourth"

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.inner = EagerBackend()

    def supports(self, x: Tensor, experts: Tensor, mixture: Mixture, geometry: ConvGeometry | ConvArguments, /) -> bool:
        return x.dtype == torch.float32

    def convolve(self, x: Tensor, experts: Tensor, mixture: Mixture, arguments: ConvArguments, /) -> Tensor:
        self.calls["convolve"] += 1
        return self.inner.convolve(x, experts, mixture, arguments)

    def backward(self, *arguments: object) -> list[Tensor]:
        self.calls["backward"] += 1
        return [value.clone() for value in self.inner.backward(*arguments)]  # type: ignore[arg-type]

    def pool(self, x: Tensor, /) -> Tensor:
        self.calls["pool"] += 1
        return x.mean(dim=(2, 3))

    def route(self, pooled: Tensor, form: RouterForm, /) -> list[Tensor | None] | None:
        self.calls["route"] += 1
        if isinstance(form, SigmoidGates):
            return [form.factor * torch.sigmoid(form.linear(pooled))]
        return heads_of(pooled, form)


def heads_of(pooled: Tensor, form: Attention) -> list[Tensor | None]:
    h = form.reduce(pooled)
    h = h if form.norm is None else form.norm(h)
    h = torch.relu(h) if form.relu else h
    logits = [None if head is None else head(h) / form.temperature for head in form.heads]
    last = logits.pop()
    scales = [None if z is None else 2 * torch.sigmoid(z) for z in logits]
    return [*scales, None if last is None else torch.softmax(last, 1)]


@pytest.fixture
def fourth() -> Iterator[FourthBackend]:
    backend = FourthBackend()
    with registered(backend):
        yield backend


@contextmanager
def registered(backend: Backend) -> Iterator[None]:
    dispatch.register_backend(backend)
    try:
        yield
    finally:
        if backend in dispatch._backends:
            dispatch.unregister_backend(backend)


@pytest.mark.parametrize("variant", [CondConv(experts=3), ODConv(experts=3), DynamicConv(experts=3)], ids=str)
def test_a_fourth_backend_is_one_class_and_one_call(variant: Variant, fourth: FourthBackend) -> None:
    torch.manual_seed(0)
    layer = conditional_like(nn.Conv2d(6, 10, 3, padding=1), variant).eval()
    scramble(layer)
    layer.implementation = "blockwise"
    x = torch.randn(4, 6, 8, 8, requires_grad=True)
    leaves = [x, *layer.parameters()]
    found = [layer(x), *torch.autograd.grad(layer(x).square().sum(), leaves)]
    assert fourth.calls == {"convolve": 2, "backward": 1, "pool": 2, "route": 2}
    layer.double()(x.double())
    assert fourth.calls["convolve"] == 2  # float64 is not supported, so the next backend computes it
    layer.float()
    dispatch.unregister_backend(fourth)
    expected = [layer(x), *torch.autograd.grad(layer(x).square().sum(), leaves)]
    for a, e in zip(found, expected, strict=True):  # float32 sums round in proportion to their largest terms
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * max(1.0, float(e.detach().abs().max())))


class FastBackend(FourthBackend):
    """Takes a call before the choice, and says what it wants chosen."""

    def fast_convolve(self, implementation: str, x: Tensor, *rest: object) -> Tensor | None:
        self.calls[f"fast {implementation}"] += 1
        return None

    def applies_scales(self, implementation: str, *rest: object) -> bool:
        self.calls["applies_scales"] += 1
        return True

    def preferred_implementation(self, *arguments: object) -> str:
        return "grouped"


def test_a_fast_path_and_a_preference_are_asked() -> None:
    fast, layer = FastBackend(), conditional_like(nn.Conv2d(6, 10, 3, padding=1), CondConv(experts=3))
    odconv = conditional_like(nn.Conv2d(6, 10, 1), ODConv(experts=1))
    x, one_kernel = torch.randn(4, 6, 8, 8), Mixture(in_scale=torch.ones(4, 6))
    with registered(fast):
        layer(x)
        assert (fast.calls["fast auto"], fast.calls["fast blockwise"], fast.calls["convolve"]) == (1, 0, 0)
        layer.implementation = "blockwise"
        layer(x)
        assert fast.calls["fast blockwise"] == fast.calls["convolve"] == 1
        assert choose(x, odconv.weight, one_kernel, odconv.geometry) == "grouped"
        odconv.implementation = "blockwise"
        odconv(torch.randn(4, 6, 2, 2))
        assert fast.calls["applies_scales"] == 1
    assert choose(x, odconv.weight, one_kernel, odconv.geometry) == "blockwise"


def test_a_backend_that_fuses_no_router_leaves_it_to_torch() -> None:
    layer = conditional_like(nn.Conv2d(6, 10, 3), CondConv(experts=3))
    assert layer.router is not None
    pooled = torch.randn(4, 6)
    form = layer.router.fusable_form()
    assert form is not None
    assert dispatch.route(pooled, form) is None
    torch.testing.assert_close(layer.router(pooled).gate, torch.full((4, 3), 1 / 3))


def test_only_the_dispatch_names_a_backend() -> None:
    """The switch of the compiled kernels aside."""
    allowed = {"ops/dispatch.py", "native.py", "__init__.py"}
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name in allowed or name.startswith("ops/backends/"):
            continue
        code = path.read_text(encoding="utf-8")
        if hits := findall(r"ops\.backends|\b(?:cpp|native|gpu|triton)\.\w+\(", code):
            found[name] = hits
    assert not found
