"""Published figures: parameters and MACs of the papers' networks, made by converting torchvision's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torchvision
from torch import nn

from condconv_surgery import CondConv, ODConv, convert
from condconv_surgery.reporting.measure.profile import profile


def build(name: str, **options: object) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **options).eval()


def odconv_resnet(name: str, experts: int) -> nn.Module:
    return convert(build(name), ODConv(experts), exclude=["*downsample*"], prove=False).model


def odconv_mobilenet(width: float) -> Callable[[int], nn.Module]:
    return lambda experts: convert(build("mobilenet_v2", width_mult=width), ODConv(experts), prove=False).model


PUBLISHED = {  # ODConv, table 1 and 2: millions of parameters without, with 1 and with 4 experts
    "resnet18": (lambda n: odconv_resnet("resnet18", n), 11.69, {1: 11.94, 4: 44.90}),
    "resnet50": (lambda n: odconv_resnet("resnet50", n), 25.56, {1: 28.64, 4: 90.67}),
    "resnet101": (lambda n: odconv_resnet("resnet101", n), 44.55, {1: 50.82, 2: 90.44}),
    "mobilenet_v2": (odconv_mobilenet(1.0), 3.50, {1: 4.94, 4: 11.51}),
    "mobilenet_v2 0.75": (odconv_mobilenet(0.75), 2.64, {1: 3.51, 4: 7.50}),
    "mobilenet_v2 0.5": (odconv_mobilenet(0.5), 1.97, {1: 2.43, 4: 4.44}),
}


SLOW = ("resnet101",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PUBLISHED])
def test_published_parameters_of_odconv(name: str) -> None:
    make, before, after = PUBLISHED[name]
    for experts, millions in after.items():
        found = profile(make(experts))
        assert found.parameters_before / 1e6 == pytest.approx(before, abs=0.006)
        assert found.parameters / 1e6 == pytest.approx(millions, abs=0.006)


def test_published_macs_of_condconv() -> None:
    """CondConv table 1: MobileNetV2 301 M, ResNet-50 4093 -> 4213 M with 8 experts in the last stage, within 1%."""
    assert profile(build("mobilenet_v2")).macs.total / 1e6 == pytest.approx(301, rel=0.01)
    resnet = convert(build("resnet50"), CondConv(8), include=["layer4.*"], prove=False)
    found = profile(resnet.model)
    assert found.macs_before / 1e6 == pytest.approx(4093, rel=0.01)
    assert found.macs.total / 1e6 == pytest.approx(4213, rel=0.01)


def test_mobilenet_of_condconv_costs_what_the_paper_says() -> None:
    """CondConv table 1: 301 -> 329 M MAdds, 8 experts. That is all layers but the stem, the classifier with them."""
    conversion = convert(build("mobilenet_v2"), CondConv(8), classifier=True, prove=False)
    found = profile(conversion.model)
    assert len(conversion.plan.to_convert) == 52
    assert (found.macs_before, found.macs.total) == (300_774_272, 328_669_888)


def test_mobilenet_with_a_router_for_each_of_its_last_six_blocks() -> None:
    """As CondConv's networks are described: last 6 blocks and classifier, 8 experts. Its classifier has no bias."""
    model = build("mobilenet_v2")
    model.classifier[1] = nn.Linear(1280, 1000, bias=False)  # type: ignore[index]
    include = ["features.1[2-7].*", "classifier.1"]
    by_block = CondConv(8, routing="block")
    found = profile(convert(model, by_block, include=include, classifier=True, prove=False).model)
    assert found.parameters == 22_877_496
    assert sum(layer.kind == "router" for layer in found.layers) == 6, "each once, in a row of its own"
    assert found.macs.total == pytest.approx(329e6, rel=0.02)


def test_a_vit_has_its_published_macs() -> None:
    from torchvision.models import ViT_B_16_Weights

    published = ViT_B_16_Weights.IMAGENET1K_V1.meta["_ops"]  # 10^9 multiply-accumulates
    assert profile(build("vit_b_16")).macs.total / 1e9 == pytest.approx(published, rel=1e-3)
