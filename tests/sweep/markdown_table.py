"""The rows of a sweep as a page of Markdown."""

from __future__ import annotations

import platform
from importlib.metadata import version

from tests.sweep.model_list import torchvision_left_aside
from tests.sweep.trial import EXPERTS, Row

COLUMNS = (
    *("model", "input", "convolutions", "converted", "skipped", "eval", "train", "float64", "loaded = saved"),
    *("step", "folded", "ONNX"),
)
ROWS = "benchmarks/results/models.jsonl"
"""What has been tried, on one machine or another."""

HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def to_markdown(rows: list[Row]) -> str:
    """A page: how it was made, the totals, the failures, one table for each library."""
    libraries: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.source):
        libraries.setdefault(row.source.partition(":")[0], []).append(row)
    packages = ["torch", *(name for name in libraries if name != "condconv")]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    parts = [
        "# Models tried\n",
        "Every model of torchvision, and of each of timm's families the one with the fewest parameters.\n",
        f"Written by `python -m tests.sweep {' '.join(libraries)} -o {ROWS} --table docs/reference/models.md` with "
        f"{versions}, Python {platform.python_version()}, on the CPU. Random weights, {EXPERTS} CondConv experts, "
        "every convolution that can be converted, the stem and those over 1x1 maps too.\n",
        "- eval, train: the largest difference between original and converted, relative to the largest output; inf: "
        "another number of outputs (boxes). A batch norm over few values amplifies rounding, and near ties decide "
        "which boxes stay: where float32 leaves doubt the proof decides in float64, in both modes.",
        "- loaded = saved: the outputs of the artifact, loaded by another process, are bit-identical.",
        "- step: a step by the sign of the gradient moved every parameter that has one.",
        "- folded: how many batch norms `condconv_surgery.fold` put into the converted layers, and the largest "
        "difference of the outputs in eval mode after it (in brackets: in float64, where float32 leaves doubt).",
        "- ONNX: the largest difference of the exported file in ONNX Runtime, one file for batches of 1, 3 and 8 "
        "(detectors: one image). Empty: not tried (`--onnx` does); `no (1)`: the reason stands below the table. A "
        "network whose random weights amplify rounding cannot be compared: EfficientNet-B1's own outputs in float32 "
        "are half of their size away from those in float64.\n",
    ]
    if "torchvision" in libraries:
        parts.append(
            f"Left aside: torchvision's {len(torchvision_left_aside())} int8 models (`quantized_*`), whose "
            "convolutions hold no weight to train.\n"
        )
    for library, found in libraries.items():
        reasons = list(dict.fromkeys(row.no_onnx for row in found if row.no_onnx))
        lines = [_line(row, reasons) for row in found if not row.failure]
        parts += [f"## {library}\n", _totals(found), HEADER, *lines, ""]
        parts += [f"- not converted: {row.source}: {_first_line(row.failure)}" for row in found if row.failure]
        parts += [f"{number}. no ONNX file: {reason}" for number, reason in enumerate(reasons, 1)]
        parts += [""]
    return "\n".join(parts)


def _totals(rows: list[Row]) -> str:
    done = [row for row in rows if row.converted]
    whole = sum(row.convolutions for row in rows)
    return (
        f"{len(rows)} models: {len(done)} converted, {sum(not r.failure and not r.converted for r in rows)} without a "
        f"2D convolution, {sum(bool(row.failure) for row in rows)} failed; "
        f"{sum(row.converted for row in done)} of {whole} convolutions. ONNX: "
        f"{sum(row.onnx is not None or bool(row.no_onnx) for row in rows)} tried, "
        f"{sum(row.onnx is not None for row in rows)} equal.\n"
    )


def _line(row: Row, reasons: list[str]) -> str:
    if not row.converted:
        why = row.notes[0] if row.notes else ""
        return f"| {row.source} | | 0 | | {why} {'| ' * (len(COLUMNS) - 5)}|"
    skipped = "; ".join(f"{count}: {reason}" for reason, count in row.skipped.items())
    cells = [
        row.source,
        "x".join(map(str, row.input)),
        str(row.convolutions),
        str(row.converted),
        skipped,
        _number(row.eval),
        _number(row.train),
        "" if row.exact is None else _number(row.exact),
        _yes(row.loaded),
        _yes(row.stepped),
        _folded(row),
        f"no ({reasons.index(row.no_onnx) + 1})" if row.no_onnx else "" if row.onnx is None else _number(row.onnx),
    ]
    return f"| {' | '.join(cells)} |"


def _folded(row: Row) -> str:
    if not row.folded:
        return ""
    exact = "" if row.fused_exact is None else f" ({_number(row.fused_exact)})"
    return f"{row.folded}: {_number(row.fused)}{exact}"


def _number(value: float | None) -> str:
    return "not run" if value is None else f"{value:.0e}" if value else "0"


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"


def _first_line(failure: str) -> str:
    return failure.splitlines()[0]
