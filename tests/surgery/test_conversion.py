"""``convert`` on networks small enough to see through, and on torchvision's."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError, ProofError
from condconv_surgery.layers import ConditionalLinear, conditional_layers, set_temperature
from condconv_surgery.recipe import VARIANTS
from tests.variant_cases import EVERY_VARIANT


class Net(nn.Module):
    """A stem, two blocks of which one branches, a shared convolution, an auxiliary head, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.alias = self.twice
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.unused = nn.Conv2d(8, 8, 1)
        self.aux = nn.Conv2d(8, 2, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)
        self.note = "mine"

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.stem(x)).relu()
        x = x + self.block(x)
        x = self.alias(self.twice(x))
        x = x * self.squeeze(x)
        y = self.head(self.drop(x.mean((2, 3))))
        return (y, self.aux(x)) if self.training else y

    def greet(self) -> str:
        return self.note


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("experts", [1, 2, 3, 8, 32])
def test_the_function_is_preserved(net: nn.Module, x: torch.Tensor, kind: str, experts: int) -> None:
    conversion = cs.convert(
        net, VARIANTS[kind](experts=experts), example=x, classifier=True, start="noise", diversity=0.5
    )
    for temperature in (0.1, 1.0, 30.0):
        set_temperature(conversion.model, temperature)
        for training in (False, True):
            original, converted = net.train(training), conversion.model.train(training)
            torch.manual_seed(1)
            expected = original(x)
            torch.manual_seed(1)
            torch.testing.assert_close(converted(x), expected, rtol=1e-5, atol=1e-5)
    assert conversion.difference.eval.absolute < 1e-5
    assert conversion.difference.train.absolute < 1e-5
    assert conversion.difference.eval.agreement == 1.0


def test_the_plan_names_every_layer_once_with_a_reason(net: nn.Module, x: torch.Tensor) -> None:
    plan = cs.convert(net, cs.CondConv(), example=x).plan
    assert [(site.name, site.calls) for site in plan.to_convert] == [
        ("block.0", 1),
        ("block.2", 1),
        ("twice", 2),
        ("aux", 1),
    ]
    assert plan.to_convert[2].names == ("twice", "alias")
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    assert set(reasons) == {"stem", "squeeze.1", "unused"}
    assert "the stem" in reasons["stem"]
    assert "1x1 map" in reasons["squeeze.1"]
    assert "not called" in reasons["unused"]
    assert plan.to_convert[0].input == (4, 8, 16, 16)


def test_a_small_image_does_not_make_every_layer_look_pooled() -> None:
    model = torchvision.models.resnet18(weights=None)
    plan = cs.convert(model, cs.CondConv(), example=torch.randn(2, 3, 32, 32), prove=False).plan
    assert len(plan.to_convert) == 19


def test_the_users_own_class_comes_back_and_the_original_is_untouched(net: nn.Module, x: torch.Tensor) -> None:
    before = copy.deepcopy(net.state_dict())
    converted = cs.convert(net, cs.CondConv(), example=x).model
    assert type(converted) is Net
    assert converted.greet() == "mine"
    assert not converted.training
    assert converted.twice is converted.alias
    assert conditional_layers(net) == {}
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_in_place_changes_the_model_itself(net: nn.Module, x: torch.Tensor) -> None:
    conversion = cs.convert(net, cs.CondConv(), example=x, inplace=True)
    assert conversion.model is net
    assert list(conditional_layers(net)) == ["block.0", "block.2", "twice", "aux"]


def test_hooks_modes_and_frozen_layers_move_along(net: nn.Module, x: torch.Tensor) -> None:
    seen = []
    net.block[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    net.block[0].requires_grad_(False)
    net.block[2].train()
    model = cs.convert(net, cs.ODConv(), example=x, prove=False).model
    model(x)
    assert seen[-1] == (4, 8, 16, 16)
    assert not any(p.requires_grad for p in model.block[0].parameters())
    assert model.block[2].training
    assert not model.twice.training


@pytest.mark.parametrize("kind", VARIANTS)
def test_experts_separate_after_one_step_and_never_without_diversity(
    kind: str, net: nn.Module, x: torch.Tensor
) -> None:
    """Experts separate when their gradients differ; in float64, where rounding does not part them."""

    def gradient_spread(diversity: float, steps: int) -> float:
        model = cs.convert(
            net, VARIANTS[kind](), example=x, exclude=["aux"], start="noise", diversity=diversity
        ).model.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps + 1):
            optimizer.step()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.double()), torch.arange(4)).backward()
        gradients = [layer.weight.grad for layer in conditional_layers(model).values()]
        return max(float((g - g.mean(0)).abs().max() / g.abs().max()) for g in gradients)

    assert gradient_spread(diversity=0.0, steps=20) < 1e-12
    assert gradient_spread(diversity=0.1, steps=0) < 1e-12  # the gates are still equal,
    assert gradient_spread(diversity=0.1, steps=1) > 1e-8  # and after one step they are not


