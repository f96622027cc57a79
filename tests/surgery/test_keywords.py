"""Layers, and blocks of them, that a model calls by keyword."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.layers.autotune import autotune


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(input=self.b(input=self.a(x)).mean((2, 3)))
        return y


def test_layers_may_be_called_by_keyword(x: Tensor) -> None:
    conversion = cs.convert(Keywords(), cs.CondConv(experts=3), example=x, classifier=True)
    assert [(site.name, site.input) for site in conversion.plan.to_convert] == [("b", (2, 4, 7, 7)), ("head", (2, 6))]
    assert conversion.difference.eval.relative < 1e-5
    assert set(autotune(conversion.model.eval(), x, repeats=1)) <= {"b", "head"}
    assert [node.target for node in torch.fx.symbolic_trace(conversion.model).graph.nodes if node.op == "call_module"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, input: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = input + scale * self.b(input=self.a(input))
        return y


class CallsBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Block()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(scale=x.new_ones(1), input=self.stem(x))
        return y


def test_a_block_and_its_layers_may_be_called_by_keyword(x: Tensor) -> None:
    conversion = cs.convert(CallsBlock(), cs.CondConv(experts=3, routing="block"), example=x)
    assert [router.layers for router in conversion.plan.routers] == [("block.a", "block.b")]
    assert conversion.difference.eval.relative < 1e-5
