"""torchvision's published weights: fetching them safely, knowing their files, and building the model that they fit.

With weights, some torchvision builders make another network than without: detectors get frozen batch norms (and another
epsilon), GoogLeNet and Inception transform their input. So a published file is given to its own builder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from condconv_surgery.models.build_model import build_torchvision
from condconv_surgery.recipe import InputSpec


def default_weights(name: str) -> WeightsEnum | None:
    """The weights that torchvision recommends for a model; ``None`` when it has published none."""
    return getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)


def published_weights(path: Path) -> tuple[str, WeightsEnum] | None:
    """The model's name and the weights, when ``path`` is a file as torchvision published it, by its name and hash.

    (The name of such a file ends in the first digits of its SHA-256: ``resnet18-f37072fd.pth``.)
    """
    for name in torchvision.models.list_models():
        for weights in torchvision.models.get_model_weights(name):
            if weights.url.rpartition("/")[2] == path.name and _hash_fits(path):
                return name, weights
    return None


def build_published(name: str, weights: WeightsEnum, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The model as torchvision builds it with ``weights``, in eval mode.

    state: what the weights' file holds; ``None`` fetches it, with its hash checked and nothing in it run.
    """
    with _weights_come_from((lambda _: state) if state is not None else fetch):
        return build_torchvision(name, {}, weights)


def fetch(weights: WeightsEnum) -> dict[str, Tensor]:
    """The weights from torchvision's server or from the cache. ``check_hash`` and ``weights_only`` always."""
    state = torch.hub.load_state_dict_from_url(weights.url, progress=False, check_hash=True, weights_only=True)
    return cast("dict[str, Tensor]", state)


def input_of(weights: WeightsEnum | None) -> InputSpec:
    """The pictures that the weights were trained to see; segmentation and detection resize without cropping."""
    preset: Any = None if weights is None else weights.transforms()
    crop = getattr(preset, "crop_size", None)
    if not crop:
        return InputSpec()
    resize = (getattr(preset, "resize_size", None) or crop)[0]
    return InputSpec(
        height=crop[0],
        width=crop[-1],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        crop_fraction=min(crop[0] / resize, 1.0),
    )


def _hash_fits(path: Path) -> bool:
    digits = path.stem.rpartition("-")[2]
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return len(digits) >= 8 and sha.hexdigest().startswith(digits)


@contextmanager
def _weights_come_from(source: Callable[[WeightsEnum], Any]) -> Iterator[None]:
    """torchvision's builders fetch with ``weights_only=False``; here they get what ``source`` gives instead."""
    own = WeightsEnum.get_state_dict
    WeightsEnum.get_state_dict = lambda self, *_, **__: source(self)
    try:
        yield
    finally:
        WeightsEnum.get_state_dict = own