def test_the_noise_of_a_layer_does_not_depend_on_the_others(net: nn.Module, x: torch.Tensor) -> None:
    everything = cs.convert(net, cs.CondConv(), example=x, start="noise", seed=3).model
    one = cs.convert(net, cs.CondConv(), example=x, include=["block.2"], start="noise", seed=3).model
    other_seed = cs.convert(net, cs.CondConv(), example=x, start="noise", seed=4).model
    assert torch.equal(everything.block[2].weight, one.block[2].weight)
    assert not torch.equal(everything.block[2].weight, other_seed.block[2].weight)


def test_a_zero_weight_still_gets_diverse_experts(net: nn.Module, x: torch.Tensor) -> None:
    nn.init.zeros_(net.block[2].weight)
    layer = cs.convert(net, cs.CondConv(), example=x, start="noise").model.block[2]
    assert float(layer.weight.detach().std(0).max()) > 0


def test_converting_twice_mixes_variants(net: nn.Module, x: torch.Tensor) -> None:
    first = cs.convert(net, cs.CondConv(), example=x, include=["block.*"]).model
    second = cs.convert(first, cs.ODConv(), example=x).model
    kinds = {name: layer.variant.kind for name, layer in conditional_layers(second).items()}
    assert kinds == {"block.0": "condconv", "block.2": "condconv", "twice": "odconv", "aux": "odconv"}


