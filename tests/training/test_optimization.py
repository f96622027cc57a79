from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from condconv_surgery.data.image_dataset import Batch
from condconv_surgery.errors import InputError
from condconv_surgery.models.classifier_logits import Logits
from condconv_surgery.recipe import CondConv, DynamicConv, ODConv
from condconv_surgery.recipe.training_sections import OptimizerOptions, ScheduleOptions
from condconv_surgery.training import apply_schedule, lr_factor, parameter_groups, temperature_at
from condconv_surgery.training.evaluation import evaluate
from condconv_surgery.training.objective import classification_loss
from condconv_surgery.training.step import NonFiniteError, train_step
from tests.small_networks import small_net


def test_groups_hold_every_parameter_once_and_decay_kernels_only() -> None:
    model = small_net(ODConv(experts=2))
    groups = parameter_groups(model, OptimizerOptions(weight_decay=0.3))
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    decaying = {name for name, p in model.named_parameters() if decay[id(p)] == 0.3}
    assert decaying == {"stem.weight", "inner.weight", "head.weight"}
    assert {g["name"] for g in groups} == {"weight", "experts", "router", "norm", "bias"}


def test_frozen_parameters_are_left_out() -> None:
    model = small_net().requires_grad_(False)
    with pytest.raises(InputError, match="No parameter of the model can be trained"):
        parameter_groups(model, OptimizerOptions())
    model.head.requires_grad_(True)
    groups = parameter_groups(model, OptimizerOptions())
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.head.parameters()}


def test_rate_agrees_with_torch_schedulers() -> None:
    """Warm-up and cosine against ``LinearLR`` and ``CosineAnnealingLR``."""
    options = ScheduleOptions(warmup=0.25, final_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 10, total_iters=9)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warm.step()
    optimizer.param_groups[0]["lr"] = 2.0
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.2)
    cosine.base_lrs = [2.0]
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    ours = [2.0 * lr_factor(step, 40, options) for step in range(40)]
    assert ours == pytest.approx(rates, rel=1e-6)


def test_temperature_reaches_every_router_that_has_one() -> None:
    options = ScheduleOptions(temperature=30.0, temperature_end=2.0, temperature_steps=0.5)
    model = small_net(DynamicConv(experts=2))
    optimizer = torch.optim.SGD(parameter_groups(model, OptimizerOptions()))
    seen = []
    for step in range(8):
        apply_schedule(model, optimizer, step, 8, options)
        seen.append(float(model.inner.router.temperature))  # type: ignore[union-attr, arg-type]
    assert seen == [30, 23, 16, 9, 2, 2, 2, 2]
    assert temperature_at(3, 8, ScheduleOptions()) is None


def test_thirty_alone_is_the_annealing_of_odconv() -> None:
    """The authors' ``get_temperature``: ten of a hundred epochs, in every iteration."""
    per_epoch, annealed = 7, 10
    ours = [temperature_at(step, 100 * per_epoch, ScheduleOptions(temperature=30.0)) for step in range(90)]
    total = annealed * per_epoch
    theirs = [1.0 + max(0.0, 29.0 * ((total - iteration) / max(1.0, total))) for iteration in range(90)]
    assert ours == pytest.approx(theirs)


def _batch(count: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 5)


def test_accumulated_batches_step_as_one_batch() -> None:
    """Without batch norm and dropout, halves add up to the whole."""
    whole, halves = (small_net(CondConv(experts=2), norm=False, dropout=0.0) for _ in range(2))
    batch = _batch()
    parts = [Batch(batch.images[i : i + 3], batch.labels[i : i + 3]) for i in (0, 3)]
    for model, batches in ((whole, [batch]), (halves, parts)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        outcome = train_step(model, optimizer, batches, clip_norm=0.1)
        assert outcome.tally.count == 6
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_auxiliary_losses_count_three_tenths() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = 1.3 * nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(classification_loss(Logits(logits, (logits,)), labels, 0.1), expected)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    model = small_net()
    before = [p.clone() for p in model.parameters()]
    bad = Batch(torch.full((4, 3, 8, 8), math.nan), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(NonFiniteError):
        train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), [bad])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_scores_agree_with_torch_over_unequal_batches() -> None:
    model = small_net().train()
    batches = [_batch(6, 1), _batch(1, 2), _batch(4, 3)]
    images, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])
    with torch.no_grad():
        logits = model.eval()(images)
    model.train()
    scores = evaluate(model, batches)
    assert scores is not None
    assert scores.count == 11
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores.top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert model.training


def test_scoring_stops_when_told() -> None:
    assert evaluate(small_net(), [_batch()], interrupted=lambda: True) is None
