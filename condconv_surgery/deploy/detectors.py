"""torchvision's detectors in a graph: for one image of one size, as torchvision documents for ONNX.

How many boxes there are depends on the image, so a file is compared in two parts: the maps before the choice of boxes,
as any output, and the detections as sets, since ties between boxes fall either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from condconv_surgery.errors import InputError
from condconv_surgery.surgery.proof.output_tensors import output_tensors

CLOSE = 1e-3
"""Up to this a box (of the longer side of all), a score or a mask (on average) is that of the model."""

MAX_LOST = 0.05
"""Share of detections that ties may exchange."""


def is_detector(model: nn.Module) -> bool:
    """Whether ``model`` is one of torchvision's detectors. Raises ``InputError`` where it only holds one."""
    found = [name for name, module in model.named_modules() if isinstance(module, GeneralizedRCNNTransform)]
    if not found:
        return False
    owner = found[0].rpartition(".")[0]
    if owner:
        raise InputError(
            f"The model holds a detector of torchvision as {owner!r}.",
            "A detector is exported by itself.",
            f'cs.export(model.get_submodule("{owner}"), ...)',
        )
    return True


class DetectorGraph(nn.Module):
    """What is traced: images [1, C, H, W] -> the tensors of the detections, then the maps before any choice of boxes.

    detector: of torchvision, in eval mode. names: of its detections' tensors, once it was called.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.names: tuple[str, ...] = ()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        hook = partial(_collect, maps)
        handles = [part.register_forward_hook(hook) for part in self._parts()]
        try:
            (found,) = self.detector(images)
        finally:
            for handle in handles:
                handle.remove()
        self.names = tuple(found)
        return (*found.values(), *maps)

    def _parts(self) -> list[nn.Module]:
        """The modules that compute maps: the backbone, and the head over it or that of the region proposals."""
        rpn: Any = getattr(self.detector, "rpn", None)
        parts = [getattr(self.detector, "backbone", None), getattr(rpn or self.detector, "head", None)]
        return [part for part in parts if isinstance(part, nn.Module)]


def _collect(maps: list[Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook: append the tensors of ``output`` to ``maps``."""
    maps.extend(output_tensors(output))


def lost_share(names: Sequence[str], expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The share of the detections of either that the other lacks. names: of the tensors, one row for each detection."""
    a, b = dict(zip(names, expected, strict=True)), dict(zip(names, actual, strict=True))
    if not len(a["boxes"]) or not len(b["boxes"]):
        return float(len(a["boxes"]) != len(b["boxes"]))
    return max(_lost(a, b), _lost(b, a))


def _lost(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    gaps = (wanted["boxes"][:, None] - found["boxes"]).abs().amax(2) / wanted["boxes"].abs().max()  # [N, M]
    gaps = torch.maximum(gaps, (wanted["scores"][:, None] - found["scores"]).abs())
    gaps = gaps.masked_fill(wanted["labels"][:, None] != found["labels"], float("inf"))
    smallest, nearest = gaps.min(1)
    for name in set(wanted) - {"boxes", "scores", "labels"}:  # masks, keypoints
        difference = (wanted[name] - found[name][nearest]).abs().flatten(1).mean(1)
        smallest = torch.maximum(smallest, difference / wanted[name].abs().max().clamp(min=1.0))
    return float((~(smallest <= CLOSE)).float().mean())  # NaN is lost
