"""``torchvision:NAME``: its models, its published weights fetched safely, and the files that hold these.

With weights, some torchvision builders make another network than without: detectors get frozen batch norms (and another
epsilon), GoogLeNet and Inception transform their input. So a published file is given to its own builder; for any other
file ``as_trained`` makes the same changes.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops.misc import FrozenBatchNorm2d

from condconv_surgery.errors import unknown_name
from condconv_surgery.models.source_registry import named_source
from condconv_surgery.recipe import InputSpec, Source

TRANSFORMING = ("googlenet", "inception_v3")
"""Networks that transform their input when they are built with weights."""

_LOG = logging.getLogger("condconv_surgery")


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
    model = _build(Source(f"torchvision:{name}"), _WithState(weights, state))
    model.eval()
    return model


def as_trained(model: nn.Module, source: Source, weights: Mapping[str, Tensor], what: str) -> None:
    """Change ``model`` to the form in which torchvision trains with its published weights, in place.

    A detector whose file has no counters of batch norms gets frozen ones. That GoogLeNet or Inception transform their
    input no file says: it is taken to be so, as in every network that began with published weights, and logged.
    """
    name = source.name.partition(":")[2]
    if name in TRANSFORMING:
        setattr(model, "transform_input", True)  # noqa: B010 - no tensor, as the type checker thinks
        _LOG.warning(
            "%s: taken to transform its input, as torchvision's %s does with published weights; for one trained from "
            "scratch name a function of yours that builds it (package.module:function)",
            what,
            name,
        )
    counted = any(key.endswith("num_batches_tracked") for key in weights)
    if isinstance(model, GeneralizedRCNN | RetinaNet | FCOS) and not counted:
        _freeze_norms(model, name)


def _freeze_norms(model: nn.Module, name: str) -> None:
    """Replace the batch norms that are frozen in the detector of that name with published weights."""
    state = {k: v for k, v in _build(Source(f"torchvision:{name}")).state_dict().items() if "num_batches" not in k}
    weights = default_weights(name)
    published = nn.Module() if weights is None else build_published(name, weights, state)
    for key, norm in published.named_modules():
        if isinstance(norm, FrozenBatchNorm2d):
            model.set_submodule(key, FrozenBatchNorm2d(len(norm.weight), norm.eps))


def fetch(weights: WeightsEnum) -> dict[str, Tensor]:
    """The weights from torchvision's server or from the cache. ``check_hash`` and ``weights_only`` always."""
    state = torch.hub.load_state_dict_from_url(weights.url, progress=False, check_hash=True, weights_only=True)
    return cast("dict[str, Tensor]", state)


def license_of(weights: WeightsEnum | None) -> str:
    """That of torchvision; the weights of SWAG, which come from another project, have their own."""
    if weights is None:
        return ""
    return "cc-by-nc-4.0" if "SWAG" in weights.name else "bsd-3-clause"


def input_of(weights: WeightsEnum | None) -> InputSpec:
    """The images that the weights were trained on; segmentation and detection resize without cropping."""
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


class _WithState:
    """Published weights for one call of a builder, which reads them with ``weights_only=False``: here it gets a given
    state dict instead, or ``fetch``'s. In all else, ``isinstance`` and ``==`` too, it is the member of the enum."""

    def __init__(self, weights: WeightsEnum, state: dict[str, Tensor] | None) -> None:
        self._weights = weights
        self._state = state

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return fetch(self._weights) if self._state is None else self._state

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def __eq__(self, other: object) -> bool:
        return self._weights is other

    def __hash__(self) -> int:
        return hash(self._weights)


def _build(source: Source, weights: _WithState | None = None) -> nn.Module:
    """Without weights the backbone's are not fetched either."""
    name = source.name.partition(":")[2]
    if name not in torchvision.models.list_models():
        raise unknown_name("torchvision model", name, torchvision.models.list_models(), "torchvision:resnet18")
    builder = torchvision.models.get_model_builder(name)
    fixed: dict[str, Any] = {"weights": weights}
    if "weights_backbone" in inspect.signature(builder).parameters:
        fixed["weights_backbone"] = None  # the default downloads
    if name in TRANSFORMING and weights is None:
        fixed["init_weights"] = False  # truncated normals take seconds, and are filled at once
    model: nn.Module = builder(**{**source.options, **fixed})
    return model


def _pretrained(name: str) -> nn.Module | None:
    if name not in torchvision.models.list_models():
        return None
    weights = default_weights(name)
    return None if weights is None else build_published(name, weights)


def _license(source: Source, model: nn.Module, published: bool) -> str:
    return license_of(default_weights(source.name.partition(":")[2])) if published else ""


TORCHVISION = named_source(
    "torchvision",
    _build,
    pretrained=_pretrained,
    input_spec=lambda model, source: input_of(default_weights(source.name.partition(":")[2])),
    as_trained=as_trained,
    license=_license,
)
