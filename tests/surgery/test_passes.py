"""A conversion runs and traces a model: whatever its forward keeps, changes or draws, it is as before afterwards."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torchvision
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.layers import conditional_layers
from condconv_surgery.reporting.measure.count_macs import count
from condconv_surgery.reporting.measure.peak_activations import peak_activations
from condconv_surgery.runtime.snapshot import preserving_state
from condconv_surgery.surgery.block_graph import BlockError, trace_block


class Two(nn.Module):
    """Two convolutions, and whatever a subclass does with their output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Keeps(Two):
    """In attributes of its own, in lists and in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Any] = []
        self.by_name: dict[str, list[Any]] = {"seen": []}
        self.state = SimpleNamespace(last=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        self.last = self.state.last = y
        self.losses.append(y.mean())
        self.by_name["seen"].append(y)
        return y


class RunningMean(Two):
    """Assigns its buffer in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((4,), 7.0))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.mean((0, 2, 3)).detach()
        return y - self.mean.view(1, -1, 1, 1)


class LazyGrid(Two):
    """Makes a tensor at its first call, where its input is."""

    grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.linspace(0, 1, x.shape[-1], device=x.device)
        return super().forward(x + self.grid)


class Momentum(Two):
    """An encoder whose weights follow another's: in place, by a new ``data``, and by torch's own loop over a list."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.a)
        self.slower = copy.deepcopy(self.a)
        self.slowest = copy.deepcopy(self.a)
        self.steps = torch.zeros(1)
        with torch.no_grad():
            for parameter in (*self.slow.parameters(), *self.slower.parameters(), *self.slowest.parameters()):
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.steps += 1
                for fast, slow, slower in zip(
                    self.a.parameters(), self.slow.parameters(), self.slower.parameters(), strict=True
                ):
                    slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
                    slower.data = slower.data * 0.9 + fast.data * 0.1
                torch._foreach_lerp_(list(self.slowest.parameters()), list(self.a.parameters()), 0.1)
        return self.b(self.a(x) + self.slow(x) + self.slower(x) + self.slowest(x) + self.steps)


class InPlace(Two):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class Drops(Two):
    """Draws from Python's and from NumPy's generator in train mode; decides by values, so it is run for real."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training and float(y.sum()) > -1e9:
            return y * (random.random() + float(numpy.random.rand()))
        return y


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def attributes_of(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module: objects by identity with the values they hold, containers by their items."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            items = {"": value}
            if isinstance(value, dict):
                items = {str(k): v for k, v in value.items()}
            elif isinstance(value, list):
                items = {str(k): v for k, v in enumerate(value)}
            elif isinstance(value, SimpleNamespace):
                items = vars(value)
            for item, held in items.items():
                values = held.clone() if isinstance(held, Tensor) else copy.copy(held) if key == "by_name" else None
                found[f"{name}.{key}.{item}"] = (id(held), type(held), values)
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, (identity, kind, values) in before.items():
        assert after[key][:2] == (identity, kind), key
        if isinstance(values, Tensor):
            assert torch.equal(values, after[key][2]), key
        else:
            assert values == after[key][2], key


FORWARDS = [Keeps, RunningMean, LazyGrid, Momentum, InPlace, Drops]


@pytest.mark.parametrize("prove", [True, False])
@pytest.mark.parametrize("kind", FORWARDS)
def test_any_forward_converts_and_leaves_its_model_as_it_was(kind: type[Two], prove: bool, x: Tensor) -> None:
    model = kind()
    before, unchanged = attributes_of(model), x.clone()
    conversion = cs.convert(model, cs.CondConv(experts=2), example=x, prove=prove, skip_stem=False)
    assert_same(before, attributes_of(model))
    assert torch.equal(x, unchanged)
    if prove:
        assert max(conversion.difference.eval.relative, conversion.difference.train.relative) < 1e-5
    assert set(conditional_layers(conversion.model)) == ({"b"} if kind is Momentum else {"a", "b"})
    assert torch.allclose(conversion.model.eval()(x.clone()), copy.deepcopy(model).eval()(x.clone()), atol=1e-5)


@pytest.mark.parametrize("kind", FORWARDS)
def test_a_block_is_traced_and_left_as_it_was(kind: type[Two], x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), kind())
    before = attributes_of(model)
    with contextlib.suppress(BlockError):
        trace_block(model[1], [model[1].a, model[1].b])
    assert_same(before, attributes_of(model))


