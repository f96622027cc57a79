"""Does a converted network learn more than the static one, once that is trained out?

The task is ``examples/endless_emoji.py``: 300 emoji of 32 px under endless random transforms, so what limits a network
is its capacity. A depthwise-separable network of 30k parameters is trained until it gains little more; then every arm
trains on from it with the same images, order and number of steps.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python -m benchmarks.studies.endless_study search --native --packages *.tgz --out runs
    python -m benchmarks.studies.endless_study run --native --packages *.tgz --out runs --seeds 1 2 3 4 5
    python -m benchmarks.studies.endless_study collect --packages *.tgz --out runs

``search`` tries each of ``RATES`` for each arm and scores validation images; ``run`` takes the best one of each arm and
scores test images. Both may be started several times at once, and again after they were stopped: each run is claimed by
one process, and a finished one has a file. Each takes one thread. ``collect`` writes ``study.json``, its tables, plot
and page.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.endless_arms import ARMS, RECIPES
from benchmarks.studies.endless_runs import BASE_STEPS, RATES, STEPS, Study, file_name, say
from condconv_surgery import native
from condconv_surgery.recipe.study_record import ArmCost, ArmRecord, ScoredRun, StudyRecord
from condconv_surgery.reporting import StudyReport
from examples.endless_emoji import read_emoji

TITLE = "300 emoji under endless random transforms"
PROTOCOL = (
    "All arms of a seed start from one depthwise-separable network of 30k parameters, trained for 20,000 steps of 64 "
    "images of 32 px.",
    "All arms of a seed see the same images in the same order, which no other seed sees; AdamW, one cycle.",
    "The learning rate of each arm is the best of 4e-3, 8e-3 and 1.6e-2 on 8,192 validation images, with seed 1. Where "
    "the largest was best, larger ones were tried too: 3.2e-2 for odconv:1, condconv:8 and condconv:4 with noise, "
    "3.2e-2 and 6.4e-2 for static. The rates of static differ by no more than chance, so its search has a second seed. "
    "With twice the steps it has the same rate.",
    "8,192 test images, which all runs share and nothing was selected on.",
)


def collect(study: Study) -> StudyRecord:
    """The record of all runs that are done, and a table of what their routing does on stdout."""
    arms, uses = [], []
    for name in study.arms:
        rows = [json.loads(file.read_text()) for file in sorted(study.folder.glob(f"{file_name(name)}-[0-9].json"))]
        if not rows:
            continue
        runs = tuple(ScoredRun(**row["run"]) for row in rows)
        cost = ArmCost(rows[0]["parameters"], rows[0]["macs_32"], statistics.median(r["step_seconds"] for r in rows))
        arms.append(ArmRecord(name, runs, tuple(study.rates(name)), cost, lr=runs[0].lr))
        macs = f"{rows[0]['macs_224'] / 1e6:.2f} M"
        uses.append(f"| {name} | {len(runs)} | {macs} | {_mean(rows, 'cosine')} | {_mean(rows, 'variation')} |")
    head = ["| arm | runs | MACs at 224 px | cosine of experts | gates vary by |", "|---|---|---|---|---|"]
    say("\n".join([*head, *uses]))
    return StudyRecord(TITLE, tuple(arms), protocol=PROTOCOL, environment=_environment())


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    values = [statistics.mean(row[key].values()) for row in rows if row.get(key)]
    return f"{statistics.mean(values):.3f}" if values else ""


def _environment() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}


def main(arguments: list[str] | None = None) -> None:
    """Parse, then run or collect."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.endless_study", description=__doc__)
    parser.add_argument("what", choices=["search", "run", "collect"])
    parser.add_argument("--packages", nargs="+", required=True, help="archives of emoji-datasource-VENDOR")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default 1 for a search, 1 to 5 for runs")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *RECIPES], default=list(ARMS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="of the search")
    parser.add_argument("--steps", type=int, default=STEPS, help="of an arm")
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS, help="of the network that all arms start from")
    parser.add_argument("--native", action="store_true", help="use the C++ kernels")
    parser.add_argument("--classes", type=int, default=300, help="number of emoji")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    study = Study(read_emoji(options.packages, options.classes), options.out, options.steps, options.base_steps)
    if options.what == "collect":
        StudyReport(collect(study)).write(options.out)
        return
    if options.native:
        native.enable()
    if options.what == "search":
        for lr in options.rates:
            for name in options.arms:
                if not study.arms[name].rate_of:
                    for seed in options.seeds or [1]:
                        study.search(name, lr, seed)
        return
    for seed in options.seeds or range(1, 6):
        for name in options.arms:
            study.run(name, seed)


if __name__ == "__main__":
    main()
