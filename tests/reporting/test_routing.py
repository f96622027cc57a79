"""Gate statistics on gates with known statistics, and on images whose class is their colour."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn

from condconv_surgery import CondConv, ODConv, convert, report
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers, conditional_like
from condconv_surgery.ops.mixture import Mixture
from condconv_surgery.recipe import InputSpec, Recipe, attach_recipe
from condconv_surgery.reporting.images.attention_statistics import attention_line, layer_attention
from condconv_surgery.reporting.images.collect_gates import collect_gates, outputs_with_mean_gates
from condconv_surgery.reporting.images.network_routing import measure_routing
from condconv_surgery.reporting.images.report_images import find_images
from condconv_surgery.reporting.images.routing_statistics import layer_routing
from condconv_surgery.reporting.measure.expert_similarity import measure_experts
from tests.images import write_images
from tests.variant_cases import scramble

SPEC = InputSpec(3, 16, 16, (0.5,) * 3, (0.25,) * 3, crop_fraction=1.0)


def one_hot(experts: list[int], count: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(experts), count).float()


def test_gates_that_are_the_class() -> None:
    labels = torch.tensor([0, 1, 2, 3] * 5)
    found = layer_routing("l", one_hot(labels.tolist()), labels, 4)
    assert found.used == pytest.approx(4)
    assert found.per_image == pytest.approx(1)
    assert found.information == pytest.approx(math.log(4))
    assert found.between == pytest.approx(1)
    assert found.variation == pytest.approx(0.75)
    assert torch.equal(torch.tensor(found.by_class), torch.eye(4))
    assert found.verdict == "uses 4.0 of 4 experts, by class"
    assert not found.static


def test_sigmoids_that_rise_together_are_conditioning_too() -> None:
    gates = torch.linspace(0.1, 0.4, 8)[:, None].expand(8, 4)
    found = layer_routing("l", gates, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 2)
    assert found.used == pytest.approx(4)
    assert found.variation > 0.1
    assert not found.static


def test_information_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=generator)
    experts = torch.randint(0, 4, (200,), generator=generator) * (labels > 0)
    found = layer_routing("l", one_hot(experts.tolist()), labels, 3)
    assert found.information == pytest.approx(mutual_info_score(labels, experts))


@pytest.mark.parametrize(
    ("gates", "verdict", "advice", "static"),
    [
        (torch.full((8, 4), 0.25), "hardly varies: static layer suffices", "static layer suffices", True),
        (one_hot([2] * 8), "uses 1.0 of 4 experts: static layer suffices", "static layer suffices", True),
        (one_hot([0, 1, 0, 1, 1, 0, 1, 0]), "2 of 4 experts never used: 2 suffice", "2 never used", False),
        (one_hot([0, 1, 2, 3, 0, 1, 2, 3]), "uses 4.0 of 4 experts, by image", "by image", False),
    ],
)
def test_verdicts(gates: torch.Tensor, verdict: str, advice: str, static: bool) -> None:
    found = layer_routing("l", gates, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 2)
    assert (found.verdict, found.advice, found.static) == (verdict, advice, static)


def test_kernels_vary_only_where_gates_and_experts_do() -> None:
    gates, labels = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) + 0.1, torch.arange(50) % 2
    experts = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    mixed = torch.einsum("be,e...->b...", gates, experts).flatten(1)
    expected = ((mixed - mixed.mean(0)).square().sum(1).mean() / mixed.mean(0).square().sum()).sqrt()
    found = layer_routing("l", gates, labels, 2, [experts, experts[:, :1]])
    assert found.kernels is not None
    assert found.kernels > expected * (1 - 1e-5)
    assert layer_routing("l", gates, labels, 2, [experts]).kernels == pytest.approx(expected.item(), rel=1e-5)
    assert not found.static
    still = gates / gates.sum(1, keepdim=True)
    equal = layer_routing("l", still, labels, 2, [experts[:1].expand(3, -1, -1, -1, -1)])
    assert equal.kernels == pytest.approx(0.0, abs=1e-6)
    assert (equal.static, equal.verdict) == (True, "experts hardly differ: static layer suffices")


def test_dead_saturated_and_exciting() -> None:
    gates = torch.tensor([[0.97, 0.03, 0.0], [0.95, 0.04, 0.01], [0.99, 0.01, 0.0]])
    found = layer_routing("l", gates, torch.tensor([0, 0, 1]), 2)
    assert found.dead == (2,)
    assert found.saturated == (0,)
    assert found.top[0][0] == 2
    assert found.top[1][0] == 1


class ByColour(nn.Module):
    """Predicts the brightest channel, through gates alone: expert e predicts class e."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        plain = nn.Conv2d(3, 3, 1, bias=True)
        self.layer = conditional_like(plain, CondConv(experts=3))
        self.calls = calls
        with torch.no_grad():
            self.layer.weight.zero_()
            assert self.layer.bias is not None
            self.layer.bias.copy_(torch.eye(3))
            self.layer.router.linear.weight.copy_(20.0 * torch.eye(3) - 10.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.layer(x) for _ in range(self.calls)).mean((2, 3))  # type: ignore[union-attr]


