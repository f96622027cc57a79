"""A small study in a process of its own, to be launched, killed and launched again:

python -m tests.small_study STUDY.json [kill:STEP | kill:record:COUNT]

``kill`` ends the process by SIGKILL before a step, counted over all runs, or before the record is written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from condconv_surgery.studies import arm_costs, compare, run_study
from tests.small_networks import small_net
from tests.small_run import kill_before, without_curves

MEASURED = ("seconds", "step_seconds", "latency", "latency_ratio")
"""What a repeated study measures again."""


def study_options(**changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "data": {"image_size": 16, "batch_size": 8, "workers": 0},
        "optimizer": {"lr": 0.01},
        "schedule": {"epochs": 2},
        "engine": {"save_every": 1},
    }
    for section, values in changes.items():
        options[section] = {**options.get(section, {}), **values}
    return options


def without_times(value: Any) -> Any:
    """JSON values without what is measured, and without digits that depend on the order of sums."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in MEASURED}
    return [without_times(part) for part in value] if isinstance(value, (list, tuple)) else value


def main(arguments: list[str]) -> int:
    without_curves()
    arm_costs.SECONDS = 0.1
    given = json.loads(Path(arguments[0]).read_text())
    for argument in arguments[1:]:
        count = int(argument.rpartition(":")[2])
        if argument.startswith("kill:record"):
            kill_before_record(count)
        else:
            kill_before(count)
    report = compare(small_net(norm=False, dropout=0.0), **given)
    return 0 if report.complete else 1


def kill_before_record(count: int) -> None:
    """Let this process die when it has finished a run, but before that is recorded."""
    original = run_study.write_record

    def write_record(*args: Any) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    run_study.write_record = write_record


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
