"""What a model of another library says of itself: its images, the order of its classes, its class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.models.image_processor import input_of_processor
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec, recipe_of
from condconv_surgery.runtime.modes import input_spec_of
from tests.integrations.trained_yolo import description_of


def photo(side: int = 320) -> Image.Image:
    """A smooth image: interpolations of two libraries differ at edges."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((values.permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def write_images(folder: Path, shades: dict[str, int]) -> Path:
    """Four images of each class, of the shade given."""
    for name, shade in shades.items():
        for part in ("train", "val"):
            (folder / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (shade + number,) * 3).save(folder / part / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ConvNext", {"size": {"shortest_edge": 224}}),
        ("Levit", {}),
        ("PoolFormer", {}),
        ("EfficientNet", {}),
        ("EfficientNet", {"include_top": False, "rescale_factor": 1 / 127.5, "rescale_offset": True}),
        ("MobileViT", {"size": {"shortest_edge": 288}}),
        ("MobileNetV2", {}),
        ("Beit", {"do_normalize": False}),
        ("ViT", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}),
    ],
)
def test_images_are_those_of_the_processor(
    kind: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{kind}ImageProcessor")(**options)
    processor.save_pretrained(tmp_path)
    expected = processor(photo(), return_tensors="pt")["pixel_values"][0]
    actual = EvaluationTransform(input_of_processor(f"{tmp_path}", InputSpec()))(photo())
    if kind == "MobileViT":
        assert "BGR" in caplog.text
        expected = expected.flip(0)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 0.02 * expected.abs().max()


def test_the_classes_of_transformers_are_in_the_order_of_its_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", id2label={0: "white", 1: "black"}
    )
    plain = transformers.ResNetForImageClassification(config).eval()
    data = write_images(tmp_path / "data", {"black": 5, "white": 245})
    head = plain.classifier[-1]
    with torch.no_grad():  # the first logit is that of white images
        images = [torch.full((1, 3, 224, 224), value) for value in (-2.0, 2.0)]
        dark, light = (plain.resnet(x).pooler_output.flatten() for x in images)
        head.weight.copy_(torch.stack((light - dark, dark - light)))
        head.bias.copy_(-head.weight @ (dark + light) / 2)
    plain.save_pretrained(tmp_path / "folder")
    loaded = cs.load_model(tmp_path / "folder")
    assert recipe_of(loaded).classes == ("white", "black")  # type: ignore[union-attr]
    converted = cs.convert(plain, cs.CondConv(experts=2), example={"pixel_values": torch.randn(2, 3, 64, 64)}).model
    cs.save(converted, tmp_path / "converted.safetensors")
    for model in (plain, loaded, converted, cs.load(tmp_path / "converted.safetensors")):
        assert input_spec_of(model) == InputSpec()
        assert cs.predict(model, data).accuracy == 1.0


def test_a_classifier_of_ultralytics_keeps_its_images_and_classes(tmp_path: Path) -> None:
    pytest.importorskip("ultralytics")
    from ultralytics import YOLO
    from ultralytics.data.augment import classify_transforms

    yolo = YOLO(description_of("yolo11n-cls", tmp_path / "yolo11n-cls.yaml"), task="classify")
    yolo.model.args = {**yolo.model.args, "imgsz": 96}
    yolo.model.names = {0: "white", 1: "black"}
    yolo.save(tmp_path / "best.pt")
    model = cs.load_model(tmp_path / "best.pt", trust=["ultralytics"])
    assert recipe_of(model).classes == ("white", "black")  # type: ignore[union-attr]
    actual = EvaluationTransform(input_spec_of(model))(photo())
    torch.testing.assert_close(actual, classify_transforms(96)(photo()), atol=1 / 255, rtol=0)


def test_a_network_of_ultralytics_that_is_not_supported_is_named_before_its_conversion() -> None:
    pytest.importorskip("ultralytics")
    from ultralytics import RTDETR

    from condconv_surgery.integrations.ultralytics import convert_yolo

    yolo = RTDETR("rtdetr-resnet50.yaml")
    with pytest.raises(InputError, match=r"RTDETRDetectionModel[\s\S]*DetectionModel[\s\S]*convert\(yolo\.model"):
        convert_yolo(yolo, cs.CondConv(experts=4))


def test_images_of_a_timm_model_in_memory_are_in_its_own_normalisation() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("inception_v4")
    config = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**config)(photo())
    torch.testing.assert_close(EvaluationTransform(input_spec_of(model))(photo()), expected, atol=1e-5, rtol=0)