@pytest.mark.parametrize("calls", [1, 2])
def test_the_accuracy_gain_of_routing(tmp_path: Path, calls: int) -> None:
    images = find_images(write_images(tmp_path, classes=3, each=4))
    found = measure_routing(ByColour(calls).eval(), images, spec=SPEC, batch=5)
    assert found.accuracy == 1.0
    assert found.mean_gate_accuracy == pytest.approx(1 / 3), "one answer for all"
    assert found.gain is not None
    assert (found.gain.mean, found.changed) == (pytest.approx(2 / 3), 8)
    assert found.gain.half == pytest.approx(0.4105, abs=1e-3), "d = (1 x8, 0 x4) and two unseen, t of 11 degrees"
    assert "Accuracy gain of routing: +66.7 ± 41.1 points, 95% interval" in found.verdict
    assert found.layers[0].between > 0.9
    assert found.images == 12


def test_mean_gates_of_a_neutral_router_change_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(conditional_like(nn.Conv2d(3, 3, 1), ODConv(2)), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = find_images(write_images(tmp_path, classes=3, each=3))
    found = measure_routing(model, images, spec=SPEC)
    assert found.accuracy == found.mean_gate_accuracy
    assert "changes no prediction from right to wrong or back" in found.verdict
    (attention,) = found.attention
    assert (attention.name, attention.spread, attention.between) == ("0", 0.0, 0.0)
    assert attention.positions is None  # of a 1x1 kernel
    assert found.layers[0].static


def test_the_scales_of_a_layer() -> None:
    """Four images of two classes: filters vary by 0.2 within the classes, positions by 0.1 between them."""
    filters = torch.tensor([[0.8, 1.0], [1.2, 1.0], [0.8, 1.0], [1.2, 1.0]])
    positions = torch.tensor([0.9, 0.9, 1.1, 1.1])[:, None, None].expand(4, 3, 3)
    found = layer_attention("deep", Mixture(None, positions, None, filters), torch.tensor([0, 0, 1, 1]), 2)
    assert found.channels is None
    assert found.filters == pytest.approx((0.2 + 0.0) / 2)
    assert found.positions == pytest.approx(0.1)
    assert found.spread == pytest.approx((0.2 + 0.0 + 9 * 0.1) / 11)
    assert found.between == pytest.approx(9 * 0.1**2 / (9 * 0.1**2 + 0.2**2))
    other = layer_attention("wide", Mixture(in_scale=torch.ones(4, 6)), torch.tensor([0, 0, 1, 1]), 2)
    assert attention_line([other, found]) == (
        "Attention: scales vary between images by 0.050 on average over 2 layers (standard deviation; 0: the same for "
        "all images), most in deep: filters 0.100, positions 0.100; the class explains 69% of it."
    )


def test_one_expert_is_reported_by_its_scales(tmp_path: Path) -> None:
    """What ``convert`` makes by default has no gates."""
    model = nn.Sequential(conditional_like(nn.Conv2d(3, 3, 3), ODConv(1)), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    attach_recipe(model, Recipe(input=SPEC))
    scramble(model)
    found = report(model, data=write_images(tmp_path, classes=3, each=3))
    assert found.routing is not None
    assert found.routing.layers == ()
    (attention,) = found.routing.attention
    assert min(attention.spread, attention.channels or 0, attention.filters or 0, attention.positions or 0) > 0
    for text in (f"{found}", found.to_markdown(), found.to_html()):
        assert "Attention: scales vary between images by" in " ".join(text.split())
    assert f"| `0` | {attention.spread:.3f} |" in found.to_markdown()
    assert "| used |" not in found.to_markdown()


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    images = find_images(write_images(tmp_path, classes=3, each=2))
    model = ByColour().eval()
    turned = ("class1", "class2", "class0")  # logit 0 is class1, and so on
    assert measure_routing(model, images, spec=SPEC, classes=turned).accuracy == 0.0
    strange = measure_routing(model, images, spec=SPEC, classes=("a", "b", "c"))
    assert (strange.accuracy, strange.mean_gate_accuracy) == (None, None)
    assert "not those of the folder" in strange.verdict


class Bottleneck(nn.Module):
    """Two convolutions that can share a router, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, 16, 1)
        self.project = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(self.expand(x).relu())


def test_a_router_of_a_block_is_measured_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), Bottleneck(), Bottleneck(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    variant = CondConv(experts=4, routing="block")
    model = convert(nn.Sequential(*body).eval(), variant, example=torch.randn(2, 3, 16, 16)).model
    scramble(model)
    found = report(model, inputs=SPEC, data=write_images(tmp_path, classes=3, each=4))
    assert found.routing is not None
    assert [layer.name for layer in found.routing.layers] == ["1", "2"], "named by the block"
    assert all(layer.variation > 0 for layer in found.routing.layers)
    assert found.routing.mean_gate_accuracy is not None
    assert (found.profile.converted, found.profile.multiplying) == (4, 6)
    assert len(found.experts) == 4, "kernels are of layers"
    assert "4 of 6 layers conditional" in found.to_markdown()
    for form in (found.to_html(), found.to_markdown()):
        assert "2.router" in form


def test_warns_when_images_may_have_been_trained_on(tmp_path: Path) -> None:
    images = find_images(write_images(tmp_path / "flat", classes=3, each=2))
    model = ByColour().eval()
    assert "no validation part" in measure_routing(model, images, spec=SPEC).verdict
    write_images(tmp_path / "split" / "val", classes=3, each=2)
    held_out = measure_routing(model, find_images(tmp_path / "split"), spec=SPEC)
    assert "no validation part" not in held_out.verdict
    assert held_out.to_dict()["held_out"] is True


def test_hooks_are_removed(tmp_path: Path) -> None:
    model = ByColour().train()
    images = find_images(write_images(tmp_path, classes=3, each=2))
    routed = collect_gates(model, images.batches(SPEC, 2))
    outputs_with_mean_gates(model, images.batches(SPEC, 2), routed.means)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_equally_many_images_of_each_class(tmp_path: Path) -> None:
    folder = write_images(tmp_path, classes=3, each=5)
    assert find_images(folder, limit=7).images.labels == (0, 0, 0, 1, 1, 2, 2)
    write_images(folder / "parts/train", classes=3, each=2)
    write_images(folder / "parts/val", classes=2, each=1)
    assert len(find_images(folder / "parts").images) == 2


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "damaged"])
def test_bad_folders(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "data"
    if kind == "file":
        place.write_text("x")
    elif kind != "missing":
        (place / "a").mkdir(parents=True)
    if kind == "damaged":
        (place / "a" / "1.png").write_bytes(b"not an image")
    words = {
        "missing": "There is no",
        "file": "not a folder",
        "empty": "no labelled",
        "damaged": "No image can be read",
    }
    with pytest.raises(InputError, match=words[kind]):
        list(find_images(place).batches(SPEC, 2))


def test_experts_after_conversion_and_their_distance() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 3))
    model = nn.Sequential(conditional_like(plain[0], CondConv(2)))  # type: ignore[arg-type]
    layer = conditional_layers(model)["0"]
    weight = plain[0].weight.detach()
    with torch.no_grad():
        layer.weight.copy_(torch.stack([weight, 3 * weight]))
    (found,) = measure_experts(model, plain)
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert found.apart == pytest.approx(0.5)
    assert found.moved == pytest.approx(1.0)
    assert measure_experts(model)[0].moved is None
    with pytest.raises(InputError, match=r"The original has no layer 0 of this shape(.|\n)*another original="):
        measure_experts(model, nn.Sequential(nn.Conv2d(3, 4, 3)))
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"The experts of 0 are not finite(.|\n)*before training diverged"):
        measure_experts(model)


def test_outputs_that_are_not_finite_raise(tmp_path: Path) -> None:
    model = ByColour().eval()
    model.layer.router.linear.weight.data *= float("nan")  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"outputs on the images are not finite(.|\n)*dtype=float32"):
        measure_routing(model, find_images(write_images(tmp_path, classes=3, each=4)), spec=SPEC)
