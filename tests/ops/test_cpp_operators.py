"""The compiled kernels are operators that compilers, exporters, profilers and autograd see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile

from condconv_surgery import native
from condconv_surgery.layers import CondConv2d, ConvGeometry, ODConv2d, conditional_like
from condconv_surgery.ops.backends.cpp import load_kernels
from condconv_surgery.ops.backends.cpp.cpp_convolution import supports
from condconv_surgery.ops.conditional_conv2d import conditional_conv2d
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.ops.test_implementations import MIXTURES, make_case, values_and_gradients
from tests.reference import per_sample_loop
from tests.variant_cases import scramble

pytestmark = pytest.mark.skipif(not native.is_enabled(), reason="the kernels are not built")

DENSE, DEPTHWISE = ConvGeometry.make(4, 6, 3, 2, 1), ConvGeometry.make(4, 4, 3, 1, 1, groups=4)
GROUPED = ConvGeometry.make(4, 6, 3, 1, 1, groups=2)
ARGUMENTS = {DENSE: ([2, 2], [1, 1], [1, 1], 1), DEPTHWISE: ([1, 1], [1, 1], [1, 1], 4)}
ARGUMENTS[GROUPED] = ([1, 1], [1, 1], [1, 1], 2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler while it traces
@pytest.mark.parametrize("geometry", [DENSE, GROUPED, DEPTHWISE], ids=["dense", "groups", "depthwise"])
@pytest.mark.parametrize("parts", ["gate", "everything"])
def test_convolution_and_gradients_keep_the_contract_of_operators(geometry: ConvGeometry, parts: str) -> None:
    code = load_kernels.kernels()
    x, experts, _, mixture = make_case(geometry, MIXTURES[parts], 2, False, torch.float32)
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, experts, *mixture)]
    given = (*leaves, *ARGUMENTS[geometry])
    torch.library.opcheck(code.convolve, given, rtol=1e-4, atol=1e-4)
    plain = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
    grad = torch.randn_like(code.convolve(*plain))
    static = ("test_schema", "test_faketensor")
    torch.library.opcheck(code.convolve_without_autograd, plain, test_utils=static)
    torch.library.opcheck(code.input_gradient, (grad, *plain), test_utils=static)
    if not geometry.depthwise:
        torch.library.opcheck(code.kernel_gradients, (grad, *plain), test_utils=static)
    else:
        part = (grad, *plain[:2], *ARGUMENTS[geometry])
        torch.library.opcheck(code.depthwise_kernel_gradient, part, test_utils=static)


def test_routers_and_layers_keep_the_contract_of_operators() -> None:
    code, static = load_kernels.kernels(), ("test_schema", "test_faketensor")
    x, pooled, experts = torch.randn(2, 4, 5, 5), torch.randn(2, 4), torch.randn(3, 6, 4, 3, 3)
    weight, bias, values = torch.randn(3, 4), torch.randn(3), (1, 1, 1, 1, 1, 1, 1)
    torch.library.opcheck(code.pool, (x,), test_utils=static)
    torch.library.opcheck(code.sigmoid_gates, (pooled, weight, bias, 0.5), test_utils=static)
    torch.library.opcheck(code.sigmoid_layer, (x, experts, None, None, weight, bias, 0.5, *values), test_utils=static)
    rounded, scales = torch.randint(-127, 128, experts.shape, dtype=torch.int8), torch.rand(3, 6)
    given = (x, rounded, scales, None, weight, bias, 0.5, *values)
    torch.library.opcheck(code.sigmoid_layer, given, test_utils=static)
    given = (x, rounded, scales, torch.rand(2, 3), None, None, None, [1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(code.convolve_rounded, given, test_utils=static)
    hidden, temperature = [torch.randn(5, 4), torch.randn(5)], torch.tensor(2.0)
    heads = [part for width in (4, 6, 9, 3) for part in (torch.randn(width, 5), torch.randn(width))]
    routed = (hidden, [], 0.0, True, temperature)
    torch.library.opcheck(code.attention, (pooled, *routed, heads[:2] + heads[6:], 0b1001), test_utils=static)
    attended, no_gates = (x, experts, None, None, *routed), (None, None, 0.0)
    torch.library.opcheck(code.attention_layer, (*attended, heads, 0b1111, *no_gates, *values), test_utils=static)
    gated = (*attended, heads[:6], 0b0111, weight, bias, 0.5, *values)
    torch.library.opcheck(code.attention_layer, gated, test_utils=static)


@pytest.mark.parametrize("layer", [CondConv2d(8, 16, 3), ODConv2d(8, 8, 3, groups=8)], ids=["dense", "depthwise"])
def test_a_compiler_sees_the_kernels(layer: nn.Module) -> None:
    seen: set[str] = set()

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Any:
        seen.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(3, 8, 9, 9))
    assert any("cpp_convolve" in name for name in seen)


def test_an_exported_program_has_the_kernel_where_it_is_asked_for() -> None:
    layer = CondConv2d(8, 16, 3).eval()
    layer.implementation = "blockwise"
    x = torch.randn(3, 8, 9, 9)
    program = torch.export.export(layer, (x,))
    assert "condconv_surgery.cpp_convolve" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)
    layer.implementation = "auto"  # by default it runs where this package is not installed
    assert "condconv_surgery" not in torch.export.export(layer, (x,)).graph_module.code


def test_a_profiler_sees_the_kernels() -> None:
    layer, x = CondConv2d(8, 16, 3), torch.randn(3, 8, 9, 9)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
    names = {event.key for event in recorded.key_averages()}
    expected = ("convolve_without_autograd", "kernel_gradients", "sigmoid_layer")
    assert names >= {f"condconv_surgery::cpp_{name}" for name in expected}


@pytest.mark.parametrize("penalised", ["sum", "square"])
@pytest.mark.parametrize("variant", [CondConv(3), DynamicConv(3), ODConv(1), ODConv(3)], ids=repr)
@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 3, groups=2)],
    ids=lambda conv: conv.extra_repr(),
)
def test_gradients_are_differentiated_again(conv: nn.Conv2d, variant: Variant, penalised: str) -> None:
    """A gradient penalty, through two layers: as with the loop, whose operators are torch's own."""
    first, x = nn.Conv2d(4, 4, 3), torch.randn(2, 4, 9, 9)
    model = nn.Sequential(first, nn.Softplus(), conditional_like(conv, variant))
    scramble(model)
    found = {}
    for implementation in ("auto", "blockwise", "loop"):
        model[2].implementation = implementation  # type: ignore[assignment]
        model.zero_grad()
        image = x.clone().requires_grad_()
        y = model(image)
        (grad,) = torch.autograd.grad(y.sum() if penalised == "sum" else y.square().sum(), image, create_graph=True)
        grad.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found[implementation] = {name: torch.zeros(()) if g is None else g for name, g in grads.items()}
    for name, wanted in found.pop("loop").items():
        for other in found.values():
            scale = float(wanted.abs().max())
            torch.testing.assert_close(other[name].expand_as(wanted), wanted, rtol=2e-3, atol=2e-3 * scale + 1e-6)


