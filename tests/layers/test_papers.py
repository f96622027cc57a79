"""The layers compared with the equations of their papers, and CondConv with timm's implementation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from condconv_surgery.layers import CondConv2d, ConvGeometry, DynamicConv2d, ODConv2d
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv
from tests.geometries import GEOMETRIES, without_bias
from tests.reference import SeedODConv2d
from tests.variant_cases import scramble

SQUARE_WITH_ALL_HEADS = [name for name in GEOMETRIES if name != "no bias"]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", SQUARE_WITH_ALL_HEADS)
def test_the_seed_odconv_is_one_configuration(name: str) -> None:
    torch.manual_seed(0)
    geometry = ConvGeometry.make(**without_bias(GEOMETRIES[name]))
    seed = SeedODConv2d(geometry)
    variant = ODConv(experts=3, reduction=4, min_hidden=1, norm="none", activation="none", heads="all")
    ours = ODConv2d(**GEOMETRIES[name], variant=variant)
    ours.load_paper_weights(seed.weight.detach(), seed.bias.detach().expand(3, -1))
    theirs_to_ours = {"fc": "reduce", "fc_as": "spatial", "fc_ac": "channel", "fc_af": "filter", "fc_an": "kernel"}
    for theirs, mine in theirs_to_ours.items():
        getattr(ours.router, mine).load_state_dict(getattr(seed, theirs).state_dict())
    x = torch.randn(3, geometry.in_channels, 11, 10)
    torch.testing.assert_close(ours(x), seed(x), rtol=1e-5, atol=1e-5)


def test_condconv_is_the_text_and_a_mixture_of_experts() -> None:
    """sigmoid(GAP(x) R); experts mixed; the batch stacked into channels; equal to a mixture of expert outputs."""
    torch.manual_seed(0)
    layer = CondConv2d(8, 12, 3, padding=1, bias=False, variant=CondConv(experts=4))
    scramble(layer)
    x = torch.randn(5, 8, 9, 9)
    weight, _ = layer.paper_weights()
    r = torch.sigmoid(F.adaptive_avg_pool2d(x, 1).flatten(1) @ layer.router.linear.weight.T + layer.router.linear.bias)
    kernels = torch.einsum("be,eoihw->boihw", r, weight)
    stacked = F.conv2d(x.reshape(1, 5 * 8, 9, 9), kernels.reshape(5 * 12, 8, 3, 3), padding=1, groups=5).view(
        5, 12, 9, 9
    )
    experts = torch.stack([F.conv2d(x, w, padding=1) for w in weight], dim=1)
    torch.testing.assert_close(layer(x), stacked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), torch.einsum("be,beohw->bohw", r, experts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_condconv_equals_timm(groups: int) -> None:
    timm_layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    theirs = timm_layers.CondConv2d(8, 16, 3, padding=1, groups=groups, bias=True, num_experts=4)
    ours = CondConv2d(8, 16, 3, padding=1, groups=groups, variant=CondConv(experts=4))
    scramble(ours)
    ours.load_paper_weights(
        theirs.weight.detach().view(4, *ours.geometry.weight_shape), theirs.bias.detach().view(4, 16)
    )
    x = torch.randn(3, 8, 7, 7)
    routing = torch.sigmoid(ours.router.linear(x.mean((2, 3))))
    torch.testing.assert_close(ours(x), theirs(x, routing), rtol=1e-5, atol=1e-5)


def test_dynamicconv_is_its_equation() -> None:
    torch.manual_seed(0)
    layer = DynamicConv2d(8, 12, 3, variant=DynamicConv(experts=4, temperature=30.0))
    scramble(layer)
    x = torch.randn(2, 8, 7, 7)
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
    router = layer.router
    assert router.reduce.out_features == 2  # I / 4
    hidden = (pooled @ router.reduce.weight.T + router.reduce.bias).clamp(min=0)
    pi = ((hidden @ router.linear.weight.T + router.linear.bias) / 30.0).softmax(1)
    expected = torch.stack(
        [
            F.conv2d(x[b : b + 1], (pi[b] @ layer.weight.flatten(1)).view(12, 8, 3, 3), pi[b] @ layer.bias)[0]
            for b in range(2)
        ]
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_odconv_follows_the_authors_attention() -> None:
    """Their hidden width, batch norm, doubled sigmoids, all divided by the temperature, written out in full."""
    torch.manual_seed(0)
    layer = ODConv2d(512, 24, 3, padding=1, variant=ODConv(experts=4, temperature=2.0)).eval()
    scramble(layer)
    r = layer.router
    assert r.reduce.out_features == 32  # max(int(512 / 16), 16)
    assert r.reduce.bias is None
    x = torch.randn(2, 512, 5, 5)
    h = F.adaptive_avg_pool2d(x, 1).flatten(1) @ r.reduce.weight.T
    h = (h - r.norm.running_mean) / (r.norm.running_var + 1e-5).sqrt() * r.norm.weight + r.norm.bias
    h = h.clamp(min=0)

    def head(part: nn.Linear) -> torch.Tensor:
        return (h @ part.weight.T + part.bias) / 2.0

    weight, bias = layer.paper_weights()
    channel, filters = torch.sigmoid(head(r.channel)), torch.sigmoid(head(r.filter))
    spatial, kernel = torch.sigmoid(head(r.spatial)).view(2, 3, 3), head(r.kernel).softmax(1)
    expected = []
    for b in range(2):
        w = (kernel[b] @ weight.flatten(1)).view(24, 512, 3, 3) * spatial[b] * channel[b][:, None, None]
        y = F.conv2d(x[b : b + 1], w, padding=1)[0] * filters[b][:, None, None]
        expected.append(y + (kernel[b] @ bias)[:, None, None])
    torch.testing.assert_close(layer(x), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_odconv_heads_are_absent_when_the_authors_leave_them_out() -> None:
    def heads(experts: int, *arguments: int, spatial: bool = True, **more: int) -> set[str]:
        router = ODConv2d(*arguments, **more, variant=ODConv(experts=experts, spatial=spatial)).router
        return {name for name in ("channel", "filter", "spatial", "kernel") if getattr(router, name) is not None}

    assert heads(4, 8, 12, 3) == {"channel", "filter", "spatial", "kernel"}
    assert heads(1, 8, 12, 3) == {"channel", "filter", "spatial"}
    assert heads(4, 8, 12, 1) == {"channel", "filter", "kernel"}
    assert heads(4, 8, 8, 3, groups=8) == {"channel", "spatial", "kernel"}
    assert heads(1, 8, 8, 3, groups=8) == {"channel", "spatial"}
    assert heads(4, 8, 12, 3, spatial=False) == {"channel", "filter", "kernel"}
    assert heads(1, 8, 8, 3, groups=8, spatial=False) == {"channel"}
    assert ODConv2d(8, 8, 3).router.reduce.out_features == 16  # never fewer
