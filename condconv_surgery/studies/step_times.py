"""Seconds of a training step of each arm, measured in turns, and the epochs that fit into equal time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice

from torch import nn

from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.runtime.timed_turns import seconds_of
from condconv_surgery.training.batches.loaders import TrainAndVal
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.monitor.callback import Callback
from condconv_surgery.training.run import Run
from condconv_surgery.training.state.stop_signals import StopRequest

WARM_UP = 2
"""Steps of each arm that are not counted."""

FEWEST, MOST = 5, 40
"""Counted steps of each arm."""


def measure_step_seconds(
    arms: Mapping[str, tuple[nn.Module, TrainingOptions]],
    images: TrainAndVal,
    world: World,
    seconds: float = 2.0,
) -> dict[str, float]:
    """The median time of a step of each arm on one batch, which is read before; the arms in turns, so that a slow
    moment of the machine affects all. The models are trained by it.

    seconds: about how long to measure, for each arm. Equal in all processes: the first one's clock counts.
    """
    with ExitStack() as stack:
        runs = {}
        for name, (model, options) in arms.items():
            runs[name] = Run(model, options, world, StopRequest(), Callback(), images=images)
            stack.callback(runs[name].close)
        first = next(iter(runs.values()))
        batches = list(islice(first.data.batches_from(0), first.data.order.accumulate))
        times: dict[str, list[float]] = {name: [] for name in runs}
        begin, rounds, going = time.perf_counter(), 0, True
        while going:
            for name, run in runs.items():
                step = partial(run.learner.step, batches, 0, run.data.order.steps)
                times[name].append(seconds_of(step, world.device))
            rounds += 1
            over = rounds >= MOST + WARM_UP or time.perf_counter() - begin > seconds * len(runs)
            going = world.gather(rounds < FEWEST + WARM_UP or not over)[0]
    medians = {name: statistics.median(own[WARM_UP:]) for name, own in times.items()}
    return world.gather(medians)[0]


def epochs_in_equal_time(step_seconds: Mapping[str, float], epochs: int) -> dict[str, int]:
    """The epochs of each arm that take the time of ``epochs`` epochs of the slowest one, rounded.

    >>> epochs_in_equal_time({"static": 1.0, "condconv:4": 1.3}, 10)
    {'static': 13, 'condconv:4': 10}
    """
    slowest = max(step_seconds.values())
    return {name: max(1, round(epochs * slowest / own)) for name, own in step_seconds.items()}
