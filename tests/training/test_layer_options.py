"""Settings made for conditional layers: rates, phases, gates, statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv, TrainingOptions, Upcycling, Variant
from condconv_surgery.recipe.training_sections import LayerOptions, OptimizerOptions
from condconv_surgery.surgery.upcycle import start_router
from condconv_surgery.training.batch_norm import recalibrate
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.gate_regularization import (
    ExpertDropout,
    GateRecorder,
    balance_loss,
    sharpness_loss,
)
from condconv_surgery.training.learner import Learner
from condconv_surgery.training.monitor.expert_use import ExpertUse, ExpertUseMeter, without_effect
from condconv_surgery.training.monitor.unused_options import unused_options
from condconv_surgery.training.optimization.parameter_groups import parameter_groups
from tests.small_networks import SmallNet, small_net

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = Batch(X, torch.arange(8) % 5)


def randomize_router(model: SmallNet) -> None:
    """Away from the neutral start, so that gates differ between images."""
    generator = torch.Generator().manual_seed(1)
    for layer in conditional_layers(model).values():
        for parameter in layer.router.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)


def learner(model: nn.Module, heads: dict[str, int] | None = None, **sections: object) -> Learner:
    return Learner(model, TrainingOptions().updated(dict(sections)), World(), [2] * 5, heads or {})


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_routers_and_experts_have_rates_and_decays_of_their_own() -> None:
    model = small_net(CondConv(experts=2))
    layers = LayerOptions(router_lr=2.0, expert_lr=0.5, router_decay=0.1, expert_decay=0.3)
    groups = {g["name"]: g for g in parameter_groups(model, OptimizerOptions(lr=0.1, weight_decay=1.0), layers)}
    assert groups["router"]["lr"] == pytest.approx(0.2)
    assert groups["experts"]["lr"] == pytest.approx(0.05)
    assert {name: g["weight_decay"] for name, g in groups.items()} == pytest.approx(
        {"weight": 1.0, "experts": 0.3, "router": 0.1, "norm": 0.0, "bias": 0.0}
    )


def test_layer_decay_is_geometric_from_last_to_first() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(3)])
    rates = {
        id(p): g["lr"] for g in parameter_groups(model, OptimizerOptions(lr=1.0, layer_decay=0.01)) for p in g["params"]
    }
    assert [rates[id(layer.weight)] for layer in model] == pytest.approx([0.01, 0.1, 1.0])


def test_warm_routers_move_routers_and_a_new_head_only_then_everything() -> None:
    model = small_net(CondConv(experts=2))
    steps, sections = 4, {"schedule": {"epochs": 2, "warmup": 0.0}, "layers": {"warm_routers": 1}}
    it = learner(model, {"head": 5}, **sections)
    before = snapshot(model)
    for step in (0, 1):
        it.step([BATCH], step, steps)
    routing = {name for name in before if ".router." in name or name.startswith("head")}
    assert changed(model, before) == routing
    it.step([BATCH], 2, steps)
    assert changed(model, before) == set(before)


def test_warm_routers_need_routers() -> None:
    with pytest.raises(InputError, match="without routers"):
        learner(small_net(), layers={"warm_routers": 1})
    with pytest.raises(InputError, match="whose routers are all frozen"):
        learner(small_net(CondConv(2)), layers={"warm_routers": 1, "freeze": ["*router*"]})


def test_frozen_layers_stay_to_the_bit_with_their_statistics() -> None:
    model = small_net()
    it = learner(model, layers={"freeze": ["stem", "nor*"]})
    before, mean = snapshot(model), model.norm.running_mean.clone()
    it.step([BATCH], 0, 1)
    assert changed(model, before) == {"inner.weight", "inner.bias", "head.weight", "head.bias"}
    assert torch.equal(model.norm.running_mean, mean)
    with pytest.raises(InputError, match=r'layers\.freeze=\["layer5"\] matches none of 5 layers'):
        learner(small_net(), layers={"freeze": ["layer5"]})


def test_frozen_statistics_stay_and_weights_learn() -> None:
    model = small_net(ODConv(experts=2))
    statistics = [b.clone() for b in model.buffers()]
    it = learner(model, layers={"batch_norm": "freeze"})
    before = snapshot(model)
    it.step([BATCH], 0, 1)
    assert "norm.weight" in changed(model, before)
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


def test_recalibrated_statistics_are_those_of_the_data() -> None:
    model = small_net()
    model.train()
    parts = [Batch(X[:4], BATCH.labels[:4]), Batch(X[4:], BATCH.labels[4:])]
    assert recalibrate(model, parts) == 1
    seen = model.stem(X)
    torch.testing.assert_close(model.norm.running_mean, seen.mean((0, 2, 3)))
    variances = torch.stack([model.stem(p.images).var((0, 2, 3)) for p in parts]).mean(0)
    torch.testing.assert_close(model.norm.running_var, variances)
    assert model.norm.momentum == 0.1
    assert model.training


def test_expert_dropout_keeps_the_sum_of_the_gates_and_is_off_in_eval() -> None:
    model = small_net(CondConv(experts=4))
    randomize_router(model)
    pooled = torch.randn(500, 8)
    router = model.inner.router
    full = router(pooled).gate
    dropout = ExpertDropout(model, 0.4)
    thinned = router.train()(pooled).gate
    torch.testing.assert_close(thinned.sum(1), full.sum(1))
    dropped = (thinned == 0).float().mean().item()
    assert dropped == pytest.approx(0.4 * (1 - 0.4**3), abs=0.04)  # where all would go, all stay
    assert torch.equal(router.eval()(pooled).gate, full)
    dropout.close()
    assert torch.equal(router.train()(pooled).gate, full)


def test_gate_losses_at_their_ends() -> None:
    even, one = torch.full((6, 4), 0.25), torch.eye(4)[torch.zeros(6, dtype=torch.int64)]
    spread = torch.eye(4)
    log4 = math.log(4)
    assert balance_loss(even).item() == pytest.approx(0, abs=1e-6)
    assert balance_loss(spread).item() == pytest.approx(0, abs=1e-6)
    assert balance_loss(one).item() == pytest.approx(log4)
    assert sharpness_loss(even).item() == pytest.approx(log4)
    assert sharpness_loss(spread).item() == pytest.approx(0, abs=1e-6)
    assert balance_loss(3 * even).item() == pytest.approx(0, abs=1e-6)  # shares, whatever the sum


@pytest.mark.parametrize(("setting", "loss"), [("balance", balance_loss), ("sharpness", sharpness_loss)])
def test_regularisers_lower_what_they_name(setting: str, loss: object) -> None:
    def after(weight: float) -> float:
        model = small_net(DynamicConv(experts=4), dropout=0.0)
        randomize_router(model)
        it = learner(model, layers={setting: weight}, optimizer={"lr": 0.01}, schedule={"warmup": 0.0})
        for step in range(15):
            it.step([BATCH], step, 100)
        it.close()
        watch = GateRecorder(model)
        model.eval()(X)
        (gate,) = watch.take().values()
        watch.close()
        return loss(gate).item()  # type: ignore[operator, no-any-return]

    assert after(3.0) < after(0.0) - 0.02


def test_gate_use_adds_up_over_batches() -> None:
    gate = torch.rand(10, 3) + 0.1
    use = ExpertUse(torch.zeros(3))
    use.add(gate[:4])
    use.add(gate[4:])
    p = gate / gate.sum(1, keepdim=True)
    assert use.use == pytest.approx(p.mean(0).tolist(), rel=1e-5)
    assert use.entropy == pytest.approx((-(p * p.log()).sum(1).mean() / math.log(3)).item(), rel=1e-5)


def test_the_use_of_experts_is_that_of_all_processes() -> None:
    """One process has seen six images, another two, a third none; idle runs do not count."""
    model = small_net(CondConv(experts=4)).eval()
    randomize_router(model)

    def meter(*parts: torch.Tensor) -> ExpertUseMeter:
        made = ExpertUseMeter(model)
        for part in parts:
            model(part)
        with made.paused():
            model(torch.zeros(1, 3, 8, 8))
        made.close()
        return made

    class Three(World):
        def gather(self, value: object) -> list[object]:
            told = [m.together(World()) for m in (others, meter())]
            return [value, *told]

    others = meter(X[6:])
    (together,) = meter(X[:3], X[3:6]).together(Three()).values()
    ((name, alone),) = meter(X).together(World()).items()
    experts = model.get_submodule(name).weight
    assert isinstance(experts, torch.Tensor)
    assert together.kernel_variation(experts) == pytest.approx(alone.kernel_variation(experts), rel=1e-4)
    assert together.count == alone.count == 8
    assert together.use == pytest.approx(alone.use)
    assert together.entropy == pytest.approx(alone.entropy)
    assert sum(alone.use) == pytest.approx(1.0)


def test_closing_leaves_no_hooks() -> None:
    model = small_net(CondConv(experts=2))
    sections = {
        "layers": {"expert_dropout": 0.1, "balance": 1.0},
        "distill": {"teacher": "start", "features": ["stem"]},
        "engine": {"checkpointing": True},
    }
    learner(model, **sections).close()
    assert not any(m._forward_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_temperature_of_an_averaged_model_is_the_one_of_the_step() -> None:
    model = small_net(DynamicConv(experts=2))
    it = learner(model, engine={"ema": 0.9}, schedule={"temperature": 30.0, "temperature_steps": 0.5})
    for step in range(10):
        it.step([BATCH], step, 10)
    assert it.scored is not model
    assert float(it.scored.inner.router.temperature) == 1.0  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    ("variant", "words"),
    [(None, ["schedule.temperature", "layers.router_lr, layers.balance"]), (CondConv(2), ["schedule.temperature"])],
)
def test_options_that_meet_nothing_are_reported(variant: Variant | None, words: list[str]) -> None:
    changes = {"schedule": {"temperature": 30.0}, "layers": {"router_lr": 2.0, "balance": 0.1}}
    options = TrainingOptions().updated(changes)
    lines = unused_options(small_net(variant), options)
    assert [line.partition(word)[1] for line, word in zip(lines, words, strict=True)] == words
    assert unused_options(small_net(DynamicConv(2)), options) == []
    assert unused_options(small_net(), TrainingOptions()) == []
    alone = {"distill": {"features": ["inner"]}, "schedule": {"temperature_steps": 0.5}}
    found = unused_options(small_net(DynamicConv(2)), TrainingOptions().updated(alone))
    assert [line.partition(":")[0] for line in found] == ["distill.features", "schedule.temperature_steps"]
    alone["distill"]["teacher"], alone["schedule"]["temperature"] = "start", 30.0  # type: ignore[assignment]
    assert unused_options(small_net(DynamicConv(2)), TrainingOptions().updated(alone)) == []


def test_layer_options_are_values() -> None:
    assert replace(LayerOptions(), balance=0.5).balance == 0.5


def test_a_note_says_when_routing_has_no_effect() -> None:
    model = small_net(DynamicConv(experts=4, reduction=1))
    images = X * torch.linspace(0.1, 4.0, len(X)).view(-1, 1, 1, 1)

    def note() -> str:
        meter = ExpertUseMeter(model)
        model.eval()(images)
        meter.close()
        return without_effect(model, meter.together(World()))

    assert "the mixed kernels of 1 of 1 layers vary by less than 1%" in note()  # the gates are constant
    ((name, layer),) = conditional_layers(model).items()
    start_router(layer.router, layer.geometry.in_channels, Upcycling("softmax", spread=2.0), name, None)
    layer.weight.data = layer.weight.data[:1].repeat(4, 1, 1, 1, 1)
    assert "1 of 1 layers" in note()  # the experts are equal
    layer.weight.data[0].neg_()
    assert note() == ""
