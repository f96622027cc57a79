"""Layers that standardise their weight at each call, compared with timm's with the mixed kernel of each sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import condconv_surgery as cs
from condconv_surgery.layers import Mixture, conditional_like, plain_like
from condconv_surgery.recipe import VARIANTS, CondConv, ODConv
from condconv_surgery.reporting.measure.profile import profile
from tests.dynamic_batch import dynamic_batch
from tests.variant_cases import EVERY_VARIANT, scramble

timm_layers = pytest.importorskip("timm.layers")

CLASSES = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
GEOMETRY = {
    "3x3": dict(kernel_size=3),
    "strided": dict(kernel_size=3, stride=2),
    "depthwise": dict(kernel_size=3, groups=8),
    "1x1": dict(kernel_size=1),
}


def standardised(name: str, shape: str = "strided", bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    options = {"gamma": 1.7} if name.startswith("Scaled") else {}
    plain = getattr(timm_layers, name)(8, 8, **GEOMETRY[shape], bias=bias, eps=1e-3, **options)
    if options:
        nn.init.uniform_(plain.gain, 0.5, 2.0)
    return plain


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", GEOMETRY)
@pytest.mark.parametrize("name", CLASSES)
def test_the_mixed_kernel_is_standardised_as_timm_standardises_a_kernel(name: str, shape: str, batch: int) -> None:
    plain = standardised(name, shape, bias=False).double()
    layer = conditional_like(plain, CondConv(3)).double()
    x = torch.randn(batch, 8, 11, 10, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(batch, 3, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(layer.weight, 0.3)

    def of_timm(sample: Tensor, weights: Tensor) -> Tensor:
        kernel = torch.einsum("e,eoihw->oihw", weights, layer.weight)
        return torch.func.functional_call(plain, {"weight": kernel}, (sample[None],))

    expected = torch.cat([of_timm(*pair) for pair in zip(x, gate, strict=True)])
    found = layer(x, Mixture(gate))
    torch.testing.assert_close(found, expected)
    leaves = [x, gate, layer.weight]
    pairs = [*zip(leaves, leaves, strict=True)]
    if layer.standardisation.gain is not None:
        pairs.append((layer.standardisation.gain, plain.gain))
    ours = torch.autograd.grad(found.square().sum(), [mine for mine, _ in pairs])
    theirs = torch.autograd.grad(expected.square().sum(), [other for _, other in pairs])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.view_as(mine))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
def test_a_converted_model_is_the_same_function_saved_and_loaded(
    variant: cs.recipe.Variant, name: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), standardised(name), nn.ReLU(), standardised(name, "3x3")).double()
    conversion = cs.convert(model, variant, example=torch.randn(2, 3, 12, 12, dtype=torch.float64))
    assert [site.name for site in conversion.plan.to_convert] == ["1", "3"]
    converted = conversion.model.eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)  # in float32 a standardised kernel amplifies rounding
    torch.testing.assert_close(converted(x), model.eval()(x), rtol=0, atol=1e-11)
    scramble(converted)
    cs.save(converted, tmp_path / "m.safetensors")
    # a file rebuilds timm's layer, and with it the scale, which may differ in its last bit
    torch.testing.assert_close(cs.load(tmp_path / "m.safetensors")(x), converted(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", CLASSES)
def test_the_plain_layer_is_timms_again(name: str) -> None:
    plain = standardised(name)
    again = plain_like(conditional_like(plain, CondConv(2)))
    assert type(again) is type(plain)
    for attribute in ("eps", "scale", "stride", "same_pad"):
        assert getattr(again, attribute, None) == pytest.approx(getattr(plain, attribute, None))
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }


@pytest.mark.parametrize("variant", [kind(experts=4) for kind in VARIANTS.values()], ids=str)
def test_costs_are_what_torch_counts(variant: cs.recipe.Variant) -> None:
    layer = conditional_like(standardised("ScaledStdConv2d"), variant)
    model, x = nn.Sequential(layer).eval(), torch.randn(1, 8, 11, 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    found = profile(model, x)
    assert found.macs.total == counter.get_total_flops() // 2
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.parameters_before == sum(p.numel() for p in plain_like(layer).parameters())


def test_it_learns_in_autocast_compiles_and_exports() -> None:
    layer = conditional_like(standardised("ScaledStdConv2d"), ODConv(3)).eval()
    scramble(layer)
    x = torch.randn(4, 8, 11, 10)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    torch._dynamo.reset()  # its limit of recompilations counts the layers of other tests
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: dynamic_batch(2)},))
    torch.testing.assert_close(program.module()(x[:3]), expected[:3], rtol=1e-4, atol=1e-5)


def test_training_moves_only_the_direction_of_a_filter() -> None:
    """As of timm's layer: the gradient is orthogonal to the mean and to the mixed filter itself."""
    layer = conditional_like(standardised("StdConv2d", bias=False), CondConv(4)).double()
    layer.standardisation.eps = 0.0
    nn.init.normal_(layer.weight)
    layer(torch.randn(3, 8, 11, 10, dtype=torch.float64)).square().mean().backward()
    grad = layer.weight.grad
    assert grad.abs().max() > 1e-4
    assert grad.sum((2, 3, 4)).abs().max() < 1e-12  # of each expert and filter, by the centring
    assert (grad * layer.weight).sum((0, 2, 3, 4)).abs().max() < 1e-12  # of each filter: a common factor does nothing
