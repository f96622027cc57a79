"""``python -m tests.sweep torchvision timm condconv --table docs/reference/models.md``.

Each model runs in processes of its own, one at a time; its row is appended to the file at once, and a model that has a
row there is not run again. With ``--onnx`` ONNX files of the converted models are tried, seconds to minutes each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from tests.sweep.markdown_table import ROWS, to_markdown
from tests.sweep.model_list import Case, condconv_cases, timm_cases, torchvision_cases
from tests.sweep.run_trials import read_rows, run, run_onnx

LIBRARIES = {"torchvision": torchvision_cases, "timm": timm_cases, "condconv": condconv_cases}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("library", nargs="*", choices=[*LIBRARIES, []], help="which models; none: only the table")
    parser.add_argument("--only", default="*", help="a glob over names, as in 'torchvision:resnet*'")
    parser.add_argument("--onnx", action="store_true", help="ONNX files, of the models that have a row")
    parser.add_argument("-o", "--output", type=Path, default=Path(ROWS), help="rows, one JSON object a line")
    parser.add_argument("--table", type=Path, help="write all rows of --output as Markdown")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a model")
    options = parser.parse_args(arguments)
    cases = [case for library in options.library for case in _cases(library, options.output)]
    failures = 0
    cases = [case for case in cases if fnmatchcase(case.source, options.only)]
    for row in (run_onnx if options.onnx else run)(cases, options.output, options.timeout):
        failures += bool(row.failure)
        outcome = row.failure or row.no_onnx or f"{row.converted} of {row.convolutions}"
        sys.stdout.write(f"{row.source}: {outcome} ({row.seconds:.0f} s)\n")
        sys.stdout.flush()
    if options.table:
        options.table.write_text(to_markdown(list(read_rows(options.output).values())), encoding="utf-8")
    return failures


def _cases(library: str, output: Path) -> list[Case]:
    """The cases, kept beside the rows: finding timm's smallest models takes minutes."""
    cache = output.with_name(f"{output.stem}.{library}.json")
    if not cache.exists():
        cache.write_text(json.dumps([asdict(case) for case in LIBRARIES[library]()]), encoding="utf-8")
    return [Case(**row) for row in json.loads(cache.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    sys.exit(min(main(), 1))