def test_a_block_that_assigns_attributes_is_no_graph(x: Tensor) -> None:
    """A graph would not assign them; that the attribute was there before the trace makes no difference."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Keeps())
    model(x)
    with pytest.raises(cs.errors.InputError, match="makes tensors or attributes of its own"):
        cs.convert(model, cs.CondConv(experts=2, routing="block"), example=x)


def test_a_detector_that_keeps_its_anchors() -> None:
    """They are made at the first call, and it cannot run on meta to its end."""
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = build(weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=96).eval()
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    conversion = cs.convert(model, cs.CondConv(experts=2), example=(images,), include=["rpn.*"], skip_stem=False)
    assert conversion.difference.eval.absolute < 1e-3
    assert all(anchors.device.type == "cpu" for anchors in model.rpn.anchor_generator.cell_anchors)
    model(images)


def test_random_numbers_go_on_as_if_nothing_had_run(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), Drops())
    model[2].a = nn.Conv2d(4, 4, 1)

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(numpy.random.rand())

    def seeded(between: Callable[[], object]) -> tuple[float, float, float]:
        torch.manual_seed(1)
        random.seed(1)
        numpy.random.seed(1)
        between()
        return draw()

    for variant in (cs.CondConv(experts=2), cs.ODConv(experts=2)):  # a router of ODConv has random layers
        for prove in (False, True):
            assert seeded(lambda v=variant, p=prove: cs.convert(model, v, example=x, prove=p)) == seeded(lambda: None)


def test_weights_made_in_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    conversion = cs.convert(model, cs.CondConv(experts=2), example=x)
    assert conversion.plan.modes == (False, True)
    assert conversion.difference.train.absolute < 1e-4
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    conversion.model.train()(x).square().mean().backward()  # the copy is of tensors that can be trained
    assert all(p.grad is not None for p in conversion.model[2].parameters())


def test_a_pass_copies_only_the_weights_that_it_changes() -> None:
    model = Momentum()
    with preserving_state(model) as state:
        model.train()(torch.zeros(1, 3, 8, 8))
        copied = [own for own, _ in state._copies.values()]
    changed = [*model.slow.parameters(), *model.slowest.parameters(), model.steps]
    assert {tensor.data_ptr() for tensor in copied} == {tensor.data_ptr() for tensor in changed}


def test_memory_given_back_by_a_forward_is_restored() -> None:
    """Resized, cast or moved by ``data``: the tensor has its own memory again, and its views with it."""
    model = Two().train()
    weight, before = model.a.weight, model.a.weight.detach().clone()
    view = weight.detach()
    with preserving_state(model):
        model.half()
        model.a.weight.data = torch.zeros(1)
    assert weight is model.a.weight
    assert weight.data_ptr() == view.data_ptr()
    assert torch.equal(weight, before)


class GivesItsMean(RunningMean):
    """Its output is the buffer itself, changed in place by what it has seen."""

    def forward(self, x: Tensor) -> Tensor:
        factor = 1.0 if type(self.b) is nn.Conv2d else 2.0  # so that a conversion changes the function
        self.mean.mul_(0.9).add_(Two.forward(self, x).mean((0, 2, 3)).detach(), alpha=0.1 * factor)
        return self.mean


def test_an_output_that_is_a_buffer_is_compared_as_it_was_then(x: Tensor) -> None:
    with pytest.raises(cs.errors.ProofError, match="differs from the original"):
        cs.convert(GivesItsMean(), cs.CondConv(experts=2), example=x)


@pytest.mark.parametrize("kind", FORWARDS)
def test_a_report_leaves_the_model_as_it_was(kind: type[Two], x: Tensor) -> None:
    model = kind()
    before, unchanged = attributes_of(model), x.clone()
    counted = count(model, (x,))
    assert peak_activations(model, (x,)) > 0
    assert counted.modules[model.b].macs == 2 * 4 * 4 * 9 * 12 * 12
    assert_same(before, attributes_of(model))
    assert torch.equal(x, unchanged)
