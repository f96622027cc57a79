"""``cs.plan``: a Plan to read, then to apply; the same arguments as ``convert``; functions as filters."""

from __future__ import annotations

import inspect
import re
import threading

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.recipe import Selection


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.wide = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.norm(self.deep(x)) + x
        y: Tensor = self.head(self.wide(x).mean((2, 3)))
        return y


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_a_plan_reads_as_text(net: Net, x: Tensor) -> None:
    planned = cs.plan(net, cs.CondConv(4), example=x, classifier=True)
    assert repr(planned) == "<ModelPlan: 3 layers to convert, 1 skipped>"
    assert str(planned).splitlines() == [
        "3 layers to convert, 1 skipped",
        "  deep  depthwise 3x3 8->8  input 8x12x12  then BatchNorm2d",
        "  wide  1x1 8->16 /2        input 8x12x12  then mean",
        "  head  linear 16->5        input 16       then output",
        "skipped stem: the stem: the first convolution sees the image, not features (skip_stem=False converts it)",
    ]


def test_the_record_of_a_conversion_reads_as_text_too(net: Net, x: Tensor) -> None:
    text = str(cs.convert(net, cs.CondConv(4, routing="layer"), example=x).plan)
    assert "deep  depthwise 3x3 8->8  input 8x12x12" in text


@pytest.mark.parametrize("inplace", [False, True])
def test_a_plan_is_applied_as_it_is(net: Net, x: Tensor, inplace: bool) -> None:
    planned = cs.plan(net, cs.CondConv(experts=3), example=x, include=["deep"], inplace=inplace, seed=5)
    assert not conditional_layers(net)
    conversion = planned.apply()
    assert list(conditional_layers(conversion.model)) == [site.name for site in planned.to_convert] == ["deep"]
    assert (conversion.model is net) == inplace
    assert conversion.plan.skipped == planned.skipped
    assert conversion.difference.eval.absolute < 1e-5
    if not inplace:
        once = cs.convert(net, cs.CondConv(experts=3), example=x, include=["deep"], seed=5).model
        assert torch.equal(once.deep.weight, conversion.model.deep.weight)
        assert list(conditional_layers(planned.apply().model)) == ["deep"]  # and again


def test_a_plan_is_applied_to_the_weights_and_statistics_of_that_moment(net: Net, x: Tensor) -> None:
    planned = cs.plan(net, cs.CondConv(), example=x)
    net.train()(x + 3)
    with torch.no_grad():
        net.deep.weight.mul_(2)
    converted = planned.apply().model
    torch.testing.assert_close(converted.eval()(x), net.eval()(x))


def test_a_plan_of_another_model_is_refused(net: Net, x: Tensor) -> None:
    planned = cs.plan(net, cs.CondConv(), example=x, inplace=True)
    planned.apply()
    with pytest.raises(InputError, match=r"deep is no longer the Conv2d of the plan[\s\S]*call plan"):
        planned.apply()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_graph_is_planned_and_applied(net: Net, x: Tensor, inplace: bool) -> None:
    graph = fx.symbolic_trace(net)
    planned = cs.plan(graph, cs.CondConv(), example=x, inplace=inplace)
    assert "then" in str(planned)
    conversion = planned.apply()
    assert (conversion.model is graph) == inplace
    torch.testing.assert_close(conversion.model(x), net(x))


def test_functions_select_layers(net: Net, x: Tensor) -> None:
    def names(**options: object) -> list[str]:
        return [site.name for site in cs.plan(net, cs.CondConv(), example=x, **options).to_convert]

    assert names(include=lambda name, module: module.groups > 1) == ["deep"]
    assert names(exclude=lambda name, module: module is net.deep) == ["wide"]  # the caller's module, not a copy's
    assert names(include=["deep", lambda name, module: name.startswith("w")]) == ["deep", "wide"]

    def nothing(name: str, module: nn.Module) -> bool:
        return False

    with pytest.raises(InputError, match=r"include=\[nothing\] matched 0 of 3 convolutions in Net"):
        names(include=nothing)
    with pytest.raises(InputError, match=r"blocks=.* is empty"):
        Selection(blocks=(nothing,))  # type: ignore[arg-type]


def test_plan_and_convert_take_the_same_arguments() -> None:
    planned, converted = inspect.signature(cs.plan), inspect.signature(cs.convert)
    assert planned.parameters == converted.parameters
    assert {"include", "exclude", "min_channels", "prove", "inplace"} <= set(planned.parameters)


def test_a_conversion_does_not_trace(net: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fx.Tracer, "trace", lambda *arguments: pytest.fail("traced"))
    conversion = cs.convert(net, cs.CondConv(), example=x)
    assert conversion.plan.notes == ()


class Locked(Net):
    """Has what ``copy.deepcopy`` does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_converted_in_place(x: Tensor) -> None:
    model = Locked()
    with pytest.raises(InputError, match=r"cannot be copied: TypeError[\s\S]*inplace=True"):
        cs.plan(model, cs.CondConv(), example=x)
    cs.plan(model, cs.CondConv(), example=x, inplace=True).apply()
    assert list(conditional_layers(model)) == ["deep", "wide"]


class OverBins(nn.Module):
    """The end of a detector with distribution focal loss: the mean over 16 bins, as a frozen convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.box = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1)
        self.dfl = nn.Conv2d(16, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(16.0).view(1, 16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dfl(self.box(self.stem(x)).softmax(1))
        return y


def test_a_constant_layer_is_skipped_and_a_frozen_one_is_not(x: Tensor) -> None:
    """Published checkpoints have every parameter frozen."""
    model = OverBins().requires_grad_(False)
    plan = cs.plan(model, cs.CondConv(), example=x)
    assert [site.name for site in plan.to_convert] == ["box"]
    assert {skip.name: skip.reason for skip in plan.skipped}["dfl"] == (
        "its weight is the constant 0, 1, ..., 15: the mean over bins of a distribution (DFL)"
    )
    model.dfl.weight.data[0, 3] += 0.5
    assert [site.name for site in cs.plan(model, cs.CondConv(), example=x).to_convert] == ["box", "dfl"]


@pytest.mark.parametrize(
    ("options", "said", "advice"),
    [
        ({"exclude": ["layer4"]}, r'exclude=\["layer4"\] matches none of 21 layers', 'exclude=["layer4.*"]'),
        ({"include": ["layer3.*", "layr4.*"]}, r'include=\["layr4\.\*"\] matches none', 'include=["layer4.*"]'),
        ({"exclude": ["re:layer9.*"]}, "matches none of 21 layers", "exclude="),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(options: dict[str, list[str]], said: str, advice: str) -> None:
    model = torchvision.models.resnet18(weights=None)
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(InputError, match=said) as raised:
        cs.plan(model, cs.CondConv(2), example=x, **options)
    assert raised.value.fix.startswith(advice)
    name, pattern = re.fullmatch(r'(\w+)=\["(.*)"\]', raised.value.fix).groups()  # type: ignore[union-attr]
    assert cs.plan(model, cs.CondConv(2), example=x, **{name: [pattern]}).to_convert


def test_a_second_conversion_does_not_look_into_routers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(2, 3, 16, 16)
    once = cs.convert(model, cs.CondConv(2), example=x).model
    with pytest.raises(InputError, match=r"calls no nn\.Linear"):
        cs.convert(once, cs.CondConv(2), example=x, classifier=True)
