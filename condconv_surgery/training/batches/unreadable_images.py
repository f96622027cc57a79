"""Images that can't be read, counted once each by all processes of a run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from condconv_surgery.errors import InputError
from condconv_surgery.training.distributed.world import World


class Unreadable:
    """``names`` of the unreadable images that any process has met; more than ``limit`` end the run.

    note: told a line about each new one.
    """

    def __init__(
        self,
        limit: int = 0,
        *,
        world: World = World(),  # noqa: B008  # frozen
        note: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.limit, self.world, self.note = limit, world, note
        self.names: list[str] = []
        self.waiting: list[str] = []
        """Met by this process alone, until the processes tell each other."""

    def meet(self, names: Sequence[str]) -> None:
        """Note names that this process has met."""
        self.waiting += [name for name in names if name not in self.names and name not in self.waiting]

    def share(self) -> None:
        """Put together what the processes have met; all must call it at the same time.

        Raises ``InputError``, in all alike, past the limit.
        """
        met, self.waiting = self.world.gather(self.waiting), []
        new = list(dict.fromkeys(name for names in met for name in names))
        for name in new:
            self.note(f"Unreadable, passed over: {name}")
        self.names += new
        if new and len(self.names) > self.limit:
            raise InputError(
                f"{len(self.names)} unreadable image{'s' if len(self.names) > 1 else ''}: "
                f"{', '.join(self.names[-3:])}.",
                f"At most {self.limit} may be damaged or of another format than its name says.",
                f"remove it, or --max-bad {max(10, 2 * len(self.names))} to pass over such images",
            )
