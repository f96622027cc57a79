"""Seeds from a position in the run (seed, epoch, step), not from what ran before.

Order, transforms and dropout each draw from a seed made of the run's seed and a position. Nothing has to be saved for
a run to go on exactly, and nothing depends on how many processes or workers share the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*position: int | str) -> int:
    """A seed of 63 bits for a position such as ``(seed, "order", epoch)``; the same on every machine.

    >>> seed_of(0, "order", 1) == seed_of(0, "order", 1) != seed_of(0, "order", 2)
    True
    """
    text = "/".join(map(str, position)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator_for(*position: int | str) -> torch.Generator:
    """A CPU generator at ``seed_of(*position)``."""
    return torch.Generator().manual_seed(seed_of(*position))


@contextmanager
def seeded(*position: int | str) -> Iterator[None]:
    """Torch's global CPU generator at ``seed_of(*position)`` inside the block, as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*position))
        yield
