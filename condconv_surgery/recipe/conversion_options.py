"""The decisions of a conversion: which layers, and how their experts start."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from condconv_surgery.errors import InputError


@dataclass(frozen=True)
class Selection:
    """Which layers to convert.

    include, exclude: globs over layer names (``layer4.*``), or ``re:`` and a regular expression: one text, or several.
        No include means every layer; exclude wins.
    min_channels: leave layers with fewer input or output channels.
    skip_stem: leave the first convolution, which sees the picture and not features.
    skip_pooled: leave convolutions over a 1x1 map (squeeze-and-excite), where mixing n kernels costs n times the
        convolution itself; the papers leave them static too.
    classifier: also convert the last ``nn.Linear`` (a Linear is a 1x1 convolution).
    blocks: with ``routing="block"``, globs or ``re:`` over the names of the modules that share a router each; none
        means the smallest module around each layer that holds more than one converted layer.
    subclasses: full names of classes (``package.module.Class``) that override ``nn.Conv2d.forward`` and compute the
        same; their layers are converted like any other. The proof checks each call of one.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_channels: int = 0
    skip_stem: bool = True
    skip_pooled: bool = True
    classifier: bool = False
    blocks: tuple[str, ...] = ()
    subclasses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, flag in (("include", "--include"), ("exclude", "--exclude"), ("blocks", "--block")):
            patterns = patterns_of(getattr(self, name))
            object.__setattr__(self, name, patterns)
            for pattern in patterns:
                _require_pattern(flag, pattern)
        object.__setattr__(self, "subclasses", patterns_of(self.subclasses))
        for name in self.subclasses:
            _require_class(name)
        if isinstance(self.min_channels, bool) or not isinstance(self.min_channels, int) or self.min_channels < 0:
            raise InputError(
                f"min_channels is {self.min_channels!r}.", "It must be a whole number, 0 or more.", "--min-channels 32"
            )


@dataclass(frozen=True)
class Upcycling:
    """How the experts start: ``W + eps_e``, with ``eps`` of zero sum over the experts.

    diversity: standard deviation of ``eps`` as a fraction of the trained weight's own.
    seed: of the noise; the same seed gives the same experts.
    """

    diversity: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.diversity, (int, float)) or not 0 <= self.diversity < math.inf:
            raise InputError(f"diversity is {self.diversity!r}.", "It must be a number, 0 or more.", "--diversity 0.1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise InputError(
                f"seed is {self.seed!r}.", "It must be a whole number, at least 0 and below 2 to the 64.", "--seed 0"
            )


def patterns_of(given: object) -> tuple[str, ...]:
    """One text is one pattern, ``None`` is none. Raises ``InputError`` for what holds no patterns."""
    if given is None or isinstance(given, str):
        return () if given is None else (given,)
    if not isinstance(given, Iterable):
        raise InputError(f"{given!r} is no pattern.", "A pattern is a text, and there can be a list.", '["layer4.*"]')
    return tuple(given)


def _require_class(name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)+", name):
        raise InputError(
            f"--subclass {name!r} is no name of a class.",
            "It is the full name, as a plan gives it where it leaves such a layer.",
            "--subclass package.module.Class",
        )


def _require_pattern(flag: str, pattern: object) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise InputError(f"{flag} {pattern!r} is empty.", "A pattern names layers.", f'{flag} "layer4.*"')
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise InputError(
                f"{flag} {pattern!r} is not a regular expression: {error}.",
                "After re: comes a Python regular expression.",
                f'{flag} "re:layer[34]\\..*"',
            ) from error
