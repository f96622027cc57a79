"""Parameters and MACs against torch's own counter, the closed form, and published figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from condconv_surgery import CondConv, DynamicConv, ODConv, convert, load, report
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import InputSpec, Variant
from condconv_surgery.reporting import Profile, profile

ARCHITECTURES = {
    "alexnet": 96,
    "resnet18": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "densenet121": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "shufflenet_v2_x1_0": 64,
    "googlenet": 64,
}


def build(name: str, **options: object) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False}
    return torchvision.models.get_model(name, weights=None, **options).eval()


def counted(model: nn.Module, x: torch.Tensor) -> float:
    """torch's counter on a real forward pass; without the fused attention kernel, which it cannot see into."""
    with FlopCounterMode(display=False) as meter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(x)
    return meter.get_total_flops() / 2


def totals_are_sums(found: Profile, model: nn.Module) -> None:
    assert found.parameters == sum(p.numel() for p in model.parameters())
    tensors = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    assert found.weight_bytes == sum(tensors.values())
    rows = found.to_dict()["layers"]
    assert sum(row["parameters"] for row in rows) == found.parameters
    assert sum(row["macs"]["total"] for row in rows) == found.macs.total
    assert sum(row["macs"]["convolution"] for row in rows) == found.macs_before


WITH_EVERY_VARIANT = ("resnet18", "mobilenet_v3_small")
"""Dense, 1x1 and depthwise layers; the others differ in what is not converted."""

SLOW = ("densenet121", "regnet_y_400mf", "efficientnet_b0", "googlenet", "resnet101")


def some_slow(names: Iterable[str]) -> list[object]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


@pytest.mark.parametrize("name", some_slow(ARCHITECTURES))
def test_equals_the_counter(name: str) -> None:
    side = ARCHITECTURES[name]
    original = build(name)
    x = torch.randn(1, 3, side, side)
    spec = InputSpec(height=side, width=side)
    static = profile(original, spec)
    assert static.macs.total == counted(original, x)
    variants = (CondConv(4), ODConv(1), ODConv(4), DynamicConv(3))
    for variant in variants if name in WITH_EVERY_VARIANT else variants[2:3]:
        converted = convert(original, variant, example=x, prove=False).model
        found = profile(converted, spec)
        assert found.macs.total == counted(converted, x), variant
        assert (found.parameters_before, found.macs_before) == (static.parameters, static.macs.total)
        assert found.weight_bytes_before == static.weight_bytes
        totals_are_sums(found, converted)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "maxvit_t"])
