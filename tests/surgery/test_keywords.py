"""Layers, and blocks of them, that a model calls by keyword."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers.autotune import autotune
from condconv_surgery.recipe import InputSpec
from condconv_surgery.training.classifier_heads import find_heads


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


class KeywordOnly(nn.Module):
    """Its forward takes nothing by position, as wrappers of transformers' models often do."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 5)

    def forward(self, *, scale: Tensor | None = None, pixel_values: Tensor) -> Tensor:
        y: Tensor = self.head(self.b(self.a(pixel_values)).mean((2, 3)))
        return y if scale is None else y * scale


def test_an_example_may_hold_keyword_arguments(x: Tensor) -> None:
    example = {"pixel_values": x, "scale": torch.tensor(2.0)}
    conversion = cs.convert(KeywordOnly(), cs.CondConv(experts=3), example=example)
    assert [(site.name, site.input) for site in conversion.plan.to_convert] == [("b", (2, 4, 7, 7))]
    assert conversion.difference.eval.relative < 1e-5
    assert conversion.model(**example).shape == (2, 5)
    assert set(example) == {"pixel_values", "scale"}


def test_images_go_to_the_keyword_of_a_forward_without_positions(x: Tensor) -> None:
    spec = {"example": None, "include": ["b"]}
    model = KeywordOnly()
    converted = cs.convert(model, cs.CondConv(experts=3), **spec, calibration=x.repeat(16, 1, 1, 1)).model
    from_dicts = [{"labels": torch.zeros(16), "pixel_values": x.repeat(8, 1, 1, 1)} for _ in range(2)]
    same = cs.convert(model, cs.CondConv(experts=3), **spec, calibration=from_dicts).model
    assert torch.equal(converted.b.router.linear.weight, same.b.router.linear.weight)
    measured = cs.report(converted, inputs={"pixel_values": x})
    assert measured.profile.to_dict() == cs.report(converted, inputs=InputSpec(height=9, width=9)).profile.to_dict()
    assert measured.profile.input == "1x3x9x9"
    assert set(autotune(converted.eval(), {"pixel_values": x}, repeats=1)) <= {"b"}


def test_a_dict_that_is_one_argument_stays_one(x: Tensor) -> None:
    class TakesBatch(KeywordOnly):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(pixel_values=batch["image"])

    conversion = cs.convert(TakesBatch(), cs.CondConv(experts=3), example={"image": x})
    assert conversion.difference.eval.relative < 1e-5


def test_targets_by_keyword_stay_in_float32_in_the_proof(x: Tensor) -> None:
    """The first keyword is doubled alone where the model does not run with all of them in float64."""

    class WithTargets(KeywordOnly):
        def forward(self, *, pixel_values: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
            y = super().forward(pixel_values=pixel_values)
            assert target.dtype is torch.float32
            return y - y[:1] + target  # of two almost equal images: amplifies rounding

    example = {"pixel_values": torch.cat([x[:1], x[:1] + 1e-5]), "target": torch.zeros(1)}
    conversion = cs.convert(WithTargets(), cs.CondConv(experts=3), example=example)
    assert conversion.difference_float64 is not None


def test_finetune_says_that_it_calls_by_position() -> None:
    with pytest.raises(InputError, match=r"takes pixel_values by keyword only(.|\n)*def forward\(self, pixel_values"):
        find_heads(KeywordOnly(), InputSpec(height=9, width=9))
