"""Trainers of Ultralytics that put the conditional layers back into the network that Ultralytics builds anew."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn
from torch.optim import Optimizer
from ultralytics.models.yolo import classify, detect, obb, pose, segment
from ultralytics.utils import LOGGER

from condconv_surgery.errors import InputError, listed
from condconv_surgery.integrations.ultralytics.yolo_networks import conditional_network
from condconv_surgery.layers import ConditionalConv2d, conditional_layers, routed_blocks
from condconv_surgery.layers.find_layers import folded_layers, named_layers
from condconv_surgery.layers.routed_block import shared_router_of
from condconv_surgery.recipe import Upcycling
from condconv_surgery.surgery import route_block, upcycle


class _BuildsConditionalLayers:
    def get_model(self: Any, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """A network for the data, with the conditional layers and all fitting tensors of ``weights``.

        Raises ``InputError`` for weights without conditional layers, or with fused ones.
        """
        if weights is None or not conditional_layers(weights):
            raise InputError(
                "The weights to train from have no conditional layer.",
                "This trainer trains a converted network; a file of one is written by yolo.save(FILE).",
                "convert_yolo(YOLO(FILE), CondConv(experts=4)).train(...)",
            )
        if fused := folded_layers(weights):
            raise InputError(
                f"The network is fused: {listed(fused)} and others have no batch norm left.",
                "A fused network is for inference.",
                "load the file again, and train before fuse()",
            )
        built = super().get_model(cfg, None, verbose)  # type: ignore[misc]
        put_layers_of(weights, built)
        return conditional_network(built)

    def build_optimizer(self: Any, *args: Any, **kwargs: Any) -> Optimizer:
        """As Ultralytics does. A warning where its optimizer treats experts unlike the kernels that they replace."""
        optimizer: Optimizer = super().build_optimizer(*args, **kwargs)  # type: ignore[misc]
        if type(optimizer).__name__ == "MuSGD":
            LOGGER.warning(
                "MuSGD orthogonalises the updates of matrices and of 4-D kernels. Experts are 5-D [n, O, I, k, k] and "
                "get its SGD part alone. To train all weights by one rule: optimizer='SGD' or 'AdamW', and an lr0"
            )
        return optimizer


class ConditionalDetectionTrainer(_BuildsConditionalLayers, detect.DetectionTrainer):
    """A ``DetectionTrainer`` that keeps conditional layers."""


class ConditionalSegmentationTrainer(_BuildsConditionalLayers, segment.SegmentationTrainer):
    """A ``SegmentationTrainer`` that keeps conditional layers."""


class ConditionalPoseTrainer(_BuildsConditionalLayers, pose.PoseTrainer):
    """A ``PoseTrainer`` that keeps conditional layers."""


class ConditionalOBBTrainer(_BuildsConditionalLayers, obb.OBBTrainer):
    """An ``OBBTrainer`` that keeps conditional layers."""


class ConditionalClassificationTrainer(_BuildsConditionalLayers, classify.ClassificationTrainer):
    """A ``ClassificationTrainer`` that keeps conditional layers."""


TRAINERS = {
    "detect": ConditionalDetectionTrainer,
    "segment": ConditionalSegmentationTrainer,
    "pose": ConditionalPoseTrainer,
    "obb": ConditionalOBBTrainer,
    "classify": ConditionalClassificationTrainer,
}
"""The trainer of each task."""


def put_layers_of(network: nn.Module, built: nn.Module) -> None:
    """Conditional layers in the places that they have in ``network``, and its tensors where shapes are equal."""
    _keep_class_branches(network, built)
    for names, layer in named_layers(network, ConditionalConv2d):
        plain: Any = built.get_submodule(names[0])
        if not isinstance(plain, ConditionalConv2d):
            own = upcycle(plain, layer.variant, Upcycling(), names[0])  # its tensors remain where shapes differ
            for name in names:
                built.set_submodule(name, own)
    for name, block in routed_blocks(network).items():
        route_block(built, shared_router_of(name, block))
    state = built.state_dict()
    fitting = {
        name: tensor.to(state[name].dtype)
        for name, tensor in network.state_dict().items()
        if name in state and state[name].shape == tensor.shape
    }
    built.load_state_dict(fitting, strict=False)
    count = len(conditional_layers(built))
    LOGGER.info(f"Transferred {len(fitting)}/{len(state)} items, {count} conditional layers")


def _keep_class_branches(network: Any, built: Any) -> None:
    """For other classes: the trained hidden layers of the head's class branches, as ``BaseModel.load`` keeps them.

    Their width depends on the number of classes.
    """
    head, trained = built.model[-1], network.model[-1]
    for kind in ("cv3", "one2one_cv3"):
        own, theirs = getattr(head, kind, None), getattr(trained, kind, None)
        if own is None or theirs is None or own[0][-1].in_channels == theirs[0][-1].in_channels:
            continue
        for i, (branch, source) in enumerate(zip(own, theirs, strict=True)):
            last = nn.Conv2d(source[-1].in_channels, branch[-1].out_channels, 1)
            own[i] = nn.Sequential(*deepcopy(source)[:-1], last).float().train(branch.training).requires_grad_(True)
        head.bias_init()