def test_the_classifier_can_be_converted(net: nn.Module, x: torch.Tensor) -> None:
    model = cs.convert(net, cs.CondConv(experts=2), example=x, include=["head"], classifier=True).model
    assert isinstance(model.head, ConditionalLinear)
    assert list(conditional_layers(model)) == ["head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(include=["layer5.*"]), r'include=\["layer5.\*"\] matched 0 of 7 convolutions(.|\n)*named like: stem'),
        (dict(exclude=["*"]), "all 7 convolutions of Net are skipped"),
        (dict(include=["unused"]), "not called in a forward pass"),
        (dict(min_channels=64), "fewer than min_channels=64"),
        (dict(include=["re:("]), "not a regular expression"),
        (dict(include=[""]), "is empty"),
        (dict(diversity=-1.0), "diversity is -1.0"),
        (dict(example=torch.randn(1, 4, 8, 8)), r"does not run on an input of \[\(1, 4, 8, 8\)\]"),
    ],
)
def test_wrong_input_is_answered_in_words(net: nn.Module, x: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cs.convert(net, cs.CondConv(), **{"example": x, **options})


def test_selection_by_patterns(net: nn.Module, x: torch.Tensor) -> None:
    def kept(**options: object) -> list[str]:
        return [site.name for site in cs.convert(net, cs.CondConv(), example=x, prove=False, **options).plan.to_convert]

    assert kept(include=["block.*"], exclude=["*.2"]) == ["block.0"]
    assert kept(include=[r"re:block\.\d"]) == ["block.0", "block.2"]
    assert kept(include=["alias"]) == ["twice"]  # any of its names
    assert kept(skip_stem=False)[0] == "stem"
    assert "squeeze.1" in kept(skip_pooled=False)
    assert "aux" not in kept(min_channels=4)


def test_a_model_without_convolutions() -> None:
    with pytest.raises(InputError, match="Sequential has none"):
        cs.convert(nn.Sequential(nn.Linear(4, 4)), cs.CondConv(), example=torch.randn(2, 4))
    model = cs.convert(nn.Sequential(nn.Linear(4, 4)), cs.CondConv(), example=torch.randn(2, 4), classifier=True).model
    assert isinstance(model[0], ConditionalLinear)


class ReadsItsChildsShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs, _, _, _ = self.second.weight.shape
        return self.second(self.first(x)) / outputs


def test_a_failed_proof_leaves_an_in_place_model_as_it_was() -> None:
    model = ReadsItsChildsShape()
    with pytest.raises(ProofError, match="does not run"):
        cs.convert(model, cs.CondConv(), example=torch.randn(2, 3, 4, 4), inplace=True)
    assert type(model.second) is nn.Conv2d


def test_a_difference_past_the_tolerance_is_refused(net: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(ProofError, match="differs from the original by"):
        cs.convert(net, cs.CondConv(experts=3), example=x, tolerance=0.0)


def test_amplified_rounding_is_told_from_an_error() -> None:
    """Batch norm over two values that are nearly equal: float32 outputs say nothing, float64 ones do."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None)
    conversion = cs.convert(model, cs.CondConv(), example=torch.randn(2, 3, 32, 32), inplace=True)
    assert conversion.difference.train.relative > 1e-3
    assert any("amplifies rounding; in float64" in note for note in conversion.plan.notes)
    assert next(conversion.model.parameters()).dtype == torch.float32


class Subclass(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), Subclass(4, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) if x.sum() > -1e9 else x


def test_untraceable_models_and_subclasses_say_why() -> None:
    plan = cs.plan(Untraceable(), cs.CondConv(), example=torch.randn(2, 3, 9, 9))
    assert [site.name for site in plan.to_convert] == ["body.2"]
    assert plan.followers.by_layer == {"body.2": ("ReLU",)}  # the part that can be traced is
    assert any(note.startswith("not traced: the whole model: TraceError") for note in plan.followers.notes())
    assert not any("traced" in note for note in plan.apply().plan.notes)  # a conversion needs no trace
    assert "Subclass does not compute a plain convolution" in {s.name: s.reason for s in plan.skipped}["body.4"]


def test_a_batch_of_one_is_proven_in_the_mode_that_runs() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4)
    )
    conversion = cs.convert(model, cs.ODConv(), example=torch.randn(1, 3, 9, 9))
    assert conversion.difference.eval is not None
    assert conversion.difference.train is None
    assert any("not run in train mode" in note for note in conversion.plan.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(net: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
    conversion = cs.convert(net.to(dtype), cs.ODConv(experts=4), example=x.to(dtype))
    assert conversion.model.twice.weight.dtype == dtype


@pytest.mark.parametrize("variant", EVERY_VARIANT, ids=str)
def test_added_parameters_follow_the_closed_form(net: nn.Module, x: torch.Tensor, variant: cs.CondConv) -> None:
    model = cs.convert(net, variant, example=x, prove=False).model
    count = sum(p.numel() for p in model.parameters())
    original = sum(p.numel() for p in net.parameters())
    layers = conditional_layers(model).values()
    routers = sum(p.numel() for layer in layers for p in layer.router.parameters())
    kernels = sum(
        (variant.experts - 1) * (layer.geometry.weight_numel + layer.geometry.out_channels) for layer in layers
    )
    assert count - original == kernels + routers


@pytest.mark.parametrize(("experts", "millions"), [(1, 11.94), (4, 44.90)])
def test_odconv_resnet18_has_the_published_size(experts: int, millions: float) -> None:
    """Li et al. 2022, table 1: every 3x3 of the blocks, neither stem nor downsample."""
    model = torchvision.models.resnet18(weights=None)
    example = torch.randn(2, 3, 64, 64)
    converted = cs.convert(
        model, cs.ODConv(experts=experts), example=example, exclude=["*downsample*"], prove=False
    ).model
    assert sum(p.numel() for p in converted.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_classifier_that_include_leaves_out_is_refused(net: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(InputError, match="classifier=True asks for head, but include= does not match it"):
        cs.convert(net, cs.CondConv(experts=2), example=x, include=["stem"], skip_stem=False, classifier=True)


@pytest.mark.parametrize("pattern", ["block.*", r"re:block\.\d"])
def test_one_text_is_one_pattern(pattern: str) -> None:
    """A ``*`` among its letters would match every layer."""
    x = torch.randn(2, 3, 8, 8)
    for given in (pattern, [pattern], (pattern,)):
        kept = cs.convert(Net(), cs.CondConv(), example=x, include=given, prove=False).plan.to_convert
        assert [site.name for site in kept] == ["block.0", "block.2"]
        kept = cs.convert(Net(), cs.CondConv(), example=x, exclude=given, prove=False).plan.to_convert
        assert [site.name for site in kept] == ["twice", "aux"]
    with pytest.raises(InputError, match="it is a bare container"):  # found by its name
        cs.convert(Net(), cs.CondConv(routing="block"), example=x, blocks="bloc[k]")
    with pytest.raises(InputError, match="5 is not a pattern"):
        cs.convert(Net(), cs.CondConv(), example=x, include=5)
