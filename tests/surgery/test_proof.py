"""What the proof looks at: outputs of every kind and precision; and what it will not prove."""

from __future__ import annotations

import math
from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torchvision
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError, ProofError
from condconv_surgery.surgery.proof.output_tensors import output_tensors


@dataclass
class Boxes:
    scores: Tensor


@dataclass(slots=True)
class Slotted:
    scores: Tensor


class Pair(NamedTuple):
    name: str
    scores: Any


class Returns(nn.Module):
    """Two convolutions, and whatever ``made`` makes of their output; wrong: of another output once converted."""

    def __init__(self, made: Callable[[Tensor], Any], wrong: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.made, self.wrong = made, wrong

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        return self.made(2 * y if self.wrong and not isinstance(self.b, nn.Conv2d) else y)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "a dataclass": Boxes,
    "a dataclass with slots": Slotted,
    "an array": lambda y: y.detach().numpy(),
    "a reversed array": lambda y: y.detach().numpy()[::-1],
    "a number of NumPy": lambda y: numpy.float32(y.mean().item()),
    "an object": lambda y: SimpleNamespace(name="boxes", inner=SimpleNamespace(scores=y)),
    "a distribution": lambda y: torch.distributions.Normal(y, torch.ones(1)),
    "a named tuple of an object": lambda y: Pair("boxes", Boxes(y)),
    "a mapping": lambda y: UserDict(scores=y),
    "a queue": lambda y: deque([y]),
    "complex": lambda y: torch.fft.fft2(y),
    "complex logits": lambda y: torch.complex(y, y).mean((2, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_found_in_any_output(kind: str, x: Tensor) -> None:
    gap = cs.convert(Returns(KINDS[kind]), cs.CondConv(experts=3), example=x).difference.eval
    assert gap.relative < 1e-5
    with pytest.raises(ProofError, match=r"differs from the original by (?!inf)\S+ in eval mode"):
        cs.convert(Returns(KINDS[kind], wrong=True), cs.CondConv(experts=3), example=x)


def test_outputs_keep_their_order_and_may_hold_themselves() -> None:
    first, second, third = torch.ones(1), torch.ones(2), torch.ones(3)
    output: dict[str, Any] = {"a": [first, Boxes(second)], "b": (first, "text", None, 3.0, {1})}
    output["self"], output["last"] = output, third
    output["model"] = nn.Linear(1, 1)
    assert [tensor.numel() for tensor in output_tensors(output)] == [1, 2, 1, 3]


def test_an_output_without_tensors_cannot_be_proven(x: Tensor) -> None:
    model = Returns(lambda y: "cat")
    with pytest.raises(InputError, match=r"returns a str[\s\S]*nothing would be compared[\s\S]*prove=False"):
        cs.convert(model, cs.CondConv(experts=2), example=x)
    assert type(model.b) is nn.Conv2d
    assert cs.convert(model, cs.CondConv(experts=2), example=x, prove=False).difference is None


def test_an_empty_batch_compares_nothing_and_says_so(x: Tensor) -> None:
    conversion = cs.convert(Returns(lambda y: y), cs.CondConv(experts=2), example=x[:0])
    assert (conversion.difference.eval, conversion.difference.train) == (None, None)
    assert "nothing compared in eval mode: the outputs are empty" in conversion.plan.notes


def test_a_mode_without_tensors_is_named(x: Tensor) -> None:
    class InEvalMode(Returns):
        def forward(self, x: Tensor) -> Any:
            return None if self.training and len(self.made(self.a(x))) else super().forward(x)

    conversion = cs.convert(InEvalMode(lambda y: y), cs.CondConv(experts=2), example=x)
    assert conversion.difference.eval.relative < 1e-5
    assert conversion.difference.train is None
    assert "nothing compared in train mode: the outputs are empty" in conversion.plan.notes


def test_float64_outputs_without_a_number_excuse_nothing(x: Tensor) -> None:
    model = Returns(lambda y: y[:0] if y.dtype == torch.float64 else y, wrong=True)
    with pytest.raises(ProofError, match="differs from the original by"):
        cs.convert(model, cs.CondConv(experts=2), example=x)


def test_whole_numbers_that_differ_are_no_rounding(x: Tensor) -> None:
    with pytest.raises(ProofError, match="differs from the original by inf") as raised:
        cs.convert(Returns(lambda y: (y > 0).sum() + (y * 100).long(), wrong=True), cs.CondConv(), example=x)
    assert "tolerance=" not in str(raised.value)


class HalfInside(nn.Module):
    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).half(), nn.Conv2d(4, 4, 1)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x).half()).float())
        return y if isinstance(self.b, nn.Conv2d) else y * (1 + self.error)


def test_a_half_layer_in_a_float_model_rounds_as_halves_do(x: Tensor) -> None:
    relative = cs.convert(HalfInside(), cs.CondConv(experts=3), example=x).difference.eval.relative
    assert 1e-5 < relative < 1e-2
    with pytest.raises(ProofError, match="differs from the original"):
        cs.convert(HalfInside(error=0.5), cs.CondConv(experts=3), example=x)


class Autocast(nn.Module):
    """Computes in bfloat16 whatever it is given; only: it refuses float64."""

    def __init__(self, only: bool = False, error: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.only, self.error = only, error

    def forward(self, x: Tensor) -> Tensor:
        if self.only and x.dtype == torch.float64:
            raise TypeError("float32 only")
        with torch.autocast("cpu", torch.bfloat16):
            y = self.b(self.a(x)).to(x.dtype)
        return y if isinstance(self.b, nn.Conv2d) else y * (1 + self.error)


@pytest.mark.parametrize("only", [False, True])
def test_autocast_inside_a_model_is_no_error_and_hides_none(only: bool, x: Tensor) -> None:
    conversion = cs.convert(Autocast(only), cs.CondConv(experts=3), example=x)
    assert 1e-4 < conversion.difference.eval.relative < 5e-2
    assert (conversion.difference_float64 is None) == only
    if not only:
        assert conversion.difference_float64.eval.relative < 1e-10
    with pytest.raises(ProofError, match="differs from the original"):
        cs.convert(Autocast(only, error=0.5), cs.CondConv(experts=3), example=x)


@pytest.mark.parametrize("tolerance", [math.nan, -1.0, "1e-4"])
def test_a_tolerance_is_a_number_from_0(tolerance: Any, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"tolerance is .*\n  It must be a number, 0 or more"):
        cs.convert(Returns(lambda y: y), cs.CondConv(), example=x, tolerance=tolerance)


@pytest.mark.parametrize("variant", ["condconv", cs.CondConv, None])
def test_a_variant_is_an_object(variant: Any, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"was given the variant[\s\S]*CondConv\(\)[\s\S]*CondConv\(experts=4\)"):
        cs.convert(Returns(lambda y: y), variant, example=x)


def test_a_detector_that_finds_nothing_is_compared_where_it_can_be() -> None:
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=2, score_thresh=2.0
    )
    conversion = cs.convert(detector, cs.CondConv(experts=2), example=([torch.rand(3, 64, 64)],), include=["head.*"])
    assert conversion.difference.eval is None or conversion.difference.eval.relative < 1e-4
