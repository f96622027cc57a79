"""What torch says only in a traceback, in words: no memory left, a reading process killed, another process gone, and
layers that several processes can't train because they are never called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from condconv_surgery.errors import TrainingError

T = TypeVar("T")

KEPT = "States saved before are kept."
NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")
READER_GONE = ("dataloader worker (pid", "dataloader worker gone")  # "in dataloader worker": what a reader raised
UNUSED = "expected to have finished reduction in the prior iteration"
PEER_GONE = ("connection closed by peer", "connection reset by peer", "socket closed", "remote process exited")


@contextmanager
def in_words(step: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turn torch's failures that the machine or the model causes, not the program, into ``TrainingError``.

    step: how many steps are done. Torch raises ``RuntimeError`` for all of them, so its words decide.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = _known(error, step())
        if known is None:
            raise
        raise known from error


def reading(batches: Iterable[T]) -> Iterator[T]:
    """``batches``; where a reader dies while a batch is handed over, torch's own error for a dead one."""
    try:
        yield from batches
    except (OSError, EOFError) as error:  # of the connection: what images raise has been dealt with in the reader
        raise RuntimeError(f"DataLoader worker gone: {error}") from error


def _known(error: Exception, step: int) -> TrainingError | None:
    text = str(error).lower()
    first = (str(error).strip().splitlines() or [""])[0].partition(". ")[0].rstrip(".")
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return TrainingError(
            f"No memory left after step {step}: {first or 'Python could not get any'}.",
            KEPT,
            "a new run with --accumulate 2, --precision bf16 or --set engine.checkpointing=true; "
            "if another program took the memory, the same command with --resume",
        )
    if any(words in text for words in READER_GONE):
        return TrainingError(
            f"A process that reads images was killed after step {step}: {first}.",
            f"Mostly there was no memory left, or no shared memory. {KEPT}",
            "the same command with --resume and fewer --workers",
        )
    if any(words in text for words in PEER_GONE):
        return TrainingError(
            f"Another process of the run was gone after step {step}.",
            f"Its own lines say why. {KEPT}",
            "the same command with --resume; torchrun --max-restarts 3 does that by itself",
        )
    if UNUSED in text:
        return TrainingError(
            f"Some layers that learn have no part in the model's answer: {_after(str(error), 'did not receive grad')}.",
            "Several processes exchange the gradient of every parameter that learns.",
            "--freeze LAYER for each that the model never calls, in a new run; or one process",
        )
    return None


def _after(text: str, words: str) -> str:
    """The first line from ``words`` on, where torch tells the numbers or names of parameters."""
    return next((line.strip().rstrip(".") for line in text.splitlines() if words in line), "torch names none")
