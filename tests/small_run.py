"""A small run in a process of its own, to be launched, killed and launched again:

python -m tests.small_run OPTIONS.json [resume] [norm] [kill:RANK:STEP]

Its network has no dropout, and without ``norm`` no batch norm, so that several processes compute what one does.
``kill`` ends one process by SIGKILL, the first time only, as torchrun counts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from condconv_surgery.recipe import CondConv, TrainingOptions
from condconv_surgery.training import finetune
from condconv_surgery.training import learner as learner_module
from condconv_surgery.training import run as run_module
from tests.small_networks import small_net


def main(arguments: list[str]) -> int:
    without_curves()
    options = TrainingOptions.from_dict(json.loads(Path(arguments[0]).read_text()))
    for argument in arguments[1:]:
        if argument.startswith("kill:") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            _, rank, step = argument.split(":")
            if os.environ.get("RANK", "0") == rank:
                kill_before(int(step))
    model = small_net(CondConv(experts=2), norm="norm" in arguments, dropout=0.0)
    result = finetune(model, options, resume="resume" in arguments)
    return 128 + result.stopped_by if result.stopped_by else 0


def without_curves() -> None:
    """Drawing takes longer than these runs."""
    run_module.draw_curves = lambda rows, path: None


def kill_before(fatal: int) -> None:
    """Let this process die at the beginning of a step."""
    original = learner_module.train_step

    def train_step(*args, **how):  # type: ignore[no-untyped-def]
        nonlocal fatal
        fatal -= 1
        if fatal < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **how)

    learner_module.train_step = train_step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
