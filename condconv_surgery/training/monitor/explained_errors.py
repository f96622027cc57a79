"""Turn known failures of torch into ``TrainingError`` with an explanation.

Out of memory, a killed data loader worker, a lost process of a distributed run, parameters without gradient under DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from condconv_surgery.errors import TrainingError

T = TypeVar("T")

KEPT = "States saved before are kept."
NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")
WORKER_GONE = ("dataloader worker (pid", "dataloader worker gone")  # not "in dataloader worker": it raised an error
UNUSED_NAMES = "did not receive grad"
UNUSED = "expected to have finished reduction in the prior iteration"
PEER_GONE = ("connection closed by peer", "connection reset by peer", "socket closed", "remote process exited")


@contextmanager
def explained_errors(step: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turn failures that the machine or the model causes into ``TrainingError``; other errors pass.

    step: returns the number of steps done. Torch raises ``RuntimeError`` for all of them, so the message decides.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        explained = _explained(error, step())
        if explained is None:
            raise
        raise explained from error


def reading(batches: Iterable[T]) -> Iterator[T]:
    """``batches``; a worker that dies while it hands over a batch raises torch's own error for a dead worker."""
    try:
        yield from batches
    except (OSError, EOFError) as error:  # of the connection; errors of images are handled in the worker
        raise RuntimeError(f"DataLoader worker gone: {error}") from error


def _explained(error: Exception, step: int) -> TrainingError | None:
    text = str(error).lower()
    first = (str(error).strip().splitlines() or [""])[0].partition(". ")[0].rstrip(".")
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return TrainingError(
            f"No memory left after step {step}: {first or 'Python could not allocate any'}.",
            KEPT,
            'a new run with optimizer.accumulate=2, engine.precision="bf16" or engine.checkpointing=True; '
            "if another program took the memory, the same run with resume=True",
        )
    if any(words in text for words in WORKER_GONE):
        return TrainingError(
            f"A process that reads images was killed after step {step}: {first}.",
            f"The usual cause is that memory or shared memory ran out. {KEPT}",
            "the same run with resume=True and a smaller data.workers=...",
        )
    if any(words in text for words in PEER_GONE):
        return TrainingError(
            f"Another process of the run was lost after step {step}.",
            f"Its own output says why. {KEPT}",
            "the same run with resume=True; torchrun --max-restarts 3 does that by itself",
        )
    if UNUSED in text:
        lines = [line.strip().rstrip(".") for line in str(error).splitlines() if UNUSED_NAMES in line]
        return TrainingError(
            f"The model's output does not depend on some trained layers: {lines[0] if lines else 'torch lists none'}.",
            "Several processes exchange the gradient of every trained parameter.",
            'layers.freeze=["LAYER"] with each that the model never calls, in a new run; or one process',
        )
    return None
