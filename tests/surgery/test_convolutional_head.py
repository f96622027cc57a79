"""A convolution that gives the logits is the classifier: converted only when asked for, and replaced by fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d
from tests.conftest import Run
from tests.images import write_images

X = torch.randn(2, 3, 64, 64)


def squeezenet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1().eval()


def test_the_head_is_skipped_with_its_reason() -> None:
    plan = cs.convert(squeezenet(), cs.CondConv(2), example=X, include=["classifier.*", "features.12.*"]).plan
    (skip,) = [skip for skip in plan.skipped if skip.name == "classifier.1"]
    assert skip.reason == "the classifier: it gives the logits (classifier=True converts it)"


def test_classifier_converts_the_head_and_nothing_else_calls_it_one() -> None:
    include = ["classifier.1", "features.12.*"]
    converted = cs.convert(squeezenet(), cs.CondConv(2), example=X, include=include, classifier=True).model
    assert isinstance(converted.get_submodule("classifier.1"), ConditionalConv2d)
    with pytest.raises(InputError, match=r"classifier=True asks for classifier\.1, but include= does not match"):
        cs.convert(squeezenet(), cs.CondConv(2), example=X, include="features.12.*", classifier=True)


@pytest.mark.parametrize(
    "last",
    [nn.Conv2d(8, 16, 3), nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))],
    ids=["3x3", "norm"],
)
def test_the_last_convolution_of_a_feature_extractor_is_no_head(last: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), last, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plan = cs.convert(model, cs.CondConv(2), example=X).plan
    assert [site.name for site in plan.to_convert] == ["2" if isinstance(last, nn.Conv2d) else "2.0"]


@pytest.mark.parametrize("classifier", [False, True])
def test_what_convert_proposes_next_works(condconv: Run, tmp_path: Path, classifier: bool) -> None:
    """Also with a converted head, which is replaced by a conditional one of the new width."""
    data, out = write_images(tmp_path / "data", each=6), tmp_path / "my model.safetensors"
    source = ("torchvision:squeezenet1_1", "--weights", "none", "--input-size", 64, "--include", "features.12*")
    asked = ("--classifier", "--include", "classifier.1") if classifier else ()
    code, _, err = condconv("convert", *source, *asked, "-o", out)
    assert code == 0, err
    assert f"Next        condconv finetune '{out}' --data FOLDER -o RUN\n" in err
    quick = ("--batch-size", 8, "--workers", 0, "--epochs", 1)
    code, _, err = condconv("finetune", out, "--data", data, "-o", tmp_path / "run", *quick)
    assert code == 0, err
    head = cs.load(tmp_path / "run/best.safetensors").get_submodule("classifier.1")
    assert isinstance(head, ConditionalConv2d) == classifier
    assert (head.geometry if classifier else head).out_channels == 3  # type: ignore[union-attr]


def test_a_model_that_finetune_cannot_train_has_another_next(condconv: Run, tmp_path: Path) -> None:
    """A network that returns feature maps, as a detector's or a segmenter's parts do."""
    (tmp_path / "maps.py").write_text(
        "import torch.nn as nn\ndef maps(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))\n"
    )
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        code, _, err = condconv("convert", "maps:maps", "--input-size", 32, "-o", tmp_path / "m.safetensors")
    finally:
        sys.path.remove(str(tmp_path))
    assert code == 0, err
    assert f"Next        condconv report {tmp_path / 'm.safetensors'}" in err
    assert "condconv finetune" not in err
