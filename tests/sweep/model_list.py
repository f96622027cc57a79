"""Which models are swept, how each is built, and what it is fed: inputs as small as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from condconv_surgery.models.artifact.meta_init import build_on_meta
from condconv_surgery.models.build_model import build
from condconv_surgery.models.condconv_source import WIDTHS
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import Recipe, Source, attach_recipe

SIDE = 96
"""Side of an image in pixels, for models that take any size: five halvings leave 3x3 positions for a batch norm."""

SMALL_IMAGES = {"min_size": SIDE, "max_size": SIDE}
"""torchvision's R-CNNs, RetinaNet and FCOS would enlarge every image to 800 pixels."""

FEW_CLASSES = {"num_classes": 5}
"""With 91 classes a detector of random weights is sure of nothing, and its boxes are ties that rounding decides."""

FEW_BOXES = {"box_detections_per_img": 10, "box_batch_size_per_image": 64}
"""The R-CNNs run their mask and keypoint heads on each box: 100 of them take ten minutes."""

ALL_BOXES = {"score_thresh": 0.0}
"""RetinaNet and FCOS start with every score at 0.01, under their threshold."""


@dataclass(frozen=True)
class Case:
    """One model. source: ``LIBRARY:NAME``; options: of its factory; kind: what it is for."""

    source: str
    kind: str = "classification"
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model with random weights, carrying its recipe."""
        if self.source.startswith("timm:"):
            return load_model(self.source, weights="none")
        source = Source(self.source, self.options)
        model = build(source)
        attach_recipe(model, Recipe(source=source))
        return model


def torchvision_cases() -> list[Case]:
    """All of torchvision's models that compute in floating point; see ``torchvision_left_aside``."""
    return [_torchvision_case(name) for name in torchvision.models.list_models(exclude="quantized_*")]


def torchvision_left_aside() -> list[str]:
    """The int8 models: their convolutions are ``torch.ao.nn.quantized`` modules, which hold no weight to train."""
    return torchvision.models.list_models(include="quantized_*")


def timm_cases() -> list[Case]:
    """The model with the fewest parameters of each of timm's families (a file of ``timm.models``). Takes minutes."""
    import timm

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.model_entrypoint(name).__module__, []).append(name)
    return [Case(f"timm:{_smallest(names)}", family.rpartition(".")[2]) for family, names in sorted(families.items())]


def condconv_cases() -> list[Case]:
    """The networks that this package defines."""
    return [Case(f"condconv:{name}") for name in WIDTHS]


def inputs_of(case: Case, model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """The arguments to try, the smallest first: some models take images of one size only."""
    generator = torch.Generator().manual_seed(0)

    def images(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if case.kind == "detection":
        side = int(model.transform.min_size[0])  # type: ignore[union-attr,index,arg-type]
        yield [images(3, side, side) for _ in range(2)], [_target(side) for _ in range(2)]
    elif case.kind == "optical_flow":
        yield images(1, 3, 128, 128), images(1, 3, 128, 128)  # its encoder divides by 8, its pyramid by 8 again
    elif case.kind == "video":
        yield (images(1, 3, 16, 112, 112),)
    elif case.source.startswith("timm:"):
        channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index,misc]
        yield (images(2, int(channels), int(height), int(width)),)
    else:
        yield (images(2, 3, SIDE, SIDE),)
        yield (images(2, 3, 224, 224),)
        yield (images(2, 3, 299, 299),)  # the auxiliary head of Inception v3
        for side in (384, 512, 518):
            yield (images(2, 3, side, side),)


def _torchvision_case(name: str) -> Case:
    home = torchvision.models.get_model_builder(name).__module__.split(".")
    kind = home[2] if home[2] in ("detection", "segmentation", "video", "optical_flow") else "classification"
    options: dict[str, Any] = {}
    if kind == "detection":
        options = dict(FEW_CLASSES)
        options |= {} if name.startswith("ssd") else SMALL_IMAGES  # SSDs have one size
        options |= FEW_BOXES if "rcnn" in name else {}
        options |= ALL_BOXES if name.startswith(("retinanet", "fcos")) else {}
    return Case(f"torchvision:{name}", kind, options)


def _target(side: int) -> dict[str, Tensor]:
    """Two boxes with what any of the detectors asks for."""
    masks = torch.zeros(2, side, side, dtype=torch.uint8)
    masks[0, 4:60, 4:50] = 1
    masks[1, 20:90, 30:90] = 1
    return {
        "boxes": torch.tensor([[4.0, 4.0, 50.0, 60.0], [30.0, 20.0, 90.0, 90.0]]),
        "labels": torch.tensor([1, 1]),
        "masks": masks,
        "keypoints": torch.tensor([[[10.0, 10.0, 1.0]] * 17, [[40.0, 40.0, 1.0]] * 17]),
    }


def _smallest(names: list[str]) -> str:
    """By the number of parameters; a model that cannot be built without its weights' server is passed over."""

    def size(name: str) -> float:
        try:
            return float(sum(p.numel() for p in build_on_meta(Source(f"timm:{name}")).parameters()))
        except Exception:
            return float("inf")

    return min(names, key=size)