@pytest.mark.parametrize(
    "geometry",
    [ConvGeometry.make(64, 32, 3, padding=1), ConvGeometry.make(64, 32, 1), ConvGeometry.make(8, 8, 5, groups=8)],
)
def test_channels_last_is_kept_in_values_and_gradients(geometry: ConvGeometry) -> None:
    x, experts, _, mixture = make_case(geometry, MIXTURES["everything"], 3, False, torch.float32)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert supports(last, experts, geometry)
    leaves = [experts, *(part for part in mixture if part is not None)]
    expected = values_and_gradients(per_sample_loop(x, experts, None, mixture, geometry), [x, *leaves])
    y = conditional_conv2d(last, experts, None, mixture, geometry, "blockwise")
    assert y.is_contiguous(memory_format=torch.channels_last)
    actual = values_and_gradients(y, [last, *leaves])
    assert actual[1].is_contiguous(memory_format=torch.channels_last)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 2e-5 * max(1.0, e.abs().max().item())
    with torch.no_grad():
        again = conditional_conv2d(last, experts, None, mixture, geometry)
        assert again.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-4)


def test_channels_last_that_is_not_worth_two_copies_is_left_to_torch() -> None:
    x = torch.randn(2, 8, 9, 9)
    for groups, worth in ((1, True), (8, False)):
        geometry = ConvGeometry.make(8, 8, 3, groups=groups)
        experts = torch.randn(2, *geometry.weight_shape)
        assert supports(x, experts, geometry)
        assert supports(x.to(memory_format=torch.channels_last), experts, geometry) == worth
