"""``python -m tests.exports onnx openvino litert ncnn --table docs/reference/exports.md``.

Each export's row is appended to the file at once; what has a row there is not run again. Without a runtime only the
table is written.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path

from condconv_surgery.deploy.export_model import RUNTIMES
from condconv_surgery.deploy.file_proof import TOLERANCE
from tests.exports.one_export import CONSTANT_KERNELS, MAX_RATIO, NETWORKS, SIDE, VARIANTS, Row, try_export

ROWS = "benchmarks/results/exports.jsonl"
"""What has been tried, on one machine or another."""

PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "litert": "litert-torch", "ncnn": "ncnn", "pt2": "torch"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m tests.exports", description=__doc__)
    parser.add_argument("runtime", nargs="*", choices=[*RUNTIMES, []], help="none: only the table")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("-o", "--output", type=Path, default=Path(ROWS), help="rows, one JSON object a line")
    parser.add_argument("--table", type=Path, help="write all rows of --output as Markdown")
    options = parser.parse_args(arguments)
    failures = 0
    for row in _run(options):
        failures += bool(row.failure)
        outcome = row.failure or f"{row.forms}, {row.difference:.0e}, {row.ratio:.3f} of the weights"
        sys.stdout.write(f"{row.runtime} {row.network} {row.variant}: {outcome} ({row.seconds:.0f} s)\n")
        sys.stdout.flush()
    if options.table:
        options.table.write_text(to_markdown(read_rows(options.output)), encoding="utf-8")
    return failures


def _run(options: argparse.Namespace) -> Iterator[Row]:
    done = {(row.network, row.variant, row.runtime) for row in read_rows(options.output)}
    for runtime in options.runtime:
        for network, variant in _cases(runtime):
            if network in options.networks and variant in options.variants and (network, variant, runtime) not in done:
                yield _tried(network, variant, runtime, options.output)


def _tried(network: str, variant: str, runtime: str, output: Path) -> Row:
    """Its row, which is in ``output`` from now on."""
    row = try_export(network, variant, runtime)
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row.to_dict()) + "\n")
    return row


def read_rows(output: Path) -> list[Row]:
    """The rows written so far."""
    if not output.exists():
        return []
    return [Row(**json.loads(line)) for line in output.read_text(encoding="utf-8").splitlines()]


def to_markdown(rows: list[Row]) -> str:
    """A page: how it was made, and one table for each runtime."""
    runtimes = [name for name in PACKAGES if any(row.runtime == name for row in rows)]
    versions = ", ".join(f"{PACKAGES[name]} {version(PACKAGES[name])}" for name in runtimes if name != "pt2")
    lines = [
        "# Exports tried\n",
        "Networks of torchvision, converted, exported with `cs.export` and run in their runtime against the model. "
        f"Written by `python -m tests.exports {' '.join(runtimes)} -o {ROWS} --table docs/reference/exports.md` "
        f"with torch {version('torch')}, torchvision {version('torchvision')}, {versions}, Python "
        f"{platform.python_version()}, on the CPU.\n",
        "All layers are converted but the stem and those over 1x1 maps. Weights and routers are random: experts "
        f"differ, and gates vary between images. Images of {SIDE} pixels, float32.\n",
        "- forms: how many layers have each [form](../how-to/deploy.md#export-to-a-runtime), as the exporter chose "
        "when the row was tried.",
        f"- file / weights: bytes of the file over those of the converted model's weights, at most {MAX_RATIO}, "
        "and 2 MB more in `pt2`, which writes its graph as text.",
        "- difference: the largest between model and file, relative to the largest output of the input, at most "
        f"{TOLERANCE:g}. `onnx`, `pt2` and `openvino`: one file for any batch and size, at batches 1, 3 and 8 and at "
        "two sizes. `litert` and `ncnn`: one image of one size.\n",
    ]
    for runtime in runtimes:
        cases = _cases(runtime)
        found = [row for row in rows if row.runtime == runtime]
        found.sort(key=lambda row: cases.index((row.network, row.variant)))
        done = sum(not row.failure for row in found)
        lines += [f"## {runtime}\n", f"{len(found)} of {len(cases)} tried, {done} exported and equal.\n"]
        lines += ["| network | variant | forms | MB | file / weights | difference |"]
        lines += ["|---|---|---|---|---|---|", *(_line(row) for row in found), ""]
    return "\n".join(lines)


def _cases(runtime: str) -> list[tuple[str, str]]:
    """Network and variant of each export to a runtime."""
    fit = ("CondConv 4", "ODConv 1, no spatial") if runtime in CONSTANT_KERNELS else VARIANTS
    return list(product(NETWORKS, fit))


def _line(row: Row) -> str:
    if row.failure:
        return f"| {row.network} | {row.variant} | failed: {row.failure} | | | |"
    forms = ", ".join(f"{count} {name}" for name, count in sorted(row.forms.items()))
    cells = (row.network, row.variant, forms, f"{row.megabytes:.1f}", f"{row.ratio:.3f}", f"{row.difference:.0e}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(min(main(), 1))
