from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.deploy.compact_routers import make_routers_compact
from condconv_surgery.layers import ConvGeometry, conditional_layers, conditional_like, routers
from condconv_surgery.models.layouts.layout_registry import write_layout
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, Variant
from tests.conftest import Run
from tests.geometries import GEOMETRIES
from tests.reference import per_sample_loop
from tests.small_networks import Amplifies, small_net
from tests.variant_cases import EVERY_VARIANT, scramble


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms and routers as after training: no statistic, scale or shift is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            for tensor in (module.running_var, module.weight):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    scramble(model, seed)
    return model.eval()


@torch.no_grad()
def trained_like(model: nn.Module, x: Tensor) -> nn.Module:
    """``lively``, with statistics of what really passes: else the outputs of a deep network reach 1e9, or are chaos."""
    lively(model)
    for router in routers(model).values():
        for parameter in router.parameters():
            parameter.mul_(0.2)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    return model.eval()


class Pairs(nn.Module):
    """Two convolutions with a batch norm behind each."""

    def __init__(self, first: nn.Module, second: nn.Module, middle: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = first, nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = second, nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def pairs_of(arguments: dict[str, Any], variant: Variant) -> Pairs:
    torch.manual_seed(0)
    first = conditional_like(nn.Conv2d(**arguments), variant)
    second = conditional_like(nn.Conv2d(arguments["out_channels"], 5, 3, padding=1, bias=False), variant)
    model = Pairs(first, second, arguments["out_channels"], 5)
    lively(model)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
def test_every_variant(variant: Variant) -> None:
    model, x = pairs_of(GEOMETRIES["3x3"], variant), torch.randn(3, 8, 9, 7)
    folding = cs.fold(model, example=x)
    assert [(pair.layer, pair.norm) for pair in folding.folded] == [("conv1", "bn1"), ("conv2", "bn2")]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folding.model.modules())
    assert type(folding.model) is Pairs
    with torch.no_grad():
        assert relative(folding.model(x), model(x)) < 1e-5
        assert isinstance(model.bn1, nn.BatchNorm2d), "a copy was folded"


@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
@torch.no_grad()
def test_the_normalisation_of_gates_commutes_with_folding(variant: Variant) -> None:
    """As ``export`` moves it: experts and gated biases take the factors, the bias of the batch norm does not."""
    model, x = pairs_of(GEOMETRIES["3x3"], variant), torch.randn(3, 8, 9, 7)
    folded = cs.fold(model, example=x).model
    plain = copy.deepcopy(folded)
    make_routers_compact(plain)
    for layer in conditional_layers(plain).values():
        layer.implementation = "loop"  # a fused call would ask the router for its form
    assert relative(plain(x), model(x)) < 1e-5
    before, after = folded.conv1, plain.conv1
    weight, bias = before.paper_weights()
    assert torch.equal(after.weight, weight)
    assert torch.equal(after.bias, bias)
    assert torch.equal(after.ungated_bias, before.ungated_bias)
    ours, papers = before.router(x), after.router(x)
    factors = [a / b for a, b in zip(ours, papers, strict=True) if a is not None]
    assert all(((part > 0) & (part < 1 + 1e-6)).all() for part in papers if part is not None), "sigmoids and softmax"
    product = torch.stack([factor.mean() for factor in factors]).prod()
    torch.testing.assert_close(product, torch.tensor(before.weight_factor))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", GEOMETRIES)
@torch.no_grad()
def test_every_geometry_against_the_loop(name: str) -> None:
    """The folded layer, computed by the loop from its own parameters, is the norm of the original layer's loop."""
    model, x = pairs_of(GEOMETRIES[name], CondConv(experts=3)), torch.randn(2, GEOMETRIES[name]["in_channels"], 10, 9)
    layer, folded = model.conv1, cs.fold(model, example=x).model.conv1
    geometry: ConvGeometry = layer.geometry
    expected = model.bn1(per_sample_loop(x, layer.weight, layer.bias, layer.route(x), geometry))
    gated = per_sample_loop(x, folded.weight, folded.bias, layer.route(x), geometry)
    actual = gated + folded.ungated_bias[:, None, None]
    assert relative(actual, expected) < 1e-5
    assert relative(folded(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: torchvision.models.resnet18(weights=None), 19),
        (lambda: torchvision.models.mobilenet_v3_small(weights=None), 33),
        (lambda: timm.create_model("tf_efficientnet_lite0"), 48),  # its batch norms hold their activation
    ],
    ids=["resnet18", "mobilenet_v3_small", "timm efficientnet"],
)
@torch.no_grad()
def test_real_networks(build: Any, count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    model = cs.convert(build(), ODConv(experts=2), example=x, prove=False, inplace=True).model
    model = trained_like(model, x).double()  # a deep random network amplifies the rounding of float32
    folding = cs.fold(model, example=x.double())
    assert len(folding.folded) == count
    assert folding.skipped == ()
    assert folding.difference is not None
    assert folding.difference.relative < 1e-9


@torch.no_grad()
def test_a_block_that_routes_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    options: dict[str, Any] = {"include": ["layer[34].*"], "prove": False}
    variant = CondConv(experts=4, routing="block")
    model = lively(cs.convert(torchvision.models.resnet18(weights=None), variant, example=x, **options).model)
    model, x = model.double(), x.double()  # random routers amplify the rounding of float32
    folding = cs.fold(model, example=x)
    assert len(folding.folded) == len(conditional_layers(model))
    assert relative(folding.model(x), model(x)) < 1e-9
    cs.save(folding.model, tmp_path / "folded.safetensors")
    assert torch.equal(cs.load(tmp_path / "folded.safetensors")(x), folding.model(x))


class Awkward(nn.Module):
    """Each layer has a reason against folding; ``good`` has none."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("shared1", "shared2", "twice", "branch", "batch", "bare", "good"):
            setattr(self, name, conditional_like(nn.Conv2d(4, 4, 3, padding=1), CondConv(experts=2)))
        self.bn = nn.BatchNorm2d(4)
        self.bn_twice1, self.bn_twice2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bn_branch, self.bn_good = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bn_batch = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.shared1(x)) + self.bn(self.shared2(x))
        x = self.bn_twice1(self.twice(x)) + self.bn_twice2(self.twice(x))
        y = self.branch(x)
        x = self.bn_branch(y) + y
        x = torch.relu(self.bare(self.bn_batch(self.batch(x))))
        for _ in range(2):
            x = self.bn_good(self.good(x))
        return x


def test_what_stays_and_why() -> None:
    model = Awkward()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and name != "bn_batch":
            lively(module)
    scramble(model)
    folding = cs.fold(model.eval(), example=torch.randn(2, 4, 8, 8))
    assert [pair.layer for pair in folding.folded] == ["good"], "called twice, the same batch norm behind each time"
    assert {skip.name: skip.reason for skip in folding.skipped} == {
        "shared1": "the batch norm behind takes other outputs too",
        "shared2": "the batch norm behind takes other outputs too",
        "twice": "another batch norm follows in each of its calls",
        "branch": "2 operations take its output, not a batch norm alone",
        "batch": "the batch norm behind has no running statistics",
        "bare": "no batch norm follows, but relu",
    }


class Hidden(Pairs):
    """A forward that tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 1e9 else super().forward(x) * 2


def test_an_untraceable_model_says_so() -> None:
    pairs = pairs_of(GEOMETRIES["3x3"], DynamicConv(experts=2))
    pairs.__class__ = Hidden
    folding = cs.fold(pairs, example=torch.randn(2, 8, 6, 6))
    assert folding.folded == ()
    assert all(skip.reason.startswith("not traced: ") for skip in folding.skipped)


class Outside(nn.Module):
    """A parent whose own untraceable code also calls the convolution of its child, past the child's batch norm."""

    def __init__(self, child: Pairs) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x).sum() + self.child.conv1(x).sum() * float(x.mean())


