"""The decisions of a conversion: which layers, and how their experts start."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.name_patterns import as_argument, patterns_of, require_pattern

LayerFilter = Callable[[str, Any], bool]
"""Takes a layer's name and module, says whether it matches."""


@dataclass(frozen=True)
class Selection:
    """Which layers to convert.

    include, exclude: globs over layer names (``layer4.*``), ``re:`` and a regular expression, or functions
        ``(name, module) -> bool``: one, or several of them. No include means every layer; exclude wins.
    min_channels: skip layers with fewer input or output channels.
    skip_stem: skip the first convolution, which sees the image and not features.
    skip_pooled: skip convolutions over a 1x1 map (squeeze-and-excite), where mixing n kernels costs n times the
        convolution itself; the papers keep them static too.
    classifier: also convert the last layer: an ``nn.Linear`` (a 1x1 convolution), or a convolution that gives logits.
    blocks: with ``routing="block"``, globs or ``re:`` over the names of modules that share one router each; none
        means the smallest module around each layer that holds more than one converted layer.
    subclasses: full names of classes (``package.module.Class``) that override ``nn.Conv2d.forward`` and compute the
        same; their layers are converted like any other. The proof checks each of their calls.
    """

    include: tuple[str | LayerFilter, ...] = ()
    exclude: tuple[str | LayerFilter, ...] = ()
    min_channels: int = 0
    skip_stem: bool = True
    skip_pooled: bool = True
    classifier: bool = False
    blocks: tuple[str, ...] = ()
    subclasses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "blocks", "subclasses"):
            object.__setattr__(self, name, patterns_of(getattr(self, name)))
        for name in ("include", "exclude"):
            for pattern in getattr(self, name):
                if not callable(pattern):
                    require_pattern(name, pattern)
        for block in self.blocks:
            require_pattern("blocks", block)
        for name in self.subclasses:
            _require_class(name)
        if isinstance(self.min_channels, bool) or not isinstance(self.min_channels, int) or self.min_channels < 0:
            raise InputError(
                f"min_channels is {self.min_channels!r}.", "It must be a whole number, 0 or more.", "min_channels=32"
            )


STARTS = ("auto", "antithetic", "softmax", "noise")


@dataclass(frozen=True)
class Upcycling:
    """How experts and routers start, such that the converted layer computes what the trained one computes.

    start: ``"antithetic"`` (CondConv): equal experts ``W``; logits of the router in pairs z and -z, whose sigmoids sum
        to 1. ``"softmax"`` (DynamicConv, the experts of ODConv): equal experts; any logits, whose softmax sums to 1.
        ``"noise"``: experts ``W + eps_e`` with ``eps`` of zero sum over the experts, and a router at zero. That is a
        saddle: what separates the experts is proportional to how far the router has moved, and the reverse.
        ``"auto"``: the first of these that the variant supports.
    spread: standard deviation of the logits over images, before the temperature; not for noise.
    diversity: for noise only, standard deviation of ``eps`` as a fraction of the trained weight's own (0.1).
    seed: of the noise, and of random directions; the same seed gives the same experts.
    """

    start: str = "auto"
    spread: float = 2.0
    diversity: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise InputError(f"start is {self.start!r}.", f"It must be one of: {', '.join(STARTS)}.", 'start="auto"')
        for name, value in (("spread", self.spread), ("diversity", self.diversity)):
            if value is not None and (not isinstance(value, (int, float)) or not 0 <= value < math.inf):
                raise InputError(f"{name} is {value!r}.", "It must be a number, 0 or more.", f"{name}=0.1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise InputError(
                f"seed is {self.seed!r}.", "It must be a whole number, at least 0 and below 2 to the 64.", "seed=0"
            )


def _require_class(name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)+", name):
        raise InputError(
            f"{as_argument('subclasses', [name])} is not the name of a class.",
            "It is the full name, as a plan gives it where it skips such a layer.",
            'subclasses=["package.module.Class"]',
        )
