"""Networks of other packages: each is converted, trained for a step, saved, and computes the same elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

import condconv_surgery as cs
from tests.integrations.fresh_process import require_equal_elsewhere, train

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Case(NamedTuple):
    """example: for the conversion. loss: in train mode. layers: at least. serve: arguments in eval mode."""

    model: nn.Module
    example: Any
    loss: Callable[[nn.Module], Tensor]
    layers: int
    trust: tuple[str, ...] = ()
    serve: Any = None


def segmentation_models() -> Case:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(16, 8, 8, 8, 4), classes=2)
    return Case(model, IMAGES, lambda m: m(IMAGES).square().mean(), 29, ("segmentation_models_pytorch",))


def diffusers_unet() -> Case:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    example = {"sample": IMAGES[..., :16, :16].contiguous(), "timestep": torch.tensor([3, 5])}
    return Case(model, example, lambda m: m(**example).sample.square().mean(), 23, ("diffusers",))


def open_clip_tower() -> Case:
    resnet = pytest.importorskip("open_clip.modified_resnet")
    model = resnet.ModifiedResNet([1, 1, 1, 1], 32, 2, image_size=64, width=8)
    return Case(model, IMAGES, lambda m: m(IMAGES).square().mean(), 17, ("open_clip",))


def detector() -> Case:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    boxes = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    targets = [{name: value.clone() for name, value in boxes.items()} for _ in IMAGES]
    example = (list(IMAGES), targets)
    return Case(model, example, lambda m: sum(m(*example).values()), 70, serve=(list(IMAGES),))


@pytest.mark.parametrize("make", [segmentation_models, diffusers_unet, open_clip_tower, detector])
def test_a_network_is_converted_trained_saved_and_loaded_elsewhere(make: Callable[[], Case], tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = make()
    conversion = cs.convert(case.model, cs.CondConv(experts=2), example=case.example)
    assert len(conversion.plan.to_convert) >= case.layers
    difference = conversion.difference
    assert difference is not None
    assert difference.train is not None
    assert difference.train.relative < 1e-3
    train(conversion.model, case.loss)
    serve = case.example if case.serve is None else case.serve
    require_equal_elsewhere(conversion.model, serve, tmp_path, case.trust)
