"""Short labels of models for plots and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath


def short_name(title: str) -> str:
    """A short label of a model: the folder of a run, else the file name.

    >>> short_name("runs/a/best.safetensors"), short_name("models/b.safetensors"), short_name("torchvision:resnet18")
    ('a', 'b', 'torchvision:resnet18')
    """
    path = PurePath(title)
    if path.suffix != ".safetensors":
        return title
    return path.parent.name if path.stem in ("best", "last") and path.parent.name else path.stem


def unique_short_names(titles: Sequence[str]) -> dict[str, str]:
    """``short_name`` of each title; where two are equal, the file name is added.

    >>> unique_short_names(["a/best.safetensors", "a/last.safetensors", "b/best.safetensors"])
    {'a/best.safetensors': 'a/best', 'a/last.safetensors': 'a/last', 'b/best.safetensors': 'b'}
    """
    short = {title: short_name(title) for title in titles}
    names = list(short.values())
    return {t: name if names.count(name) == 1 else f"{name}/{PurePath(t).stem}" for t, name in short.items()}
