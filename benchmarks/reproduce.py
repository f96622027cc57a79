"""Measure again what a page states, and print stated against measured: ``python -m benchmarks reproduce README``.

The numbers are read from the page's tables; ``ROWS`` says how each row is measured. A row of figures that nobody
measures is an error, so that a page cannot state what this command does not check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

from benchmarks.model_times import contender_steps
from benchmarks.protocol import Protocol, Spread
from benchmarks.rounded_models import contenders
from benchmarks.rounded_models import measure as measure_rounded
from condconv_surgery import native
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import CondConv
from condconv_surgery.reporting import profile
from condconv_surgery.surgery import convert

PAGES = {"README": Path(__file__).parent.parent / "README.md"}
MODELS = {"MobileNetV2": "mobilenet_v2", "ResNet-50": "resnet50"}
MODES = ((1, "eval"), (32, "eval"), (32, "train"))


@dataclass(frozen=True)
class Stated:
    """One cell of a table: its row's label, its column's and its text."""

    row: str
    column: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What was measured for a cell, or why it was not."""

    stated: Stated
    measured: str

    def line(self) -> str:
        """Label, column, stated, measured."""
        return f"{self.stated.row}\n    {self.stated.column}: stated {self.stated.text}; measured {self.measured}"


def stated_numbers(page: str) -> list[Stated]:
    """The cells with numbers of the first table of ``page`` that has a column for a model."""
    lines = page.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("|") and any(m in line for m in MODELS)), None)
    if start is None:
        raise InputError("This page has no table of models.", f"Columns are: {', '.join(MODELS)}.")
    columns, found = _cells(lines[start]), []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        label, *cells = _cells(line)
        found += [Stated(label, column, cell) for column, cell in zip(columns[1:], cells, strict=True)]
    return [cell for cell in found if re.search(r"\d", cell.text)]


def reproduce(page: str, protocol: Protocol, models: list[str] | None = None) -> Iterator[Answer]:
    """The answers for every number that ``page`` states, one after the other.

    models: columns to measure, by default all. Raises ``InputError`` for a row that is not in ``ROWS``, before
    anything is measured.
    """
    cells = [(cell, measure_of(cell.row)) for cell in stated_numbers(page)]
    for cell, measure in cells:
        if models is None or cell.column in models:
            yield Answer(cell, measure(MODELS[cell.column], protocol))


def measure_of(row: str) -> Callable[[str, Protocol], str]:
    """How the figures of a row are measured. Raises ``InputError`` for a row that nobody measures."""
    for start, measure in ROWS.items():
        if row.startswith(start):
            return measure
    raise InputError(
        f"The page states figures that nothing measures: {row!r}.",
        f"Known rows start with: {'; '.join(ROWS)}.",
        "add the row to ROWS in benchmarks/reproduce.py",
    )


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _published(model: str, protocol: Protocol) -> str:
    return "not here: published by the papers, ImageNet from scratch"


def _on_a_gpu(model: str, protocol: Protocol) -> str:
    return (
        "not here: python -m benchmarks models --quick --device cuda --autocast bfloat16 --channels-last --clock graph"
    )


def _macs(model: str, protocol: Protocol) -> str:
    """Of one image at 224 px: static, and with 8 experts as in the paper."""
    static = torchvision.models.get_model(model, weights=None).eval()
    options = {"mobilenet_v2": {"classifier": True}, "resnet50": {"include": ["layer4.*"]}}[model]
    x = torch.randn(1, 3, 224, 224)
    counted = profile(convert(static, CondConv(experts=8), example=x, prove=False, **options).model, x)
    return ", ".join(f"{count / 1e6:.0f} M" for count in (counted.macs_before, counted.macs.total))


def _with_kernels(model: str, protocol: Protocol) -> str:
    return _times(model, protocol, on=True)


def _without_kernels(model: str, protocol: Protocol) -> str:
    return _times(model, protocol, on=False)


def _times(model: str, protocol: Protocol, on: bool) -> str:
    """CondConv with 4 experts over static: one image, 32 images, a training step of 32."""
    with native.kernels(on):
        found: list[Spread] = []
        for batch, mode in MODES:
            steps = contender_steps(model, {"condconv4": CondConv(experts=4)}, batch, mode)
            found.append(protocol.measure(steps, at_least=0.2 if batch == 1 else 0.0).ratios["condconv4"])
    return ", ".join(map(str, found))


def _rounded(model: str, protocol: Protocol) -> str:
    """CondConv with 8 experts over static for one image: exact, and with the experts in int8."""
    with native.kernels(True):
        found = measure_rounded(contenders(model, CondConv(experts=8)), 1, 224, protocol).ratios
    return f"{found['float32']}, {found['int8']}"


ROWS: dict[str, Callable[[str, Protocol], str]] = {
    "top-1 on ImageNet, published": _published,
    "MACs per image": _macs,
    "time / static, CondConv 4 experts, C++ kernels": _with_kernels,
    "the same with PyTorch operators": _without_kernels,
    "1 image, C++ kernels: CondConv 8 experts": _rounded,
    "time / static on an H100": _on_a_gpu,
}
"""By the start of a row's label."""
