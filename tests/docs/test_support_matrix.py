"""The support matrix of the README, cell by cell, for what runs without a compiler and without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 5e-3}
RUNTIMES = ("eager PyTorch", "`torch.compile`", "`torch.export`")


def cells() -> list[tuple[str, str, str]]:
    """(variant, runtime, precision) of each entry in the columns that can be checked here."""
    header = re.search(r"^\| \| eager PyTorch .*$", README, re.MULTILINE)
    assert header
    columns = [cell.strip() for cell in header[0].split("|")[2:-1]]
    entries = []
    for line in re.findall(r"^\| (?:CondConv|DynamicConv|ODConv) \|.*$", README, re.MULTILINE):
        variant, *supported = (cell.strip() for cell in line.split("|")[1:-1])
        for runtime, precisions in zip(columns, supported, strict=True):
            if runtime in RUNTIMES:
                entries += [(variant, runtime, precision) for precision in precisions.split(", ")]
    return entries


def run(model: nn.Module, runtime: str, x: Tensor) -> Tensor:
    """``model(x)`` in a runtime."""
    if runtime == "`torch.compile`":
        return torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    if runtime == "`torch.export`":
        batch = torch.export.Dim("batch", min=2, max=64)
        return torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()(x)
    return model(x)


def test_the_matrix_has_all_variants_and_runtimes() -> None:
    assert {(variant, runtime) for variant, runtime, _ in cells()} == {
        (variant, runtime) for variant in ("CondConv", "DynamicConv", "ODConv") for runtime in RUNTIMES
    }


@pytest.mark.parametrize(
    ("variant", "runtime", "precision", "mixed"),
    [(*cell, mixed) for cell in cells() for mixed in (False, True) if not mixed or cell[-1] != "fp32"],
)
def test_a_cell_of_the_matrix(variant: str, runtime: str, precision: str, mixed: bool) -> None:
    """mixed: by autocast, which float32 has not."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.randn(3, 8, 9, 9)
    plain = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    model = cs.convert(plain, getattr(cs, variant)(experts=2), example=x, skip_stem=False).model.eval()
    expected, dtype, tolerance = plain(x), DTYPES[precision], TOLERANCES[precision]
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=mixed):
        if not mixed:
            model, x = model.to(dtype), x.to(dtype)
        y = run(model, runtime, x)
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
