"""Converted models go through pickle: other processes, ``torch.save`` of a whole model, copies."""

from __future__ import annotations

import abc
import copy
import inspect
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.layers import RoutedBlock
from condconv_surgery.layers.routed_block import remove_block_router
from condconv_surgery.recipe import CondConv, DynamicConv, Variant
from tests.training.forked import forked, fresh_python
from tests.variant_cases import EVERY_VARIANT, scramble

ROOT = Path(__file__).parents[2]
X = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(0))
BY_BLOCK: list[Variant] = [CondConv(experts=3, routing="block"), DynamicConv(experts=2, routing="block")]


class Block(nn.Module, abc.ABC):
    """Arithmetic, functions of torch and its mode, and a metaclass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.gelu(self.first(x)).clamp(max=float("inf")))
        return torch.relu(x) + F.dropout(y, 0.5, self.training).to(dtype=torch.float32)


class WithState(Block):
    """Has a __getstate__ of its own."""

    written = "no"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "written": "yes"}


def converted(variant: Variant, block: type[Block] = Block) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), block(), nn.Flatten(), nn.Linear(6 * 81, 4))
    model = cs.convert(net, variant, example=X).model.eval()
    scramble(model)
    return model


def answer(model: nn.Module, file: Path) -> int:
    """What another process does with a model that it is given."""
    torch.save(model(X).detach(), file)
    return 0


@pytest.mark.parametrize("variant", [*EVERY_VARIANT, *BY_BLOCK], ids=str)
def test_a_pickled_model_is_the_same_function_in_both_modes(variant: Variant) -> None:
    model = converted(variant)
    for protocol in (0, pickle.HIGHEST_PROTOCOL):
        other = pickle.loads(pickle.dumps(model, protocol))
        assert torch.equal(other.eval()(X), model.eval()(X))
        for each in (other.train(), model.train()):
            torch.manual_seed(1)
            each.output = each(X)
        assert torch.equal(other.output, model.output)
        del model.output


@pytest.mark.parametrize("variant", BY_BLOCK, ids=str)
def test_a_saved_model_is_loaded_in_a_fresh_process(variant: Variant, tmp_path: Path) -> None:
    model = converted(variant)
    torch.save(model, tmp_path / "model.pt")
    torch.save((X, model(X)), tmp_path / "expected.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1] + '/model.pt', weights_only=False);"
        "x, expected = torch.load(sys.argv[1] + '/expected.pt');"
        "torch.testing.assert_close(model(x), expected); print(type(model[1]).__name__)"
    )
    done = fresh_python(code, tmp_path, folder=ROOT)
    assert done.stdout == "RoutedBlock\n", done.stderr


def test_another_process_takes_a_model(tmp_path: Path) -> None:
    model, file, output = converted(BY_BLOCK[0]), tmp_path / "y.pt", tmp_path / "output"
    process = forked(answer, model, file, output=output)
    process.join(120)
    assert process.exitcode == 0, output.read_text()
    torch.testing.assert_close(torch.load(file), model(X))


def test_a_copy_has_the_same_class_and_a_pickle_one_like_it() -> None:
    block = converted(BY_BLOCK[0], WithState)[1]
    assert type(copy.deepcopy(block)) is type(block)
    other = pickle.loads(pickle.dumps(block))
    assert isinstance(other, RoutedBlock)
    assert isinstance(other, WithState)
    assert other.written == "yes"  # its own __getstate__ was called
    assert other.block_routing.in_eval.source == block.block_routing.in_eval.source
    remove_block_router(other)
    assert type(other) is WithState


def test_tracebacks_and_inspect_show_the_code_of_a_routed_block() -> None:
    block = converted(BY_BLOCK[0])[1]
    assert "self.router(x)" in inspect.getsource(type(block).routed_eval)
    with pytest.raises(RuntimeError) as caught:
        block(torch.ones(1, 5, 4, 4))
    assert "router = self.router(x)" in "".join(traceback.format_exception(caught.value))
