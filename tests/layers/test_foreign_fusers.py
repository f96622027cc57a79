"""Fusers of other packages, copied under their names: each raises our error, or is exact; none is silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import Variant

Fuser = Callable[[Any, nn.BatchNorm2d], Any]

REFUSAL = r"condconv_surgery.fold\(model\)"


class Net(nn.Module):
    """A plain convolution without a batch norm before a converted one with one."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=bias), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(self.stem(x)))
        return out


def converted(variant: Variant, bias: bool = False) -> Any:
    torch.manual_seed(0)
    net, x = Net(bias), torch.randn(4, 3, 16, 16)
    for _ in range(5):
        net(3 * x + 1)
    return cs.convert(net.eval(), variant, example=x).model.eval()


def fuse_conv_and_bn(conv: Any, bn: nn.BatchNorm2d) -> Any:
    """As in YOLOv5 and in Ultralytics before 8.4."""
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    scale = torch.diag(bn.weight.div(torch.sqrt(bn.eps + bn.running_var)))
    fused.weight.data = torch.mm(scale, conv.weight.view(conv.out_channels, -1)).view(fused.weight.shape)
    return fused


def fuse_conv_bn(module: nn.Module) -> nn.Module:
    """As in mmcv: goes by class."""
    last: Any = None
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if last is not None:
                module._modules[last], module._modules[name] = (
                    fuse_conv_bn_eval(module._modules[last], child),
                    nn.Identity(),
                )
                last = None
        elif isinstance(child, nn.Conv2d):
            last = name
        else:
            fuse_conv_bn(child)
    return module


def set_weights(conv: Any, bn: nn.BatchNorm2d) -> Any:
    """As in Ultralytics 8.4: no function of the list, and no attribute that is asked for it."""
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return conv


@pytest.mark.parametrize("variant", [cs.CondConv(4), cs.ODConv(1), cs.DynamicConv(8)], ids=lambda v: v.kind)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fuser", [fuse_conv_bn_eval, fuse_conv_and_bn])
def test_a_fuser_of_one_layer_is_refused(fuser: Fuser, bias: bool, variant: Variant) -> None:
    net = converted(variant, bias)
    with torch.no_grad(), pytest.raises(InputError, match=REFUSAL):
        fuser(net.conv, net.bn)


@pytest.mark.parametrize("variant", [cs.ODConv(1), cs.DynamicConv(8)], ids=lambda v: v.kind)
def test_a_weight_or_bias_of_another_shape_is_refused(variant: Variant) -> None:
    """One expert, or as many as output channels: the shapes of a fuser fit each other, but not the layer."""
    net = converted(variant)
    with torch.no_grad(), pytest.raises(InputError, match=rf"was set to one of shape[\s\S]*{REFUSAL}"):
        set_weights(net.conv, net.bn)


def test_a_fuser_that_passes_over_the_layer_is_refused() -> None:
    net = converted(cs.CondConv(4))
    stem = net.stem.weight.detach().clone()
    with torch.no_grad(), pytest.raises(InputError, match=rf"fuse_conv_bn was given[\s\S]*{REFUSAL}"):
        fuse_conv_bn(net)
    assert torch.equal(net.stem.weight, stem)
    assert isinstance(net.bn, nn.BatchNorm2d)


def test_the_advice_is_exact() -> None:
    net, x = converted(cs.CondConv(4)), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(cs.fold(net).model(x), net(x), rtol=1e-4, atol=1e-4)


def test_everything_else_reads_and_copies_the_layer() -> None:
    conv = converted(cs.CondConv(4), bias=True).conv
    twin = copy.deepcopy(conv)
    twin.weight = nn.Parameter(conv.weight.detach() * 2)
    twin.bias = nn.Parameter(conv.bias.detach() * 2)
    assert twin.out_channels == 8
    assert [name for name, _ in twin.named_children()] == ["router"]
    assert twin.load_state_dict(conv.state_dict(), assign=True).missing_keys == []
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(twin(x), conv(x))
    compiled = torch.compile(lambda x: conv(x) * conv.out_channels, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), conv(x) * 8)
