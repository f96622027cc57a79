"""Convolutions that pad by constant amounts, other ones on each side, as EfficientNets ported from TensorFlow do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.deploy import collapse
from condconv_surgery.errors import ProofError
from condconv_surgery.layers import ConditionalConv2d, Mixture, conditional_like, plain_like
from condconv_surgery.layers.conv2d_subclasses import PaddedConv2d, geometry_of
from condconv_surgery.ops.conditional_conv2d import conditional_conv2d
from condconv_surgery.ops.implementations import legal_implementations

AMOUNTS = [(0, 1, 0, 1), (2, 1, 0, 3), (1, 1, 2, 2), (0, 0, 0, 0)]


class StaticPadding(nn.Conv2d):
    """As in efficientnet_pytorch 0.7: the amounts follow from the size of the image."""

    def __init__(self, *args: object, amounts: tuple[int, int, int, int], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d(amounts) if any(amounts) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


NAME = f"{__name__}.StaticPadding"


@pytest.mark.parametrize("amounts", AMOUNTS, ids=str)
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"groups": 8}, {"padding": 1, "dilation": 2}], ids=str)
def test_every_implementation_pads_each_side(amounts: tuple[int, int, int, int], options: dict) -> None:
    torch.manual_seed(0)
    plain = StaticPadding(8, 8, 3, bias=False, amounts=amounts, **options).double()
    geometry = geometry_of(plain)
    x = torch.randn(3, 8, 11, 10, dtype=torch.float64, requires_grad=True)
    experts = torch.randn(2, *geometry.weight_shape, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(3, 2, dtype=torch.float64)
    kernels = torch.einsum("be,eoihw->boihw", gate, experts)
    samples = zip(x.split(1), kernels, strict=True)
    expected = torch.cat([torch.func.functional_call(plain, {"weight": kernel}, (one,)) for one, kernel in samples])
    wanted = torch.autograd.grad(expected.square().sum(), (x, experts))
    for implementation in ["auto", *legal_implementations(3, Mixture(gate), geometry)]:
        y = conditional_conv2d(x, experts, None, Mixture(gate), geometry, implementation)
        torch.testing.assert_close(y, expected)
        for found, want in zip(torch.autograd.grad(y.square().sum(), (x, experts)), wanted, strict=True):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("amounts", AMOUNTS, ids=str)
def test_the_plain_counterpart_pads_alike(amounts: tuple[int, int, int, int]) -> None:
    layer = conditional_like(StaticPadding(4, 8, 3, amounts=amounts), cs.CondConv(experts=2))
    plain = plain_like(layer)
    assert type(plain) is (PaddedConv2d if amounts in AMOUNTS[:2] else nn.Conv2d)
    assert geometry_of(plain) == layer.geometry


def network(amounts: tuple[int, int, int, int] = (0, 1, 0, 1)) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), StaticPadding(8, 8, 3, stride=2, amounts=amounts), nn.ReLU())


def test_an_asserted_class_is_converted_and_loads_without_it(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    net = network().eval()
    model = cs.convert(net, cs.CondConv(experts=2), example=x, subclasses=[NAME]).model
    assert isinstance(model[2], ConditionalConv2d)
    torch.testing.assert_close(model(x), net(x))
    cs.save(model, tmp_path / "m.safetensors")
    assert torch.equal(cs.load(tmp_path / "m.safetensors")(x), model(x))
    torch.testing.assert_close(collapse(model, x).model(x), net(x))


def test_a_class_that_pads_by_more_is_found_out() -> None:
    class Other(StaticPadding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 0, 0, 0)))

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Other(8, 8, 3, amounts=(0, 1, 0, 1)))
    name = f"{__name__}.{Other.__qualname__}"
    with pytest.raises(ProofError, match=r"does not compute what nn\.Conv2d computes"):
        cs.convert(net, cs.CondConv(experts=2), example=torch.randn(2, 3, 16, 16), subclasses=[name])


def test_efficientnet_pytorchs_class_needs_no_assertion(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("efficientnet_pytorch.utils")
    theirs = type("Conv2dStaticSamePadding", (nn.Conv2d,), {"__module__": module.__name__, **vars_of(StaticPadding)})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    net = network()
    net[2].__class__ = theirs
    x = torch.randn(2, 3, 16, 16)
    conversion = cs.convert(net.eval(), cs.CondConv(experts=2), example=x)
    assert [site.name for site in conversion.plan.to_convert] == ["2"]
    torch.testing.assert_close(conversion.model(x), net(x))


def vars_of(cls: type) -> dict:
    return {"forward": cls.forward}
