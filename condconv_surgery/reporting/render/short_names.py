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
    """``short_name`` of each title; where two are equal, the file name is added, and where they still are, the title.

    >>> unique_short_names(["a/best.safetensors", "a/last.safetensors", "b/best.safetensors"])
    {'a/best.safetensors': 'a/best', 'a/last.safetensors': 'a/last', 'b/best.safetensors': 'b'}
    >>> unique_short_names(["x/a/best.safetensors", "y/a/best.safetensors"])["x/a/best.safetensors"]
    'x/a/best.safetensors'
    >>> unique_short_names(["a", "a/last.safetensors"])
    {'a': 'a', 'a/last.safetensors': 'a/last'}
    """
    names = {title: short_name(title) for title in titles}
    for longer in (_with_file, lambda title: title):
        found = list(names.values())
        names = {title: name if found.count(name) == 1 else longer(title) for title, name in names.items()}
    return names


def _with_file(title: str) -> str:
    path = PurePath(title)
    return f"{short_name(title)}/{path.stem}" if path.suffix == ".safetensors" else title
