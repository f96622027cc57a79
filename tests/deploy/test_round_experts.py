"""Experts in int8 and bfloat16 that are mixed as they are: the function of their float values, everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import condconv_surgery as cs
from condconv_surgery import native
from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, conditional_layers
from condconv_surgery.layers.weight_forms.weight_standardisation import WeightStandardisation
from condconv_surgery.models.layouts.layout_registry import write_layout
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from condconv_surgery.reporting import profile as cost_of
from condconv_surgery.reporting.measure.expert_similarity import measure_experts
from condconv_surgery.training import finetune
from tests.geometries import GEOMETRIES
from tests.images import write_images
from tests.small_networks import small_net
from tests.variant_cases import EVERY_VARIANT, scramble

PRECISIONS = ("int8", "bfloat16")


@pytest.fixture(params=["with the kernels", "without them"])
def kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    wanted, before = request.param == "with the kernels", native.is_enabled()
    if wanted and not before:
        pytest.skip("the kernels are not built")
    if not wanted:
        native.disable()
    yield wanted
    if before:
        native.enable()


def trained(layer: nn.Module, seed: int = 0) -> nn.Module:
    """Experts that differ by much, and routers that route."""
    scramble(layer, seed)
    generator = torch.Generator().manual_seed(seed)
    for inner in conditional_layers(layer).values():
        inner.weight.data = torch.randn(inner.weight.shape, generator=generator)
    return layer.eval()


def with_float_experts(rounded: nn.Module, original: nn.Module) -> nn.Module:
    """The original with the values that the rounded experts stand for, as ordinary floats."""
    exact, values = copy.deepcopy(original), conditional_layers(rounded)
    for name, layer in conditional_layers(exact).items():
        layer.weight.data = values[name].float_experts().detach().clone()
    return exact


def assert_equal_values(actual: Tensor, expected: Tensor, of: float = 2e-6) -> None:
    assert actual.dtype == expected.dtype
    assert float((actual - expected).abs().max()) <= of * float(expected.abs().max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_every_geometry_is_that_of_the_float_values(geometry: str, precision: Any, kernels: bool) -> None:
    for variant in EVERY_VARIANT:
        layer = trained(nn.Sequential(ConditionalConv2d(**GEOMETRIES[geometry], variant=variant)))
        rounded = cs.round_experts(layer, precision).model
        exact = with_float_experts(rounded, layer)
        assert rounded[0].weight.dtype == getattr(torch, precision)
        for batch in (1, 6):
            x = torch.randn(batch, layer[0].in_channels, 11, 13)
            with torch.no_grad():
                assert_equal_values(rounded(x), exact(x))
        assert_equal_values(rounded(x).detach(), exact(x).detach())  # autograd records the routers


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "case",
    [
        (40, 70, 3, 1, 1, 19),  # panels that are not full, several chunks of channels
        (150, 33, 1, 1, 1, 7),
        (64, 96, 5, 1, 2, 15),
        (96, 96, 3, 4, 1, 14),
        (70, 70, 7, 70, 1, 17),
    ],
    ids=str,
)
def test_layers_of_several_blocks(case: tuple[int, ...], precision: Any, kernels: bool) -> None:
    inputs, outputs, kernel, groups, stride, side = case
    variant = CondConv(experts=5)
    layer = ConditionalConv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, variant=variant)
    model = trained(nn.Sequential(layer))
    rounded = cs.round_experts(model, precision).model
    exact = with_float_experts(rounded, model)
    for batch in (1, 2, 9):
        x = torch.randn(batch, inputs, side, side)
        with torch.no_grad():
            assert_equal_values(rounded(x), exact(x))


@pytest.mark.skipif(not native.is_enabled(), reason="the kernels are not built")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("variant", "operator"),
    [(CondConv(4), "cpp_sigmoid_layer"), (DynamicConv(4), "cpp_attention_layer"), (ODConv(4), "cpp_attention_layer")],
    ids=str,
)
def test_the_kernels_read_the_experts_as_they_are(variant: Variant, operator: str, precision: Any) -> None:
    """No operator makes floats of them, whether the layer routes for itself or is given a mixture."""
    exact = ConditionalConv2d(16, 24, 3, padding=1, bias=False, variant=variant)
    layer = cs.round_experts(trained(exact), precision).model
    x = torch.randn(1, 16, 12, 12)
    with torch.no_grad():
        mixture = layer.route(x)
    for call, wanted in ((lambda: layer(x), operator), (lambda: layer(x, mixture), "cpp_convolve_rounded")):
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
            call()
        names = {event.key for event in seen.key_averages()}
        assert f"condconv_surgery::{wanted}" in names
        assert not names & {"aten::_to_copy", "aten::mul"}


def test_memory_and_error_are_stated() -> None:
    model = trained(nn.Sequential(ConditionalConv2d(32, 64, 3, variant=CondConv(4))))
    weight = model[0].weight.detach()
    rounding = cs.round_experts(model, "int8")
    step = weight.flatten(2).abs().amax(2) / 127
    error = (rounding.model[0].float_experts() - weight).abs()
    assert (error <= step[:, :, None, None, None] / 2 + 1e-7).all()
    assert rounding.error == pytest.approx(float(error.max()), rel=1e-6)
    assert (rounding.layers, rounding.precision) == (1, "int8")
    assert rounding.bytes_before == weight.numel() * 4
    assert rounding.bytes_after == weight.numel() + 4 * 64 * 4  # and a scale for each filter of each expert
    held = [*rounding.model[0].parameters(recurse=False), *rounding.model[0].rounding.buffers()]
    assert sum(t.nbytes for t in held) == rounding.bytes_after + 4 * 64 * 4  # the biases
    assert cs.round_experts(model, "bfloat16").bytes_after == weight.numel() * 2
    assert torch.equal(model[0].weight, weight)  # a copy was rounded
    assert cs.round_experts(model, "int8", inplace=True).model is model
    assert model[0].weight.dtype == torch.int8


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_weights_are_those_of_a_rounded_file(tmp_path: Path, precision: Any) -> None:
    model = cs.convert(small_net(), CondConv(4), example=torch.randn(2, 3, 16, 16)).model
    trained(model)
    cs.save(model, tmp_path / "model.safetensors", precision=precision)
    file = cs.load(tmp_path / "model.safetensors", trust="tests")
    loaded = conditional_layers(file)
    rounded = conditional_layers(cs.round_experts(model, precision).model)
    again = conditional_layers(cs.round_experts(file, precision).model)
    for name, layer in rounded.items():
        assert torch.equal(layer.float_experts(), loaded[name].weight)
        assert torch.equal(layer.weight, again[name].weight)  # a file that was rounded is rounded without loss


def standardised() -> nn.Module:
    layer = ConditionalConv2d(8, 12, 3, variant=CondConv(3))
    layer.standardisation = WeightStandardisation(1e-5, 0.7)
    return nn.Sequential(layer)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def by_block() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(6, 6, 1), Block())
    variant = CondConv(experts=3, routing="block")
    return cs.convert(model, variant, blocks=["1"], example=torch.randn(2, 6, 9, 9)).model


def with_a_classifier() -> nn.Module:
    return cs.convert(small_net(), ODConv(2), classifier=True, example=torch.randn(2, 3, 16, 16)).model


def folded() -> nn.Module:
    model = cs.convert(small_net(), CondConv(3), example=torch.randn(2, 3, 16, 16), skip_stem=False).model
    return cs.fold(model, example=torch.randn(2, 3, 16, 16)).model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [standardised, by_block, with_a_classifier, folded])
def test_every_kind_of_layer(make: Callable[[], nn.Module], precision: Any, kernels: bool) -> None:
    model = trained(make())
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d | ConditionalConv2d))
    rounded = cs.round_experts(model, precision).model
    exact = with_float_experts(rounded, model)
    for batch in (1, 5):
        x = torch.randn(batch, channels, 16, 16)
        with torch.no_grad():
            assert_equal_values(rounded(x), exact(x), 1e-5)


def test_memory_formats_autocast_and_copies() -> None:
    model = trained(nn.Sequential(ConditionalConv2d(16, 16, 3, padding=1, variant=CondConv(4))))
    rounded = cs.round_experts(model, "int8").model
    exact, x = with_float_experts(rounded, model), torch.randn(3, 16, 9, 9)
    with torch.no_grad():
        y = rounded.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_equal_values(y, exact(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(rounded(x), exact(x))
        assert torch.equal(copy.deepcopy(rounded)(x), rounded(x))
        state = {name: tensor.clone() for name, tensor in rounded.state_dict().items()}
        other = cs.round_experts(trained(copy.deepcopy(model), seed=1), "int8").model
        other.load_state_dict(state)
        assert torch.equal(other(x), rounded(x))
        assert_equal_values(rounded.double()(x.double()), exact.double()(x.double()), 1e-6)


def test_gradients_reach_the_input_and_the_router() -> None:
    model = trained(nn.Sequential(ConditionalConv2d(8, 8, 3, variant=CondConv(3))))
    rounded = cs.round_experts(model, "int8").model
    exact = with_float_experts(rounded, model)
    x, again = (torch.ones(2, 8, 9, 9, requires_grad=True) for _ in range(2))
    rounded(x).square().sum().backward()
    exact(again).square().sum().backward()
    assert_equal_values(x.grad, again.grad, 1e-5)
    for mine, theirs in zip(rounded[0].router.parameters(), exact[0].router.parameters(), strict=True):
        assert_equal_values(mine.grad, theirs.grad, 1e-5)


@pytest.mark.slow
def test_compilers_and_exporters_take_it() -> None:
    model = trained(nn.Sequential(ConditionalConv2d(8, 8, 3, variant=ODConv(3))))
    rounded, x = cs.round_experts(model, "int8").model, torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        expected = rounded(x)
        assert_equal_values(torch.compile(rounded, fullgraph=True)(x), expected)
        program = torch.export.export(rounded, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=1024)},))
        assert_equal_values(program.module()(x), expected)
        assert program.state_dict["0.weight"].dtype == torch.int8


def test_reports_read_the_float_values() -> None:
    model = trained(cs.convert(small_net(), CondConv(4), example=torch.randn(2, 3, 16, 16)).model)
    rounded = cs.round_experts(model, "int8").model
    exact = with_float_experts(rounded, model)
    assert measure_experts(rounded) == measure_experts(exact)
    one, other = (cost_of(net, torch.zeros(1, 3, 16, 16)) for net in (rounded, exact))
    assert one.macs == other.macs
    assert sum(p.numel() for p in rounded.parameters()) == sum(p.numel() for p in exact.parameters())
    mine, theirs = (next(row for row in table.layers if row.conditional) for table in (one, other))
    assert mine.weight_bytes_before == theirs.weight_bytes_before
    assert mine.weight_bytes < 0.5 * theirs.weight_bytes


@pytest.mark.parametrize("what", ["finetune", "fold", "collapse", "export", "save", "write_layout", "round_experts"])
def test_what_needs_exact_experts_says_so(what: str, tmp_path: Path) -> None:
    model = cs.convert(small_net(), ODConv(4), example=torch.randn(2, 3, 16, 16)).model
    rounded = cs.round_experts(model, "int8").model
    data = write_images(tmp_path / "data", each=3)
    options = {"data": {"image_size": 16, "batch_size": 4, "workers": 0}, "schedule": {"epochs": 1}}
    uses: dict[str, Callable[[nn.Module], object]] = {
        "finetune": lambda m: finetune(m, options, data=data, output=tmp_path / "run"),
        "fold": lambda m: cs.fold(m, example=torch.randn(2, 3, 16, 16)),
        "collapse": lambda m: cs.collapse(m, data=[(torch.randn(2, 3, 16, 16), torch.zeros(2).long())]),
        "export": lambda m: cs.export(m, tmp_path / "model.onnx", size=16),
        "save": lambda m: cs.save(m, tmp_path / "model.safetensors"),
        "write_layout": lambda m: write_layout(m, "odconv", tmp_path / "odconv.safetensors"),
        "round_experts": lambda m: cs.round_experts(m),
    }
    with pytest.raises(InputError, match=r"rounded, for inference: inner\.\n.*\n.*the model from before round_experts"):
        uses[what](rounded)
    assert not list(tmp_path.glob("*.onnx")) + list(tmp_path.glob("*.safetensors"))
    if what != "write_layout":  # its formats are those of other networks
        uses[what](model)  # as the advice says


def test_a_plain_model_an_unknown_precision_and_weights_that_are_not_finite() -> None:
    with pytest.raises(InputError, match="no conditional layer"):
        cs.round_experts(small_net())
    model = trained(nn.Sequential(ConditionalConv2d(8, 8, 3, variant=CondConv(3))))
    with pytest.raises(InputError, match=r"precision is 'int4'\.\n.*int8, bfloat16"):
        cs.round_experts(model, "int4")  # type: ignore[arg-type]
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinite.*\n.*\n.*the model as it is"):
        cs.round_experts(model)
    with pytest.raises(InputError, match=r"no experts would get smaller.*\n.*\n.*the model as it is"):
        cs.round_experts(trained(nn.Sequential(ConditionalConv2d(8, 8, 3, variant=CondConv(3)))).bfloat16(), "bfloat16")
