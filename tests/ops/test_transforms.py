"""``torch.func``, forward-mode differentiation and batches of gradients: the values of a loop over the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from condconv_surgery import native
from condconv_surgery.layers import ConditionalConv2d
from condconv_surgery.recipe import CondConv, ODConv, Variant
from tests.reference import per_sample_loop
from tests.variant_cases import scramble

VARIANTS: dict[str, Variant] = {"condconv": CondConv(experts=3), "odconv": ODConv(experts=2), "one": ODConv(experts=1)}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "dense": dict(in_channels=6, out_channels=8, kernel_size=3, padding=1),
    "1x1": dict(in_channels=6, out_channels=8, kernel_size=1),
    "depthwise": dict(in_channels=8, out_channels=8, kernel_size=3, padding=1, groups=8),
}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # forward derivatives of torch script their rules


@pytest.fixture(params=["native", "torch"], autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with native.kernels(request.param == "native" and native.is_built()):
        yield


@pytest.fixture(params=[(v, g) for v in VARIANTS for g in GEOMETRIES], ids=" ".join)
def layer(request: pytest.FixtureRequest) -> ConditionalConv2d[Any]:
    variant, geometry = request.param
    made: ConditionalConv2d[Any] = ConditionalConv2d(**GEOMETRIES[geometry], variant=VARIANTS[variant])
    scramble(made.double().eval())
    return made


def _loop(layer: ConditionalConv2d[Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: per_sample_loop(x, layer.weight, layer.bias, layer.router(x), layer.geometry)  # type: ignore[misc]


def _input(layer: ConditionalConv2d[Any], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, layer.in_channels, 5, 4, generator=generator, dtype=torch.float64).to(dtype)


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recording", [True, False])
def test_tangents(layer: ConditionalConv2d[Any], dtype: torch.dtype, recording: bool) -> None:
    """By ``torch.func.jvp`` and by dual numbers, of a batch and of one image; they were those of the router alone."""
    for x in (_input(layer), _input(layer)[:1]):
        x, direction = x.double(), torch.randn_like(x, dtype=torch.float64)
        step = 1e-5 * direction
        expected = (_loop(layer)(x + step) - _loop(layer)(x - step)) / 2e-5
        layer.to(dtype)
        with torch.set_grad_enabled(recording):
            _close(torch.func.jvp(layer, (x.to(dtype),), (direction.to(dtype),))[1], expected)
            with forward_ad.dual_level():
                y = layer(forward_ad.make_dual(x.to(dtype), direction.to(dtype)))
                tangent = forward_ad.unpack_dual(y).tangent
            assert tangent is not None
            _close(tangent, expected)
        layer.double()


def test_gradients_by_torch_func(layer: ConditionalConv2d[Any]) -> None:
    x = _input(layer, torch.float64).requires_grad_()
    named = dict(layer.named_parameters())
    expected = torch.autograd.grad((_loop(layer)(x) ** 2).sum(), (x, *named.values()))
    layer.float()
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(x: Tensor, values: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(layer, values, (x,)) ** 2).sum()

    to_x, to_values = torch.func.grad(loss, (0, 1))(x.detach().float(), values)
    for actual, wanted in zip((to_x, *to_values.values()), expected, strict=True):
        _close(actual, wanted)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("recording", [True, False])
def test_vmap_over_batches(layer: ConditionalConv2d[Any], recording: bool, last: bool) -> None:
    batches = torch.stack([_input(layer, torch.float64), -_input(layer, torch.float64)])
    expected = torch.stack([_loop(layer)(x) for x in batches])
    layer.float()
    batches = batches.float().transpose(2, 4).contiguous().transpose(2, 4) if last else batches.float()
    with torch.set_grad_enabled(recording):
        _close(torch.func.vmap(layer)(batches), expected)
        _close(torch.func.vmap(layer)(batches[:, :1]), expected[:, :1])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_a_batch_of_gradients(layer: ConditionalConv2d[Any], last: bool) -> None:
    x = _input(layer, torch.float64).requires_grad_()
    y = _loop(layer)(x)
    grads = torch.randn(2, *y.shape, dtype=torch.float64)
    inputs = (x, layer.weight)
    expected = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
    layer.float()
    x = x.detach().float()
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    y, inputs = layer(x), (x, layer.weight)
    by_vmap = torch.func.vmap(lambda grad: torch.autograd.grad(y, inputs, grad, retain_graph=True))(grads.float())
    by_autograd = torch.autograd.grad(y, inputs, grads.float(), is_grads_batched=True)
    for found in (by_vmap, by_autograd):
        for actual, wanted in zip(found, zip(*expected, strict=True), strict=True):
            _close(actual, torch.stack(wanted))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_compiled_gradients_by_torch_func(variant: Variant) -> None:
    layer: ConditionalConv2d[Any] = ConditionalConv2d(6, 8, 3, variant=variant)
    scramble(layer.double().eval())
    x = _input(layer, torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad((_loop(layer)(x) ** 2).sum(), x)
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(lambda x: (layer(x) ** 2).sum()), backend="aot_eager")
    _close(compiled(x.detach()), expected)
