"""Cases into rows, one at a time, in processes of their own, each written down at once."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.sweep.model_list import Case
from tests.sweep.trial import Row, loads_alike, try_model, try_onnx


def run(cases: Iterable[Case], output: Path, timeout: float) -> Iterator[Row]:
    """The row of each case that has none in ``output`` yet, appended there."""
    done = read_rows(output)
    for case in cases:
        if case.source not in done:
            yield _kept(_row_of(case, timeout), output)


def run_onnx(cases: Iterable[Case], output: Path, timeout: float) -> Iterator[Row]:
    """The row, with an ONNX file tried, of each case that was converted and has not tried one, appended there."""
    rows = read_rows(output)
    for case in cases:
        row = rows.get(case.source)
        if row is None or not row.converted or row.failure or row.onnx is not None or row.no_onnx:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = _in_a_process(try_onnx, row, case, Path(folder), timeout=timeout)
            except ProcessError as error:
                row = replace(row, no_onnx=str(error))
        yield _kept(row, output)


def _kept(row: Row, output: Path) -> Row:
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row.to_dict()) + "\n")
    return row


def read_rows(output: Path) -> dict[str, Row]:
    """By source; of two rows of one model the later counts."""
    if not output.exists():
        return {}
    rows = [_row(json.loads(line)) for line in output.read_text(encoding="utf-8").splitlines()]
    return {row.source: row for row in rows}


def _row(data: dict[str, Any]) -> Row:
    """JSON has no tuples."""
    return Row(**{**data, "input": tuple(data["input"]), "notes": tuple(data["notes"])})


def _row_of(case: Case, timeout: float) -> Row:
    """Converted and saved by one process, loaded by another."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            row: Row = _in_a_process(try_model, case, Path(folder), timeout=timeout)
            if row.converted and not row.failure:
                row = replace(row, loaded=_in_a_process(loads_alike, Path(folder), timeout=timeout))
        except ProcessError as error:
            return Row(case.source, case.kind, failure=str(error))
    return row


class ProcessError(Exception):
    """A process ended without an answer, or took too long."""


def _in_a_process(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """Called in a fork of a server that has imported torch and run nothing: it has seen no model of another process,
    and all memory of a model goes with it. Raises ``ProcessError``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sweep.trial"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            return ours.recv()
        process.kill()
        raise ProcessError(f"not done within {timeout:.0f} s")
    except EOFError as error:
        process.join()
        raise ProcessError(f"the process ended with {process.exitcode}") from error
    finally:
        process.join()


def _send(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")  # torchvision and timm warn of their own habits
    pipe.send(function(*arguments))
