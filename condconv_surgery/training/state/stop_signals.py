"""SIGTERM, SIGHUP and Ctrl-C as a request that the loop reads between two steps, when the state is consistent."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """``signal`` is the first signal received, 0 for none. A second Ctrl-C interrupts immediately, as usual.

    All processes of a run stop when one of them has received a signal.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __bool__(self) -> bool:
        return self.signal != 0

    @property
    def number(self) -> int:
        """What stopped the processes: the signal that this one received, else SIGTERM."""
        return int(self.signal or signal.SIGTERM)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


def ignore_signals(worker: int = 0) -> None:
    """Ignore signals in a data loader worker: a terminal or a cluster signals the whole process group, and the training
    process alone decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGINT and SIGHUP inside the block; afterwards the previous handlers are installed again.

    A SIGHUP that is ignored stays so: ``nohup`` asks for that. Only the main thread can catch signals; in another
    thread they are left to the program.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS if not _is_ignored_hangup(number)}
    for number in before:
        signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ignored_hangup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
