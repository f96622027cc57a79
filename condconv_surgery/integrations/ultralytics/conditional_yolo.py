"""``ConditionalYOLO`` and ``convert_yolo``: Ultralytics' own interface over a converted network."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.nn.tasks import guess_model_task
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from condconv_surgery.deploy.mean_mixtures import mixture_of_zeros
from condconv_surgery.integrations.ultralytics.yolo_networks import MERGED, conditional_network, require_supported
from condconv_surgery.integrations.ultralytics.yolo_trainers import TRAINERS
from condconv_surgery.layers import conditional_layers, routers
from condconv_surgery.layers.find_layers import routed_layers
from condconv_surgery.models.artifact.save_load import load
from condconv_surgery.ops.implementations import why_not
from condconv_surgery.recipe import LayerFilter, Variant
from condconv_surgery.surgery import convert


class ConditionalYOLO(YOLO):
    """A ``YOLO`` with conditional layers: ``train``, ``val``, ``predict``, ``fuse`` and ``export`` as ever.

    model: a checkpoint of such a network (``best.pt``), an artifact (``condconv convert``), or a ``YOLO``.

    Raises ``InputError`` for a model without conditional layers, or for a network that is not in ``NETWORKS``.
    """

    model: Any

    def __init__(self, model: Any, task: str | None = None, verbose: bool = False) -> None:
        super().__init__(copy(model) if isinstance(model, YOLO) else model, task, verbose)
        self.model = conditional_network(self.model)

    def _load(self, weights: str, task: str | None = None) -> None:
        if not weights.endswith(".safetensors"):
            super()._load(weights, task)
            return
        network: Any = load(weights, trust="ultralytics").float()
        network.args = {**DEFAULT_CFG_DICT, **dict(getattr(network, "args", {}))}  # as load_checkpoint does
        network.task = self.task = getattr(network, "task", None) or guess_model_task(network)
        network.pt_path = self.ckpt_path = self.model_name = weights
        self.model, self.ckpt = network, {"model": network}  # train() builds on a network that has a checkpoint
        self.overrides = {**self._reset_ckpt_args(network.args), "model": weights, "task": self.task}

    @property
    def task_map(self) -> dict[str, dict[str, Any]]:
        """As in ``YOLO``, with the trainers that keep conditional layers."""
        return {
            task: {**parts, "trainer": TRAINERS.get(task, parts["trainer"])} for task, parts in super().task_map.items()
        }

    def export(self, **kwargs: Any) -> Any:
        """As in ``YOLO``; convolutions larger than 1x1 are gated sums of static ones where the variant allows that.

        Ultralytics traces with ``torch.jit``, for which a layer by itself would unfold its input; runtimes are faster
        at static convolutions.
        """
        layers = [layer for layer in conditional_layers(self.model).values() if layer.kernel_size != (1, 1)]
        before = [layer.implementation for layer in layers]
        mixtures = {name: mixture_of_zeros(router) for name, router in routers(self.model).items()}
        for name, routed in routed_layers(self.model).items():
            for layer in routed:
                if layer in layers and why_not("mix-outputs", 2, mixtures[name], layer.geometry) is None:
                    layer.implementation = "mix-outputs"
        try:
            return super().export(**kwargs)
        finally:
            for layer, implementation in zip(layers, before, strict=True):
                layer.implementation = implementation


def convert_yolo(
    yolo: YOLO,
    variant: Variant,
    *,
    example: Tensor | None = None,
    include: str | LayerFilter | Sequence[str | LayerFilter] | None = None,
    exclude: Sequence[str | LayerFilter] = (),
    calibration: Tensor | None = None,
) -> ConditionalYOLO:
    """A ``YOLO`` whose network is that of ``yolo`` with conditional layers, and computes the same.

    The other options are those of ``convert``, whose result ``with_network(yolo, conversion.model)`` takes.
    Blocks whose branches are merged by ``fuse()`` (``MERGED``) stay plain.

    example: images [B, 3, H, W] with values in [0, 1], sides divisible by 32; by default two random ones of 224 pixels.
    include, exclude, calibration: see ``convert``.

    Raises as ``convert``, and ``InputError`` for a network that is not in ``NETWORKS``.
    """
    require_supported(yolo.model)
    merged = [f"{name}.*" for name, block in yolo.model.named_modules() if isinstance(block, MERGED)]
    images = torch.rand(2, yolo.model.yaml.get("channels", 3), 224, 224) if example is None else example
    conversion = convert(
        yolo.model.float(),
        variant,
        example=images,
        include=include,
        exclude=[*exclude, *merged],
        calibration=calibration,
    )
    LOGGER.info(f"{len(conversion.plan.to_convert)} layers converted, {len(conversion.plan.skipped)} skipped")
    return with_network(yolo, conversion.model)


def with_network(yolo: YOLO, network: nn.Module) -> ConditionalYOLO:
    """A ``YOLO`` like ``yolo`` with a converted network in place of its own."""
    own = copy(yolo)
    own.__dict__ = {**vars(yolo), "_modules": {**yolo._modules, "model": network}, "predictor": None}
    own.ckpt = {**(yolo.ckpt or {}), "ema": None, "model": network}
    return ConditionalYOLO(own)