def test_what_tracing_cannot_see_fails_the_proof() -> None:
    model = Outside(pairs_of(GEOMETRIES["3x3"], CondConv(experts=2))).eval()
    with pytest.raises(cs.ProofError, match="differs from the original by"):
        cs.fold(model, example=torch.rand(2, 8, 6, 6))


def test_a_model_that_is_not_proven_in_place_is_as_it_was() -> None:
    model = Outside(pairs_of(GEOMETRIES["3x3"], CondConv(experts=2))).eval()
    model.child.conv1.train()
    x, norm, before = torch.rand(2, 8, 6, 6), model.child.bn1, {k: v.clone() for k, v in model.state_dict().items()}
    expected, modes = model(x), [module.training for module in model.modules()]
    with pytest.raises(cs.ProofError, match="differs from the original by"):
        cs.fold(model, example=x, inplace=True)
    assert model.child.bn1 is norm
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(model(x), expected)


def test_rounding_that_the_model_amplifies_is_no_error() -> None:
    """Its float32 outputs keep three digits; in float64 folding is exact."""
    network, x = pairs_of(GEOMETRIES["3x3"], CondConv(experts=2)).eval(), torch.randn(8, 8, 16, 16)
    model = Amplifies(network, at=2.0**13 * float(network(x).detach().max())).eval()
    folding = cs.fold(model, example=x)
    assert folding.difference is not None
    assert folding.difference.relative > 1e-4
    assert folding.difference_float64 is not None
    assert folding.difference_float64.relative < 1e-9
    for options in ({"tolerance": 1e-6}, {"inplace": True}):  # the user's own bound; no original left
        with pytest.raises(cs.ProofError, match="differs from the original by"):
            cs.fold(model, example=x, **options)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(cs.InputError, match="has no conditional layer"):
        cs.fold(small_net())
    x = torch.randn(2, 3, 32, 32)
    model = cs.convert(torchvision.models.resnet18(weights=None), CondConv(2), example=x, prove=False).model
    folded = cs.fold(lively(model), example=x).model
    with pytest.raises(cs.InputError, match="folded already"):
        cs.fold(folded)
    with pytest.raises(cs.InputError, match="layout of another implementation has its batch norms"):
        write_layout(folded, "odconv", tmp_path / "m.safetensors")
    (tmp_path / "images").mkdir()
    with pytest.raises(cs.InputError, match="training needs the batch norms"):
        cs.finetune(folded, {"schedule": {"epochs": 1}}, data=tmp_path / "images", output=tmp_path / "run")


def test_the_command(condconv: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cs.load_model("torchvision:resnet18", weights="none", num_classes=3, input_size=32)
    converted = lively(cs.convert(model, CondConv(2), include=["layer4.*"], prove=False).model)
    before, after = tmp_path / "m.safetensors", tmp_path / "folded.safetensors"
    cs.save(converted, before)
    code, out, err = condconv("fold", before, "-o", after, "--json")
    assert code == 0, err
    assert '"folded": 5' in out
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        loaded = cs.load(after)
        assert relative(loaded(x), converted(x)) < 1e-5
    assert len(loaded.state_dict()) == len(converted.state_dict()) - 5 * 4  # five values of a norm, one ungated bias
    code, _, err = condconv("fold", before, "-o", after)
    assert code == 0
    assert "Folded      5 of 5" in err
    code, _, err = condconv("finetune", after, "--data", tmp_path, "-o", tmp_path / "run")
    assert code == 2
    assert "batch norms" in err or "no labelled images" in err
