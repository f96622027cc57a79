"""SIGTERM and Ctrl-C as a wish that the loop sees between two steps, when everything is consistent."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopWish:
    """``signal`` is the first one received, 0 when none. A second Ctrl-C interrupts at once, as usual."""

    def __init__(self) -> None:
        self.signal = 0

    def __bool__(self) -> bool:
        return self.signal != 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


def ignore_signals(worker: int = 0) -> None:
    """Let a process that reads images live on: a terminal or a cluster signals the whole group, and only the training
    process knows when the batches may end."""
    for number in WATCHED:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def watching_signals() -> Iterator[StopWish]:
    """Note SIGTERM and SIGINT inside the block; the handlers of before are put back after it.

    Only the main thread can do that; in another one signals are left to the program.
    """
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, wish.receive) for number in WATCHED}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
