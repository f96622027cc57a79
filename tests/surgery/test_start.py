"""Starts that preserve the function and are not a saddle, for every registered variant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers, routers, set_temperature
from condconv_surgery.layers.router_base import ROUTERS
from condconv_surgery.layers.start_directions import Features, directions
from condconv_surgery.recipe import VARIANTS, CondConv, DynamicConv, ODConv, Upcycling, Variant
from condconv_surgery.surgery.upcycle import start_of

STARTING: dict[str, Callable[..., Variant]] = {
    **{kind: cls for kind, cls in VARIANTS.items() if ROUTERS[cls].best_start(cls()) != "noise"},
    "odconv, sigmoid gates": partial(ODConv, gates="sigmoid"),
}
kinds = pytest.mark.parametrize("kind", STARTING)


class Net(nn.Module):
    """A stem, a block (depthwise, 1x1, grouped) with a skip, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.block = Block()
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.relu(self.stem(x))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.wide, self.grouped = nn.Conv2d(12, 16, 1), nn.Conv2d(16, 12, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.grouped(torch.relu(self.wide(self.deep(x))))


def images(count: int, seed: int = 0) -> Tensor:
    """Images that differ in brightness, colour and contrast, as features of real ones do."""
    g = torch.Generator().manual_seed(seed)
    scale, shift = 0.5 + torch.rand(count, 3, 1, 1, generator=g), torch.randn(count, 3, 1, 1, generator=g)
    return torch.randn(count, 3, 10, 10, generator=g) * scale + shift


def convert(variant: Variant, **options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = Net()
    return net, cs.convert(net, variant, example=images(2), classifier=True, **{"start": "auto", **options}).model


@kinds
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 7, 32])
@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated", "without images"])
def test_any_input_is_mapped_as_before(kind: str, experts: int, calibrated: bool) -> None:
    options = {"calibration": images(64)} if calibrated else {}
    net, model = convert(STARTING[kind](experts=experts), **options)
    net, model = net.double(), model.double()
    for temperature in (1.0, 30.0, 0.1):
        set_temperature(model, temperature)
        for training in (False, True):
            for x in (images(5, seed=1), 50.0 * torch.randn(4, 3, 9, 8), torch.zeros(2, 3, 8, 8)):
                expected = copy.deepcopy(net).train(training)(x.double())
                y = copy.deepcopy(model).train(training)(x.double())
                torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [k for k in STARTING if not k.startswith("odconv")])
def test_a_block_router_starts_too(kind: str) -> None:
    net, model = convert(STARTING[kind](experts=4, routing="block"), calibration=images(64))
    assert list(routers(model)) == ["block", "head"]
    gate = routers(model)["block"].eval()(net.stem(images(64)).relu()).gate
    assert gate.std(0).min() > 0.02
    x = images(5, seed=1).double()
    torch.testing.assert_close(model.double().eval()(x), net.double().eval()(x), rtol=1e-12, atol=1e-12)


@kinds
def test_gates_vary_and_each_expert_has_its_own_gradient(kind: str) -> None:
    _, model = convert(STARTING[kind](experts=4), calibration=images(64))
    gates = {}
    for name, router in routers(model).items():
        router.register_forward_hook(lambda *a, name=name: gates.update({name: a[2].gate.detach()}))
    x = images(64)
    F.cross_entropy(model.eval()(x), torch.arange(64) % 6).backward()
    for name, layer in conditional_layers(model).items():
        assert gates[name].std(0).min() > 0.02, name
        each = F.normalize(layer.weight.grad.flatten(1), dim=1)
        assert (each @ each.T).min() < 0.999, name  # the gradients of experts differ
    assert cosine(model) == pytest.approx(1.0)


@kinds
def test_the_router_has_a_gradient_after_one_step(kind: str) -> None:
    """With equal experts gates that sum to 1 do not matter yet."""
    _, model = convert(STARTING[kind](experts=4), calibration=images(64))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images(64)), colours(images(64))).backward()
        optimizer.step()
    for name, layer in conditional_layers(model).items():
        last = layer.router.kernel if kind == "odconv" else layer.router.linear
        assert last.weight.grad.abs().max() > 1e-6, name  # before: 0 up to rounding, 1e-9


@kinds
def test_experts_separate_more_than_from_noise(kind: str) -> None:
    """Measured cosines of experts: CondConv .85 (noise .99), DynamicConv .82 (.98), ODConv .90 (.98)."""
    cosines = {}
    for start in ("auto", "noise"):
        _, model = convert(
            STARTING[kind](experts=4), start=start, **({"calibration": images(64)} if start == "auto" else {})
        )
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        for step in range(60):
            x = images(32, seed=step)
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), colours(x)).backward()
            optimizer.step()
        cosines[start] = cosine(model)
    assert cosines["auto"] < cosines["noise"] - 0.04


def colours(x: Tensor) -> Tensor:
    """Classes of images: the strongest channel and whether it is bright."""
    mean = x.mean((2, 3))
    return 2 * mean.argmax(1) + (mean.max(1).values > 0.7)


