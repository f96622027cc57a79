"""Turn known failures of torch into ``TrainingError`` with an explanation, and say which state is kept.

Out of memory, a lost data loader worker, a lost process of a distributed run, parameters without gradient under DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from condconv_surgery.errors import InputError, TrainingError

T = TypeVar("T")

NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")
WORKER_GONE = ("dataloader worker (pid", "dataloader worker gone")  # not "in dataloader worker": it raised an error
KILLED = "killed by signal"
UNUSED_NAMES = "did not receive grad"
UNUSED = "expected to have finished reduction in the prior iteration"
PEER_GONE = ("connection closed by peer", "connection reset by peer", "socket closed", "remote process exited")


@contextmanager
def explained_errors(
    step: Callable[[], int] = lambda: 0, kept: Callable[[Exception], str] = lambda error: ""
) -> Iterator[None]:
    """Turn failures that the machine or the model causes into ``TrainingError``; other errors pass.

    step: returns the number of steps done. kept: a sentence about the saved state, which is added to errors.
    Torch raises ``RuntimeError`` for all of them, so the message decides.
    """
    try:
        yield
    except (TrainingError, InputError) as error:
        raise type(error)(error.given, f"{error.allowed} {kept(error)}".strip(), error.fix) from error
    except (RuntimeError, MemoryError) as error:
        explained = _explained(error, step())
        if explained is None:
            raise
        said = f"{explained.allowed} {kept(explained)}".strip()
        raise TrainingError(explained.given, said, explained.fix) from error


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
            "",
            'a new run with optimizer.accumulate=2, engine.precision="bf16" or engine.checkpointing=True; '
            "if another program took the memory, the same run with resume=True",
        )
    if any(words in text for words in WORKER_GONE) and KILLED not in text and step == 0:
        return TrainingError(
            f"A process that reads images ended before its first batch: {first}.",
            "Its own output, above, says why. Where processes are spawned, each imports the script first, so a script "
            "without a guard starts itself again.",
            'if __name__ == "__main__": before the call of finetune; or data.workers=0',
        )
    if any(words in text for words in WORKER_GONE):
        return TrainingError(
            f"A process that reads images was killed after step {step}: {first}.",
            "The usual cause is that memory or shared memory ran out.",
            "the same run with resume=True and a smaller data.workers=...",
        )
    if any(words in text for words in PEER_GONE):
        return TrainingError(
            f"Another process of the run was lost after step {step}.",
            "Its own output says why.",
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
