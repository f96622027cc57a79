"""Unreadable images, counted once each over all processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from condconv_surgery.data.image_dataset import UnreadableName
from condconv_surgery.errors import InputError, counted
from condconv_surgery.training.distributed.world import ONE_PROCESS, World


class UnreadableImages:
    """``names`` of the unreadable images of all processes; more than ``limit`` end the run.

    note: called with a line about each new one.
    """

    def __init__(
        self,
        limit: int = 0,
        *,
        world: World = ONE_PROCESS,
        note: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.limit, self.world, self.note = limit, world, note
        self.names: list[str] = []
        self.reasons: dict[str, str] = {}
        self.waiting: list[str] = []
        """Found by this process, not yet exchanged with the others."""

    def add(self, names: Sequence[str]) -> None:
        """Add names that this process has found; they may know why (``UnreadableName``)."""
        self.reasons.update({str(name): name.reason for name in names if isinstance(name, UnreadableName)})
        self.waiting += [name for name in names if name not in self.names and name not in self.waiting]

    def share(self) -> None:
        """Exchange the names between all processes, which must call it at the same time.

        Raises ``InputError`` in all of them past the limit.
        """
        own = [(str(name), self.reasons.get(name, "")) for name in self.waiting]
        gathered, self.waiting = self.world.gather(own), []
        self.reasons.update({name: reason for pairs in gathered for name, reason in pairs})
        new = list(dict.fromkeys(name for pairs in gathered for name, _ in pairs))
        for name in new:
            self.note(f"Unreadable, skipped: {self.explained([name])}")
        self.names += new
        if new and len(self.names) > self.limit:
            raise InputError(
                f"{counted(len(self.names), 'unreadable image')}: {self.explained(self.names[-3:])}.",
                f"At most {self.limit} may be unreadable.",
                f"repair or replace it, or data.max_bad={max(10, 2 * len(self.names))} to skip such images",
            )

    def explained(self, names: Sequence[str]) -> str:
        """The names, each with its reason where that is known."""
        return ", ".join(f"{name} ({self.reasons[name]})" if self.reasons.get(name) else name for name in names)
