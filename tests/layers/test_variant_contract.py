"""The contract of every registered variant as a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalLinear, conditional_layers, conditional_like, set_temperature
from condconv_surgery.ops.tracing_state import is_intercepted
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.dynamic_batch import dynamic_batch
from tests.geometries import GEOMETRIES
from tests.reference import per_sample_loop
from tests.variant_cases import EVERY_VARIANT, scramble

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
variants = pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
TRACED = ("3x3", "1x1", "1x1 strided", "groups", "depthwise", "depthwise strided", "same even", "reflect", "circular")
"""Every kind of layer and of padding whose code reads the sizes of the input."""


def make(variant: Variant, name: str = "3x3", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    layer = conditional_like(nn.Conv2d(**{**GEOMETRIES[name], **changes}), variant)
    scramble(layer)
    return layer


@variants
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_layer_equals_the_per_sample_loop_with_its_own_mixture(variant: Variant, name: str) -> None:
    layer = make(variant, name).double().eval()
    x = torch.randn(3, layer.geometry.in_channels, 11, 10, dtype=torch.float64)
    expected = per_sample_loop(x, layer.weight, layer.bias, layer.route(x), layer.geometry)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)


@variants
@pytest.mark.parametrize("name", ["3x3", "1x1", "depthwise"])
def test_a_batch_is_its_samples_one_by_one(variant: Variant, name: str) -> None:
    layer = make(variant, name).double().eval()
    x = torch.randn(4, 8, 11, 10, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.cat([layer(s.unsqueeze(0)) for s in x]), rtol=0, atol=1e-11)
    torch.testing.assert_close(layer(x)[1], layer(x[1]), rtol=0, atol=1e-11)  # unbatched


@variants
@pytest.mark.parametrize("name", GEOMETRIES)
def test_shapes_are_those_of_the_plain_layer(variant: Variant, name: str) -> None:
    plain, layer = nn.Conv2d(**GEOMETRIES[name]), make(variant, name)
    for batch in (0, 1, 2):
        x = torch.randn(batch, layer.geometry.in_channels, 9, 12)
        assert layer(x).shape == plain(x).shape


@variants
def test_a_batch_of_one_trains(variant: Variant) -> None:
    layer = make(variant).train()
    layer(torch.randn(1, 8, 6, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@variants
def test_state_survives_a_round_trip(variant: Variant) -> None:
    layer, other = make(variant).eval(), conditional_like(nn.Conv2d(**GEOMETRIES["3x3"]), variant).eval()
    set_temperature(layer, 3.0)
    x = torch.randn(2, 8, 6, 6)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer(x), other(x))


@variants
def test_autocast_keeps_the_router_exact(variant: Variant) -> None:
    layer = make(variant).eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, mixture = layer(x), layer.route(x)
    assert all(part is None or part.dtype == torch.float32 for part in mixture)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(variant: Variant, dtype: torch.dtype) -> None:
    layer = make(variant).eval()
    expected = layer(x := torch.randn(2, 8, 6, 6))
    actual = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.15)


@variants
@pytest.mark.parametrize("name", ["3x3", "1x1", "depthwise", "circular"])
def test_channels_last_and_sliced_inputs(variant: Variant, name: str) -> None:
    layer = make(variant, name).double().eval()
    x = torch.randn(3, 8, 8, 8, dtype=torch.float64)
    expected = layer(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-12)
    wide = torch.randn(3, 16, 8, 16, dtype=torch.float64)
    wide[:, ::2, :, ::2] = x
    torch.testing.assert_close(layer(wide[:, ::2, :, ::2]), expected, rtol=0, atol=1e-12)


@variants
def test_a_model_is_moved_to_channels_last_other_dtypes_and_devices(variant: Variant) -> None:
    model = nn.Sequential(make(variant), nn.Conv2d(12, 4, 1)).eval()
    x = torch.randn(2, 8, 6, 6)
    expected, weight = model(x), model[0].weight
    model.to(memory_format=torch.channels_last)
    assert model[0].weight is weight
    assert weight.is_contiguous()
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
    y = model(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    model[0].weight.grad = torch.ones_like(weight)
    moved = model.to(torch.float64, memory_format=torch.channels_last)[0].weight
    assert moved.dtype == moved.grad.dtype == torch.float64
    assert moved.shape == moved.grad.shape == (variant.experts, 12, 8, 3, 3)
    assert model.to("meta")[0].weight.is_meta
    assert model.to_empty(device="cpu")[0].weight.shape == moved.shape


def test_module_parameters_can_be_swapped_on_conversion() -> None:
    layer = make(CondConv(experts=2))
    layer.weight.grad, weight = torch.ones_like(layer.weight), layer.weight
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to("cpu").to(memory_format=torch.channels_last)
        layer.weight.grad = None
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.weight is weight
    assert weight.dtype == torch.float64


def test_a_default_device_does_not_intercept_calls() -> None:
    assert not is_intercepted()
    with torch.device("cpu"):
        assert not is_intercepted()
        with FlopCounterMode(display=False):
            assert is_intercepted()


@variants
@pytest.mark.parametrize("name", ["3x3", "1x1", "depthwise"])
def test_export_with_a_dynamic_batch(variant: Variant, name: str) -> None:
    layer = make(variant, name).eval()
    program = torch.export.export(layer, (torch.randn(3, 8, 6, 6),), dynamic_shapes={"input": {0: dynamic_batch()}})
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8, 6, 6)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=1e-5)


@variants
def test_gradients_are_the_derivative(variant: Variant) -> None:
    layer = make(variant, in_channels=3, out_channels=2).double().train()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@variants
def test_a_linear_is_a_1x1_convolution(variant: Variant) -> None:
    torch.manual_seed(0)
    linear = conditional_like(nn.Linear(8, 5), variant).eval()
    scramble(linear)
    assert isinstance(linear, ConditionalLinear)
    conv = conditional_like(nn.Conv2d(8, 5, 1), variant).eval()
    conv.load_state_dict(linear.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(linear(x), conv(x[:, :, None, None])[:, :, 0, 0])
    torch.testing.assert_close(linear(x[0]), linear(x)[0])
    tokens = torch.randn(3, 6, 8)
    torch.testing.assert_close(linear(tokens), conv(tokens.mT.unsqueeze(-1)).squeeze(-1).mT)


@variants
def test_the_paper_form_is_the_same_function(variant: Variant) -> None:
    layer = make(variant)
    weight, bias = layer.paper_weights()
    other = conditional_like(nn.Conv2d(**GEOMETRIES["3x3"]), variant)
    other.router.load_state_dict(layer.router.state_dict())
    other.load_paper_weights(weight, bias)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(layer.eval()(x), other.eval()(x), rtol=1e-6, atol=1e-6)


def test_fresh_experts_mix_to_the_distribution_of_a_plain_layer() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 64, 3)
    for variant in EVERY_VARIANT:
        mixed = conditional_like(plain, variant).weight.mean(0)
        assert mixed.std().item() == pytest.approx(plain.weight.std().item(), rel=0.03)


def test_it_inherits_dtype_mode_and_frozen_weights() -> None:
    frozen = nn.Conv2d(8, 8, 3, dtype=torch.bfloat16).eval().requires_grad_(False)
    layer = conditional_like(frozen, ODConv(experts=2))
    assert not layer.training
    assert layer.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in layer.parameters())


def test_set_temperature_sets_the_routers_that_have_one() -> None:
    model = nn.Sequential(*(conditional_like(nn.Conv2d(4, 4, 3), v) for v in (CondConv(), DynamicConv(), ODConv())))
    assert set_temperature(model, 30.0) == 2
    assert [float(m.router.temperature) for m in model[1:]] == [30.0, 30.0]
    assert list(conditional_layers(model)) == ["0", "1", "2"]
    for wrong in (0, "a", 1e39, float("nan"), True):
        with pytest.raises(InputError, match="The temperature is"):
            set_temperature(model, wrong)  # type: ignore[arg-type]


def test_an_error_of_a_wrong_input_says_what_is_allowed() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 4, 6, 6\)(.|\n)*\[B, 8, H, W\]"):
        make(CondConv())(torch.randn(2, 4, 6, 6))
    with pytest.raises(InputError, match=r"shape \(2, 4\)(.|\n)*last dimension must be 8"):
        conditional_like(nn.Linear(8, 5), CondConv())(torch.randn(2, 4))


@variants
@pytest.mark.parametrize("implementation", ["auto", "blockwise", "loop"])
@pytest.mark.parametrize("recording", [True, False])
def test_integers_are_an_error(variant: Variant, implementation: str, recording: bool) -> None:
    """``nn.Conv2d`` raises for them too; kernels in their dtype would be zeros, and so the outputs."""
    layer, linear = make(variant), ConditionalLinear(8, 4, variant=variant)
    layer.implementation = linear.implementation = implementation
    for batch, dtype in ((1, torch.uint8), (2, torch.int64)):
        with torch.set_grad_enabled(recording):
            with pytest.raises(InputError, match=rf"(?s)input of {dtype}.*It takes floats.*Try: x.to\(torch.float32\)"):
                layer(torch.full((batch, 8, 5, 5), 200, dtype=dtype))
            with pytest.raises(InputError, match=rf"input of {dtype}"):
                linear(torch.full((batch, 8), 200, dtype=dtype))


@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
def test_compile_has_no_graph_break(variant: Variant) -> None:
    layer = make(variant).eval()
    torch._dynamo.reset()  # its limit of recompilations counts the layers of other tests
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 8, 6, 6)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
def test_shapes_alone_on_the_meta_device(variant: Variant) -> None:
    layer = make(variant).to("meta")
    for batch in (1, 3):
        assert layer(torch.empty(batch, 8, 6, 6, device="meta")).shape == (batch, 12, 6, 6)


@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
def test_a_model_can_read_the_geometry_off_its_layer(variant: Variant) -> None:
    """timm's DaViT pads by ``self.conv.kernel_size``."""
    plain = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), dilation=1, groups=2)
    layer = copy.deepcopy(conditional_like(plain, variant))
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(plain, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = layer.no_such_name


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@variants
@pytest.mark.parametrize("name", TRACED)
def test_a_jit_trace_of_one_image_computes_every_batch(variant: Variant, name: str) -> None:
    """A ``TracerWarning`` would fail the test too: nothing is decided by a recorded size."""
    layer = make(variant, name).double().eval()
    x = torch.randn(4, layer.geometry.in_channels, 11, 9, dtype=torch.float64)
    for implementation in ("auto", "plain"):
        layer.implementation = implementation
        with torch.no_grad():
            traced = torch.jit.trace(layer, (x[:1],))
        layer.implementation = "auto"
        for batch in (1, 2, 4):
            torch.testing.assert_close(traced(x[:batch]), layer(x[:batch]), rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)], ids=str)
def test_a_jit_trace_of_a_linear_layer_computes_every_batch(shape: tuple[int, ...]) -> None:
    layer = conditional_like(nn.Linear(8, 5), CondConv(experts=4)).double().eval()
    scramble(layer)
    with torch.no_grad():
        traced = torch.jit.trace(layer, (torch.randn(1, *shape, dtype=torch.float64),))
    x = torch.randn(4, *shape, dtype=torch.float64)
    torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=1e-11)