def cosine(model: nn.Module) -> float:
    values = []
    for layer in conditional_layers(model).values():
        w = F.normalize(layer.weight.detach().flatten(1), dim=1)
        values.append(float(((w @ w.T).sum() - len(w)) / (len(w) ** 2 - len(w))))
    return sum(values) / len(values)


def test_logits_have_the_spread_asked_for_along_directions_that_vary() -> None:
    net, model = convert(CondConv(experts=4), calibration=images(256), spread=2.0)
    layer = model.block.deep[0]
    logits = layer.router.linear(net.stem(images(256)).relu().mean((2, 3)))
    torch.testing.assert_close(logits.std(0, correction=0), torch.full((4,), 2.0), rtol=1e-3, atol=1e-3)
    assert logits.mean(0).abs().max() < 1e-3
    assert torch.equal(layer.router.linear.weight[1::2], -layer.router.linear.weight[::2])
    assert (logits[:, 0] * logits[:, 2]).mean().abs() < 1e-2  # principal components are uncorrelated


def test_principal_directions_first_then_random_ones() -> None:
    g = torch.Generator().manual_seed(0)
    values = (
        torch.randn(200, 2, generator=g, dtype=torch.float64)
        @ torch.tensor([[3.0, 3.0, 0.0], [0.0, 0.1, 0.0]]).double()
    )
    rows = directions(Features(values, observed=True), 5, g)
    assert rows[:, 2].abs().max() == 0  # a channel that does not vary
    assert rows.isfinite().all()
    torch.testing.assert_close((values @ rows.T).std(0, correction=0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(rows[0, 0] * values[:, 0].std(), rows[0, 1] * values[:, 1].std(), rtol=1e-6, atol=0)


def test_the_seed_fixes_the_start_and_calibration_changes_nothing_else() -> None:
    def weights(**options: object) -> dict[str, Tensor]:
        return convert(CondConv(experts=4), **options)[1].state_dict()

    assert all(torch.equal(a, b) for a, b in zip(weights().values(), weights().values(), strict=True))
    other = weights(seed=1)
    assert not torch.equal(weights()["block.wide.router.linear.weight"], other["block.wide.router.linear.weight"])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(64), torch.zeros(64)), batch_size=20)
    one, two = weights(calibration=loader), weights(calibration=images(64))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)


def test_the_original_is_as_before(tmp_path: object) -> None:
    torch.manual_seed(0)
    net = Net().train()
    state = copy.deepcopy(net.state_dict())
    cs.convert(net, ODConv(experts=4), example=images(2), start="auto", calibration=images(64))
    assert net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_forward_may_change_its_input_and_weights_may_be_on_meta() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2.0))

    torch.manual_seed(0)
    x = images(20)
    before = x.clone()
    cs.convert(InPlace(), CondConv(experts=2), example=x, start="auto")
    cs.convert(InPlace(), CondConv(experts=2), example=images(2), start="auto", calibration=x)
    assert torch.equal(x, before)
    with torch.device("meta"):
        model = Net()
    assert cs.convert(model, CondConv(experts=2), start="auto", prove=False).model.block.wide.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = Net().to(dtype)
    conversion = cs.convert(
        net, DynamicConv(experts=4), example=images(2).to(dtype), start="auto", calibration=images(32)
    )
    assert conversion.difference is not None
    assert {p.dtype for p in conversion.model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": "softmax"}, 'start="softmax" is not supported by CondConv(.|\n)*antithetic, noise'),
        ({"start": "antithetic", "diversity": 0.1}, 'diversity=0.1 with the start "antithetic"(.|\n)*start="noise"'),
        ({"diversity": 0.1}, 'diversity=0.1 with the start "antithetic"'),
        ({"start": "zero"}, "start is 'zero'(.|\n)*auto, antithetic"),
        ({"spread": -1.0}, "spread is -1.0"),
        ({"start": "noise", "calibration": images(20)}, 'calibration= with start="noise"'),
        ({"calibration": images(3)}, "calibration= has 3 images(.|\n)*16 at least"),
        ({"calibration": torch.zeros(20, 3)}, r"calibration= holds a Tensor of shape \(16, 3\)"),
        ({"calibration": ["a.png"]}, "calibration= holds a str"),
    ],
)
def test_an_error_says_what_is_allowed(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        convert(CondConv(experts=2), **options)


def test_auto_is_the_start_of_each_variant_that_is_not_a_saddle() -> None:
    assert {kind: start_of(STARTING[kind](), Upcycling(start="auto")) for kind in STARTING} == {
        "condconv": "antithetic",
        "dynamicconv": "softmax",
        "odconv": "softmax",
        "odconv, sigmoid gates": "antithetic",
    }


def test_images_in_bytes_are_no_calibration() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    with pytest.raises(InputError, match=r"calibration= holds images of uint8(.|\n)*normalised floats"):
        cs.convert(model, cs.CondConv(2), example=torch.randn(2, 3, 8, 8), calibration=images)
