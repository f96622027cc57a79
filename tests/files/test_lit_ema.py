"""Averaged weights whose names have lost their dots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from condconv_surgery.models.checkpoints.lit_ema import with_averages

NUMBERS = {"ema.decay": torch.tensor(0.9), "ema.num_updates": torch.tensor(7)}
RAW = {"net.a.1.weight": torch.zeros(2, 2), "net.a.1.bias": torch.zeros(2), "net.bn.running_mean": torch.zeros(2)}
AVERAGES = {"ema.a1weight": torch.ones(2, 2), "ema.a1bias": torch.ones(2)}


def test_parameters_are_replaced_and_buffers_stay() -> None:
    state = with_averages({"loss.weight": torch.zeros(1), **RAW, **AVERAGES, **NUMBERS}, Path("m.ckpt"))
    assert {name: float(tensor.max()) for name, tensor in state.items()} == {
        "loss.weight": 0.0,
        "net.a.1.weight": 1.0,
        "net.a.1.bias": 1.0,
        "net.bn.running_mean": 0.0,
    }


@pytest.mark.parametrize(
    "other",
    [
        {"ema.a1weight": torch.ones(3, 3)},
        {"ema.something": torch.ones(1)},
        {"net.a1.weight": torch.zeros(2, 2)},
    ],
    ids=["another shape", "of no parameter", "two of one name"],
)
def test_averages_that_do_not_fit_are_left_and_that_is_said(
    other: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    state = with_averages({**RAW, **AVERAGES, **NUMBERS, **other}, Path("m.ckpt"))
    assert state.keys() == {name for name in {**RAW, **other} if not name.startswith("ema.")}
    assert not any(tensor.any() for tensor in state.values())
    assert "the averages under 'ema.' fit no weights beside them and were not taken" in caplog.text


def test_other_names_are_left_alone() -> None:
    for state in (RAW, {**RAW, **NUMBERS, "ema.a.1.weight": torch.ones(2, 2)}, {**RAW, "num_updates": torch.ones(1)}):
        assert with_averages(state, Path("m.ckpt")) is state
