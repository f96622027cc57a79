"""The exponential moving average of a run, whose decay is warmed up."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from condconv_surgery.training import finetune
from condconv_surgery.training.optimization.weight_average import average_note, decay_at
from tests.images import write_images
from tests.small_networks import small_net
from tests.training.test_training_run import StopAt, assert_same, options_for, weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", each=7)


def test_the_average_of_a_short_run_follows_its_weights(folder: Path) -> None:
    """With a constant decay of .9999 it would be the untrained network: 60 steps move it by .6%."""
    options = options_for(folder, epochs=15).updated({"engine": {"ema": 0.9999}})
    callback = StopAt(-1, 0)
    result = finetune(small_net(), options, callback=callback)
    assert result.best_top1 == 1.0
    assert "engine.ema=0.9999 is not reached: the decay is warmed up, to 0.9348 after 60 steps." in callback.lines


def test_the_decay_of_the_average() -> None:
    """Values of timm 1.0's ModelEmaV3(use_warmup=True, warmup_gamma=1, warmup_power=2/3).get_decay."""
    assert [decay_at(step, 0.9999) for step in (1, 9, 99)] == pytest.approx([0.3700395, 0.7845565, 0.9535841])
    assert decay_at(10**7, 0.9999) == 0.9999
    assert average_note(0.9, 1000) == average_note(0.0, 10) == []
    assert "it cannot have converged" in average_note(0.999, 8)[0]


def test_an_average_goes_on_after_a_stop(folder: Path) -> None:
    whole, cut = (options_for(folder, name).updated({"engine": {"ema": 0.9}}) for name in ("whole", "cut"))
    finetune(small_net(), whole)
    finetune(small_net(), cut, callback=StopAt(5, signal.SIGTERM))
    finetune(small_net(), cut, resume=True)
    assert_same(weights(whole), weights(cut))
