"""The input of a model from the ``preprocessor_config.json`` that transformers writes beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from condconv_surgery.models.image_processor import input_of_processor
from condconv_surgery.recipe import InputSpec
from condconv_surgery.runtime.modes import input_spec_of

MODEL = InputSpec(channels=3, height=96, width=96)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (  # ViT: stretched to a square
            {"size": {"height": 224, "width": 224}, "image_mean": MEAN, "image_std": STD, "resample": 3},
            InputSpec(3, 224, 224, MEAN, STD, "bicubic", 1.0),
        ),
        (  # MobileNet: the shorter side, then the centre
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
            InputSpec(3, 224, 224, (0.5,) * 3, (0.5,) * 3, "bilinear", 224 / 256),
        ),
        (  # ConvNeXt below 384
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "image_mean": MEAN, "image_std": STD, "resample": 3},
            InputSpec(3, 224, 224, MEAN, STD, "bicubic", 0.875),
        ),
        (  # ConvNeXt from 384 on
            {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "image_mean": MEAN, "image_std": STD, "resample": 3},
            InputSpec(3, 384, 384, MEAN, STD, "bicubic", 1.0),
        ),
        (  # an old file: one number, and no normalisation
            {"size": 64, "do_normalize": False, "resample": 0},
            InputSpec(3, 64, 64, (0.0,) * 3, (1.0,) * 3, "nearest", 1.0),
        ),
        (  # PoolFormer: resized to 1 / crop_pct, then the centre
            {"size": 252, "crop_pct": 0.9, "crop_size": 224, "do_center_crop": True},
            InputSpec(3, 224, 224, (0.5,) * 3, (0.5,) * 3, "bilinear", 224 / 280),
        ),
        (  # EfficientNet: divided by std twice
            {"size": 64, "image_mean": MEAN, "image_std": STD, "include_top": True},
            InputSpec(3, 64, 64, MEAN, tuple(value**2 for value in STD), "bilinear", 1.0),
        ),
        ({"image_mean": MEAN, "image_std": STD}, InputSpec(3, 96, 96, MEAN, STD, "bilinear", 0.875)),
    ],
)
def test_sizes_crop_and_normalisation_are_read(values: dict[str, Any], expected: InputSpec, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert input_of_processor(f"{tmp_path}", MODEL) == expected


def test_without_a_processor_the_input_is_the_models(tmp_path: Path) -> None:
    assert input_of_processor(f"{tmp_path}", MODEL) == MODEL
    (tmp_path / "preprocessor_config.json").write_text("[")
    assert input_of_processor(f"{tmp_path}", MODEL) == MODEL


@pytest.mark.parametrize(("size", "expected"), [(64, (64, 64)), ([32, 48], (32, 48)), (None, (224, 224))])
def test_the_size_in_a_models_configuration_is_its_input(size: object, expected: tuple[int, int]) -> None:
    class Net(nn.Sequential):
        class config:  # noqa: N801 - as transformers names it
            image_size = size

    spec = input_spec_of(Net(nn.Conv2d(1, 2, 3)))
    assert (spec.channels, spec.height, spec.width) == (1, *expected)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("tf_efficientnetv2_b0", 3), ("mobilenetv3_small_050", 3), ("resnet10t", 1), ("tresnet_m", 3)],
)
def test_the_input_in_timms_configuration_is_the_models(name: str, channels: int) -> None:
    """Also of a model that ``timm.create_model`` has built: its mean and std may be others than ImageNet's.

    TResNet's stem has 48 channels, made of 4x4 pixels.
    """
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, in_chans=channels)
    spec, own = input_spec_of(model), timm.data.resolve_model_data_config(model)
    average = [sum(own[key]) / 3 for key in ("mean", "std")]
    wanted = (own["mean"], own["std"]) if channels == 3 else tuple((value,) for value in average)
    assert (spec.channels, spec.height, spec.width) == (channels, *own["input_size"][1:])
    assert (spec.mean, spec.std) == wanted
    assert (spec.interpolation, spec.crop_fraction) == (own["interpolation"], own["crop_pct"])
