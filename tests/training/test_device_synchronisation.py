"""What waits for the device: counted on the CPU by the calls that would wait on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from condconv_surgery.recipe import DynamicConv, TrainingOptions
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.monitor.callback import Callback, StepView
from condconv_surgery.training.monitor.expert_use import ExpertUseMeter
from condconv_surgery.training.run import Run
from condconv_surgery.training.state.stop_signals import StopRequest
from tests.images import write_images
from tests.small_networks import small_net

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "is_nonzero"}


class Reads(TorchFunctionMode):
    """Names of calls that copy values to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class ScalarReads(TorchDispatchMode):
    """Reads of single values, also by torch's own C++ code."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Views(Callback):
    """Keeps steps without reading their loss."""

    def __init__(self) -> None:
        self.views: list[StepView] = []

    def step(self, view: StepView) -> None:
        self.views.append(view)


@pytest.mark.parametrize("class_weights", [False, True])
def test_a_step_synchronises_once_and_its_loss_is_read_later(tmp_path: Path, class_weights: bool) -> None:
    """SGD, for Adam reads its own step counters, which are on the CPU."""
    sections = {
        "data": {
            "folder": str(write_images(tmp_path / "data", each=10)),
            "image_size": 16,
            "batch_size": 8,
            "workers": 0,
        },
        "optimizer": {"name": "sgd", "accumulate": 2, "class_weights": class_weights, "clip_norm": 0.5},
        "schedule": {"temperature": 10.0},
        "layers": {"balance": 0.1, "sharpness": 0.1, "expert_dropout": 0.1},
    }
    options, views = TrainingOptions().updated({"output": str(tmp_path / "run"), **sections}), Views()
    run = Run(small_net(DynamicConv(experts=2)), options, World(), StopRequest(), views)
    run.folder.mkdir(parents=True, exist_ok=True)  # as the lock of a run does
    run.begin()
    batches = iter([next(run.data.batches_from(0)) for _ in range(6)])
    with ScalarReads() as scalars, Reads() as reads:
        for _ in range(3):
            run.step(batches)
    run.close()
    assert reads.names == ["tolist"] * 3  # loss and gradient norm: an optimizer must not see what is not finite
    assert scalars.count == 0
    assert len({view.loss for view in views.views}) == 3
    assert views.views[-1].tally.count == 24


def test_the_use_of_experts_is_counted_without_synchronisation() -> None:
    model = small_net(DynamicConv(experts=2)).eval()
    meter = ExpertUseMeter(model)
    with ScalarReads() as scalars, Reads() as reads:
        for _ in range(3):
            model(torch.randn(2, 3, 8, 8))
    meter.close()
    assert (reads.names, scalars.count) == ([], 0)
    assert meter.uses["inner"].count == 6
