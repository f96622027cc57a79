"""Conditional layers in place of subclasses of nn.Conv2d, compared with the subclass itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import CondConv2d, Mixture, conditional_like, plain_like
from condconv_surgery.layers.conv2d_subclasses import geometry_of
from condconv_surgery.ops.conditional_conv2d import conditional_conv2d
from condconv_surgery.ops.implementations import legal_implementations
from condconv_surgery.recipe import VARIANTS, CondConv, Variant
from condconv_surgery.reporting.measure.profile import profile
from tests.dynamic_batch import dynamic_batch
from tests.variant_cases import scramble

timm_layers = pytest.importorskip("timm.layers")

SAME: dict[str, dict] = {
    "3x3": dict(kernel_size=3),
    "strided": dict(kernel_size=3, stride=2),
    "even": dict(kernel_size=(4, 2), stride=(1, 3)),
    "dilated": dict(kernel_size=3, stride=2, dilation=(2, 3)),
    "depthwise": dict(kernel_size=5, stride=2, groups=8),
    "groups": dict(kernel_size=3, stride=3, groups=2),
    "1x1": dict(kernel_size=1, stride=2),
    "steps over": dict(kernel_size=2, stride=5),
}
SIZES = [(12, 12), (11, 10), (7, 1)]


def same(name: str) -> nn.Conv2d:
    torch.manual_seed(0)
    return timm_layers.Conv2dSame(8, 8, **SAME[name]).double()


def one_by_one(plain: nn.Conv2d, x: Tensor, experts: Tensor, gate: Tensor) -> Tensor:
    """timm's own layer with the mixed kernel of each sample."""
    outputs = []
    for sample, weights in zip(x, gate, strict=True):
        kernel = torch.einsum("e,eoihw->oihw", weights, experts)
        outputs.append(torch.func.functional_call(plain, {"weight": kernel}, (sample[None],)))
    return torch.cat(outputs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SAME)
def test_every_implementation_pads_as_timm_by_the_size_of_the_input(name: str, size: tuple[int, int]) -> None:
    plain = same(name)
    geometry = geometry_of(plain)
    for batch in (1, 3):
        x = torch.randn(batch, 8, *size, dtype=torch.float64, requires_grad=True)
        experts = torch.randn(3, *geometry.weight_shape, dtype=torch.float64, requires_grad=True)
        gate = torch.rand(batch, 3, dtype=torch.float64, requires_grad=True)
        expected = one_by_one(plain, x, experts, gate) - plain.bias[:, None, None]
        wanted = torch.autograd.grad(expected.square().sum(), (x, experts, gate))
        for implementation in ["auto", *legal_implementations(batch, Mixture(gate), geometry)]:
            y = conditional_conv2d(x, experts, None, Mixture(gate), geometry, implementation)
            torch.testing.assert_close(y, expected)
            for found, want in zip(torch.autograd.grad(y.square().sum(), (x, experts, gate)), wanted, strict=True):
                torch.testing.assert_close(found, want)


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_converted_layer_is_the_same_function_and_back(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), same("strided").float(), nn.ReLU(), same("depthwise").float())
    variant: Variant = VARIANTS[kind](experts=4)
    conversion = cs.convert(model, variant, example=torch.randn(2, 3, 12, 12))
    assert [site.name for site in conversion.plan.to_convert] == ["1", "3"]
    layer = conversion.model[1]
    assert layer.padding == "tf_same"
    plain = plain_like(layer)
    assert type(plain) is timm_layers.Conv2dSame
    assert (plain.weight.shape, plain.stride, plain.dilation) == (model[1].weight.shape, (2, 2), (1, 1))
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(conversion.model.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


class Inherits(timm_layers.Conv2dSame):
    """Another name, the same forward."""


class Overrides(timm_layers.Conv2dSame):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_class_is_recognised_by_the_forward_that_runs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Inherits(8, 8, 3, 2), Overrides(8, 8, 3, 2))
    plan = cs.convert(model, CondConv(2), example=torch.randn(2, 3, 12, 12)).plan
    assert [site.name for site in plan.to_convert] == ["1"]
    assert "Overrides does not compute a plain convolution" in {s.name: s.reason for s in plan.skipped}["2"]


def test_costs_are_counted_at_the_positions_that_timm_computes() -> None:
    layer = conditional_like(timm_layers.Conv2dSame(8, 8, 3, 2, bias=False), CondConv(2))
    model = nn.Sequential(layer)
    report = profile(model, torch.randn(1, 8, 11, 10))
    assert report.layers[0].macs.convolution == 6 * 5 * 8 * 8 * 9


def test_a_saved_model_pads_the_same_when_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), same("strided").float())
    converted = cs.convert(model, CondConv(3), example=torch.randn(2, 3, 12, 12)).model.eval()
    scramble(converted)
    cs.save(converted, tmp_path / "m.safetensors")
    loaded = cs.load(tmp_path / "m.safetensors")
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        assert torch.equal(loaded(x), converted(x))


def test_it_compiles_and_exports_with_a_batch_of_any_size() -> None:
    layer = conditional_like(same("strided").float(), CondConv(3)).eval()
    scramble(layer)
    program = torch.export.export(layer, (torch.randn(2, 8, 11, 10),), dynamic_shapes=({0: dynamic_batch(2)},))
    x = torch.randn(5, 8, 11, 10)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()  # its limit of recompilations counts the layers of other tests
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for batch_size, size in enumerate(SIZES[:2], start=2):
        x = torch.randn(batch_size, 8, *size)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


def test_padding_that_is_not_supported_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="TensorFlow pads with zeros"):
        CondConv2d(4, 4, 3, padding="tf_same", padding_mode="reflect")
    layer = CondConv2d(4, 4, 3, 2, padding="tf_same")
    assert layer(torch.randn(1, 4, 9, 8)).shape == (1, 4, 5, 4)
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    with pytest.raises(InputError, match="timm is not installed"):
        plain_like(layer)
