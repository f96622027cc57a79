"""A copying conversion while other threads run the model: they see their own layers, mode, buffers and hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.layers import conditional_layers
from condconv_surgery.surgery.copy_model import copy_sharing_parameters


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)).relu())
        return y


class Served(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.block = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Block()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.block(self.norm(self.stem(x))))
        return y


@contextmanager
def serving(model: nn.Module, x: Tensor) -> Iterator[list[str]]:
    """Run ``model`` in another thread within the block; yields what that thread saw change, one line each."""
    layers = dict(model.named_modules())
    expected = model(x)
    tensors = [(tensor, tensor._version) for tensor in (*model.parameters(), *model.buffers())]
    changes: list[str] = []
    stop, started = threading.Event(), threading.Event()

    def serve() -> None:
        while not stop.is_set() and not changes:
            try:
                with torch.no_grad():
                    output = model(x)
            except Exception as error:
                changes.append(f"raised {error!r}")
                break
            if not torch.equal(output, expected):
                changes.append("another output")
            changes.extend(f"another {name}" for name, m in model.named_modules() if m is not layers.get(name))
            changes.extend(f"{name} in train mode" for name, m in layers.items() if m.training)
            changes.extend(f"a hook on {name}" for name, m in layers.items() if m._forward_hooks)
            changes.extend("a tensor was written" for tensor, version in tensors if tensor._version != version)
            started.set()

    thread = threading.Thread(target=serve)
    thread.start()
    started.wait(10)
    try:
        yield changes
    finally:
        stop.set()
        thread.join()


def convert(model: nn.Module, x: Tensor) -> None:
    assert list(conditional_layers(cs.convert(model, cs.CondConv(), example=x).model)) == [
        "block.first",
        "block.second",
    ]


def plan_and_trace(model: nn.Module, x: Tensor) -> None:
    assert "then BatchNorm2d" in str(cs.plan(model, cs.CondConv(), example=x))


def share_routers(model: nn.Module, x: Tensor) -> None:
    assert cs.convert(model, cs.CondConv(experts=2, routing="block"), example=x).plan.routers


@pytest.mark.parametrize("work", [convert, plan_and_trace, share_routers])
def test_a_thread_that_serves_the_model_notices_nothing(work: Callable[[nn.Module, Tensor], None]) -> None:
    torch.manual_seed(0)
    model, x = Served().eval(), torch.randn(2, 3, 12, 12)
    model.train()(x)
    model.eval()
    with serving(model, x) as changes:
        for _ in range(10):
            work(model, x)
    assert changes == []


def test_calls_of_other_threads_are_not_counted() -> None:
    """A layer that another thread calls meanwhile is not one that the conversion calls."""
    torch.manual_seed(0)
    model, x = Served().eval(), torch.randn(2, 3, 12, 12)
    with serving(model, x):
        for _ in range(5):
            plan = cs.convert(model, cs.CondConv(), example=x).plan
            assert [(site.name, site.calls) for site in plan.to_convert] == [("block.first", 1), ("block.second", 1)]


def test_what_runs_is_a_copy_with_the_same_parameters() -> None:
    model = Served()
    copied = copy_sharing_parameters(model)
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copied.buffers(), model.buffers(), strict=True))


def test_a_converted_copy_shares_no_memory_with_its_original() -> None:
    model = Served()
    converted = cs.convert(model, cs.CondConv(), example=torch.randn(2, 3, 12, 12)).model
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not own & {tensor.data_ptr() for tensor in (*converted.parameters(), *converted.buffers())}
