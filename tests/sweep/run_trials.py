"""Cases into rows, one at a time, each in a process of its own and written down at once."""

from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.sweep.model_list import Case
from tests.sweep.trial import Row, try_model


def run(cases: Iterable[Case], output: Path, timeout: float) -> Iterator[Row]:
    """The row of each case that has none in ``output`` yet, appended there."""
    for case in cases:
        if case.source not in read_rows(output):
            row = _in_a_process(case, timeout)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row.to_dict()) + "\n")
            yield row


def read_rows(output: Path) -> dict[str, Row]:
    """By source; of two rows of one model the later counts."""
    if not output.exists():
        return {}
    rows = [_row(json.loads(line)) for line in output.read_text(encoding="utf-8").splitlines()]
    return {row.source: row for row in rows}


def _row(data: dict[str, Any]) -> Row:
    """JSON has no tuples."""
    return Row(**{**data, "input": tuple(data["input"]), "notes": tuple(data["notes"])})


def _in_a_process(case: Case, timeout: float) -> Row:
    """A fork of a server that has imported torch and run nothing: all memory of a model goes with its process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sweep.trial"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_row, args=(case, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            return Row(**ours.recv())
        process.kill()
        return Row(case.source, case.kind, seconds=timeout, failure=f"not done within {timeout:.0f} s")
    except EOFError:
        process.join()
        return Row(case.source, case.kind, failure=f"the process ended with {process.exitcode}")
    finally:
        process.join()


def _send_row(case: Case, pipe: Connection) -> None:
    warnings.simplefilter("ignore")  # torchvision and timm warn of their own habits
    pipe.send(try_model(case).to_dict())