def test_counts_attention_between_tokens(name: str) -> None:
    model = build(name)
    x = torch.randn(1, 3, 224, 224)
    found = profile(model)
    totals_are_sums(found, model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert found.macs.total == counted(model, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_the_cost_rule(experts: int) -> None:
    original = build("resnet18")
    conversion = convert(original, CondConv(experts), prove=False)
    weights = [original.get_submodule(site.name) for site in conversion.plan.to_convert]
    sizes = [(m.weight.numel(), m.in_channels) for m in weights if isinstance(m, nn.Conv2d)]
    found = profile(conversion.model)
    assert found.macs.mixing == sum(experts * size for size, _ in sizes)
    assert found.macs.routing == sum(experts * width for _, width in sizes)
    assert found.macs.attention == 0
    routers = sum(experts * width + experts for _, width in sizes)
    assert found.parameters - found.parameters_before == sum((experts - 1) * size for size, _ in sizes) + routers


def test_attention_is_the_heads_of_odconv_and_routing_the_rest_of_its_router() -> None:
    conversion = convert(build("resnet18"), ODConv(4), prove=False)
    routing = attention = 0
    for site in conversion.plan.to_convert:
        conv = site.module
        assert isinstance(conv, nn.Conv2d)
        hidden = max(conv.in_channels // 16, 16)
        positions = conv.kernel_size[0] ** 2 if conv.kernel_size[0] > 1 else 0
        attention += hidden * (conv.in_channels + conv.out_channels + positions)
        routing += conv.in_channels * hidden + hidden * 4
    found = profile(conversion.model).macs
    assert (found.routing, found.attention) == (routing, attention)


def test_odconv_without_experts_mixes_nothing() -> None:
    found = profile(convert(build("resnet18"), ODConv(1), prove=False).model)
    assert found.macs.mixing == 0
    assert found.macs.attention > 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tf_efficientnet_cc_b0_4e", 13_314_116),
        ("tf_efficientnet_cc_b0_8e", 24_013_284),
        ("tf_efficientnet_cc_b1_8e", 39_715_968),
    ],
)
def test_condconv_networks_of_timm(name: str, parameters: int) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    found = profile(model)
    assert found.parameters == parameters
    height, width = model.pretrained_cfg["input_size"][1:]
    assert found.macs.total == counted(model, torch.randn(1, 3, height, width))
    if name.endswith("b0_4e"):
        assert found.macs.total / 1e6 == pytest.approx(396.5, abs=0.05)


class Odd(nn.Module):
    """Shared, repeated and unused layers, a tied weight, and a product in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.first
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.first.weight
        self.unused = nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(self.again(self.first(x)))
        if float(x.abs().sum()) < 0:  # cannot run on the meta device
            return x
        return x.flatten(2).transpose(1, 2) @ self.scale


def test_shared_repeated_tied_and_unused_layers() -> None:
    model = Odd().eval()
    x = torch.randn(1, 4, 5, 7)
    for variant in (None, CondConv(2)):
        if variant is None:
            odd = model
        else:  # a tied weight is skipped
            model.tied.weight = torch.nn.Parameter(model.first.weight.detach().clone())
            odd = convert(model, variant, example=x, include=["first"], skip_stem=False).model
        found = profile(odd, x)
        totals_are_sums(found, odd)
        assert found.macs.total == counted(odd, x)
        rows = {layer.name: layer for layer in found.layers}
        assert rows["first"].calls == 2
        assert rows["unused"].calls == 0
        assert rows[""].macs.convolution == 35 * 16, "the product of the model itself"


def test_a_batch_counts_as_one_image_whatever_the_implementation() -> None:
    model = convert(build("resnet18"), CondConv(3), prove=False).model
    expected = profile(model, InputSpec(height=64, width=64))
    assert profile(model, torch.randn(5, 3, 64, 64)) == expected
    for module in model.modules():
        if hasattr(module, "execution"):
            module.implementation = "mix-outputs"
    assert profile(model, torch.randn(5, 3, 64, 64)).macs == expected.macs


def test_a_conditional_classifier() -> None:
    model = convert(build("resnet18"), CondConv(4), classifier=True, prove=False).model
    row = profile(model).layers[-1]
    assert (row.name, row.kind, row.experts) == ("fc", "condconv", 4)
    assert row.macs.convolution == 512 * 1000
    assert row.macs.mixing == 4 * (512 * 1000 + 1000)
    assert profile(model).macs.total == counted(model, torch.randn(1, 3, 224, 224))


def test_a_detector() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    images = [torch.rand(3, 320, 320)]
    assert profile(model, (images,)).macs.total == counted(model, images)  # type: ignore[arg-type]


def test_the_model_is_unchanged() -> None:
    model = build("resnet18").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report(model, inputs=torch.randn(2, 3, 64, 64))
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_input_that_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"does not run on an input of \[\(1, 5, 32, 32\)\]"):
        report(build("resnet18"), inputs=torch.randn(1, 5, 32, 32))


def test_a_lazy_layer() -> None:
    with pytest.raises(InputError, match="weight has no size yet"):
        report(nn.Sequential(nn.LazyConv2d(4, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_have_other_sizes_and_equal_macs(dtype: torch.dtype) -> None:
    model = convert(build("resnet18"), CondConv(2), prove=False).model
    expected = profile(model)
    found = profile(model.to(dtype))
    assert found.macs == expected.macs
    assert found.activation_bytes * 4 == expected.activation_bytes * torch.finfo(dtype).bits // 8


@pytest.mark.parametrize("variant", [CondConv(4), ODConv(2), DynamicConv(2)], ids=str)
def test_counts_without_a_value(variant: Variant) -> None:
    """A model without any values at all, on the meta device, has the same report: nothing was computed."""
    model = convert(build("resnet18"), variant, classifier=True, prove=False).model
    expected = report(model)
    found = report(model.to("meta"))
    assert found.profile == expected.profile
    assert found.cost == expected.cost


def test_convert_counts_with_the_profile_alone(
    condconv: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``condconv convert`` prints parameters and MACs: it measures no memory, latency, experts or routing."""

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("convert measured more than the profile")

    for name in ("measure_cost", "measure_experts", "measure_routing", "report"):
        monkeypatch.setattr(f"condconv_surgery.reporting.full_report.{name}", fail)
    monkeypatch.setattr("condconv_surgery.reporting.report", fail)
    for name in ("peak_activations", "measure_latency"):
        monkeypatch.setattr(f"condconv_surgery.reporting.measure.memory_and_latency.{name}", fail)
    source = ("torchvision:squeezenet1_1", "--weights", "none", "--input-size", 64, "--include", "features.12*")
    code, out, err = condconv("convert", *source, "-o", tmp_path / "m.safetensors", "--json")
    assert code == 0, err
    summary = json.loads(out)
    converted = profile(load(tmp_path / "m.safetensors"))
    assert summary["parameters"] == {"before": converted.parameters_before, "after": converted.parameters}
    assert summary["macs"] == {"before": converted.macs_before, "after": converted.macs.total}
