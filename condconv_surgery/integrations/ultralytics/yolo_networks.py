"""The networks of Ultralytics with conditional layers: batch norms fold into experts, and no copy loses the layers.

A checkpoint (``best.pt``) names these classes, so ``YOLO("best.pt")`` validates, predicts and exports it where this
package is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from ultralytics.nn.modules import Conv, RepConv
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import Conv2
from ultralytics.nn.tasks import (
    BaseModel,
    ClassificationModel,
    DetectionModel,
    OBBModel,
    PoseModel,
    SegmentationModel,
)
from ultralytics.utils import LOGGER

from condconv_surgery.deploy.fold_batch_norm import fold_norm
from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, conditional_layers

MERGED = (Conv2, RepConv, RepVGGDW)
"""Blocks whose branches Ultralytics adds up to one kernel when it fuses: their layers stay plain."""

HALF_LIMIT = torch.finfo(torch.float16).max


class _KeepsConditionalLayers:
    """What a network of Ultralytics lacks: fusing of conditional layers, and an error before a copy would lose them."""

    def fuse(self: Any, verbose: bool = True, imgsz: int | list[int] = 640) -> Any:
        """As in Ultralytics; the batch norm behind a conditional layer goes into its experts and one bias, exactly."""
        for block in self.modules():
            if isinstance(block, Conv) and isinstance(block.conv, ConditionalConv2d):
                if isinstance(block.bn, nn.BatchNorm2d):
                    fold_norm(block.conv, block.bn)
                block.bn = nn.Identity()
                block.conv.requires_grad_(False)
        with _without_identities(self):
            super().fuse(verbose, imgsz)  # type: ignore[misc]
        return self

    def is_fused(self: Any) -> bool:
        """As in Ultralytics."""
        with _without_identities(self):
            return bool(super().is_fused())  # type: ignore[misc]

    def half(self: Any) -> Any:
        """As in ``nn.Module``, with a warning where a checkpoint in half precision would give infinite weights."""
        floats = {name: tensor for name, tensor in self.state_dict().items() if tensor.is_floating_point()}
        large = [name for name, tensor in floats.items() if (tensor.abs() > HALF_LIMIT).any()]
        if large:
            LOGGER.warning(
                f"{len(large)} tensors are too large for float16 and become infinite in a checkpoint, as {large[0]}: "
                "an untrained network gives routers such weights. Keep the network by "
                "condconv_surgery.save(yolo.model, FILE.safetensors)"
            )
        return super().half()  # type: ignore[misc]

    def float(self: Any) -> Any:
        """As in ``nn.Module``. Raises ``InputError`` where a plain network is about to copy what fits."""
        caller = sys._getframe(1)
        if caller.f_code is BaseModel.load.__code__ and not conditional_layers(caller.f_locals["self"]):
            raise InputError(
                "Ultralytics is about to train a plain network from the weights of a converted one.",
                f"Its {len(conditional_layers(self))} conditional layers would be random plain ones.",
                "condconv_surgery.integrations.ultralytics.ConditionalYOLO(FILE).train(...), or trainer= of there",
            )
        return super().float()  # type: ignore[misc]


class ConditionalDetectionModel(_KeepsConditionalLayers, DetectionModel):
    """A ``DetectionModel`` with conditional layers."""


class ConditionalSegmentationModel(_KeepsConditionalLayers, SegmentationModel):
    """A ``SegmentationModel`` with conditional layers."""


class ConditionalPoseModel(_KeepsConditionalLayers, PoseModel):
    """A ``PoseModel`` with conditional layers."""


class ConditionalOBBModel(_KeepsConditionalLayers, OBBModel):
    """An ``OBBModel`` with conditional layers."""


class ConditionalClassificationModel(_KeepsConditionalLayers, ClassificationModel):
    """A ``ClassificationModel`` with conditional layers."""


NETWORKS: dict[type[nn.Module], Any] = {
    DetectionModel: ConditionalDetectionModel,
    SegmentationModel: ConditionalSegmentationModel,
    PoseModel: ConditionalPoseModel,
    OBBModel: ConditionalOBBModel,
    ClassificationModel: ConditionalClassificationModel,
}
"""The class here of each network of Ultralytics."""


def conditional_network(network: nn.Module) -> nn.Module:
    """``network`` itself, of the class here that belongs to its own.

    Raises ``InputError`` for a network without conditional layers, with some in a block of ``MERGED``, or of another
    class than those of ``NETWORKS``.
    """
    if type(network) in NETWORKS.values():
        return network
    require_supported(network)
    if not conditional_layers(network):
        raise InputError(
            f"A {type(network).__name__} with 0 conditional layers.",
            "A converted network is needed.",
            "convert_yolo(yolo, CondConv(experts=4))",
        )
    for name, block in network.named_modules():
        if isinstance(block, MERGED) and conditional_layers(block):
            raise InputError(
                f"{name} has conditional layers, and Ultralytics adds its branches up to one kernel when it fuses.",
                "The layers of such blocks stay plain.",
                f'exclude=["{name}.*"]',
            )
    network.__class__ = NETWORKS[type(network)]
    return network


def require_supported(network: nn.Module) -> None:
    """Raise ``InputError`` for a network of another class than those of ``NETWORKS``."""
    if type(network) not in (*NETWORKS, *NETWORKS.values()):
        raise InputError(
            f"A {type(network).__name__}, whose training and fusing are not supported here.",
            f"A {', '.join(cls.__name__ for cls in NETWORKS)} is.",
            "condconv_surgery.convert(yolo.model, CondConv(experts=4), example=images), without Ultralytics' trainer",
        )


@contextmanager
def _without_identities(network: nn.Module) -> Iterator[None]:
    """Inside the block, convolutions have no ``bn`` where folding left an identity, so they count as fused."""
    convolutions = (block for block in network.modules() if isinstance(block, Conv))
    blocks = [block for block in convolutions if type(getattr(block, "bn", None)) is nn.Identity]
    identities = [block._modules.pop("bn") for block in blocks]
    try:
        yield
    finally:
        for block, identity in zip(blocks, identities, strict=True):
            block.bn = identity
