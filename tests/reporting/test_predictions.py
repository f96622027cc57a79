"""Predictions: accuracy by class, confusion, calibration, intervals; of any data, also without labels."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import condconv_surgery as cs
from condconv_surgery.deploy.deployment_images import deployment_images
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import Recipe, TrainingOptions, attach_recipe
from condconv_surgery.recipe.toml_text import to_toml
from condconv_surgery.reporting import Predictions, report
from condconv_surgery.reporting.images.report_images import find_images_to_predict
from condconv_surgery.reporting.render.prediction_tables import confusions, predictions_csv, summary_lines, worst_first
from condconv_surgery.reporting.study.binomial_interval import binomial_interval
from tests.images import write_images
from tests.measured_report import SPEC

FOUND = Predictions(
    images=("a", "b", "c", "d", "e", "f"),
    labels=(0, 0, 0, 1, 1, 2),
    predicted=(1, 1, 3, 2, 2, 1),
    confidence=(0.9, 0.5, 0.6, 0.95, 0.2, 1.0),
    classes=("cat", "dog", "owl"),
    outputs=("ape", "cat", "dog", "eel", "owl"),
    targets=(1, 2, 4),
)
"""Two of three cats and both dogs are right; one cat is an eel, which is no class of the data, and the owl a cat."""


class Brightest(nn.Module):
    """The class is the brightest channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 8.0 * x.mean((2, 3))


def brightest(*classes: str) -> nn.Module:
    model = Brightest()
    model.unused = nn.Parameter(torch.zeros(1))
    attach_recipe(model, Recipe(input=SPEC, classes=classes))
    return model.eval()


def test_accuracy_by_class_and_confusion() -> None:
    assert FOUND.correct == "110110"
    assert FOUND.accuracy == pytest.approx(4 / 6)
    assert FOUND.confusion == ((2, 0, 0, 1), (0, 2, 0, 0), (1, 0, 0, 0))
    rows = {row.name: row for row in FOUND.by_class}
    assert (rows["cat"].images, rows["cat"].right, rows["cat"].confused) == (3, 2, ("eel", 1))
    assert (rows["dog"].accuracy, rows["dog"].confused) == (1.0, None)
    assert rows["cat"].interval == binomial_interval(2, 3)
    assert [row.name for row in worst_first(FOUND)] == ["owl", "cat", "dog"]
    assert confusions(FOUND) == [(1, "cat", "another class"), (1, "owl", "cat")]


def test_expected_calibration_error_by_hand() -> None:
    """Every image has a bin of its own of 15, but .95 and 1.0: |.5 + 1| - ..."""
    found = FOUND.calibration
    assert found is not None
    # bins: .2 | .5 | .6 | .9 | .95 and 1.0; right are .9, .5, .95, .2
    gaps = [abs(1 - 0.2), abs(1 - 0.5), abs(0 - 0.6), abs(1 - 0.9), 2 * abs(0.5 - 0.975)]
    assert found.error == pytest.approx(sum(gaps) / 6)
    assert found.confidence == pytest.approx(sum(FOUND.confidence) / 6)
    assert [count for count, _, _ in found.bins] == [1, 1, 1, 1, 2]
    sure = replace(FOUND, predicted=(1, 1, 1, 2, 2, 4), confidence=(1.0,) * 6).calibration
    assert sure is not None
    assert sure.error == 0.0


@pytest.mark.parametrize(("right", "images"), [(0, 10), (10, 10), (1, 2), (997, 1000)])
def test_the_binomial_interval_solves_its_equation(right: int, images: int) -> None:
    """Wilson: the ends p are the shares from which the observed one is z standard errors away."""
    for end in binomial_interval(right, images):
        distance = abs(right / images - end)
        assert distance == pytest.approx(1.959964 * (end * (1 - end) / images) ** 0.5, abs=1e-7)


def test_what_is_not_known_is_empty() -> None:
    for unknown in (replace(FOUND, targets=None), replace(FOUND, labels=(None,) * 6, classes=())):
        assert (unknown.accuracy, unknown.interval, unknown.calibration) == (None, None, None)
        assert (unknown.correct, unknown.confusion, unknown.by_class) == ("", (), ())
        assert "accuracy is unknown" in summary_lines(unknown)[0]
        assert unknown.rows()[0]["correct"] == ""


def test_unreadable_images_are_named() -> None:
    left_out = ("a.jpg (truncated)", "b.jpg (no file)", "c.jpg (empty)", "d.jpg (empty)")
    for count, names in ((1, "a.jpg (truncated)"), (4, "a.jpg (truncated), b.jpg (no file), c.jpg (empty) and 1 more")):
        assert replace(FOUND, unreadable=left_out[:count]).caveats.endswith(f"Left out as unreadable: {names}.")


def test_predict_reads_any_data(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", classes=3, each=5)
    found = cs.predict(brightest("class0", "class1", "class2"), folder)
    assert (found.accuracy, len(found.images)) == (1.0, 15)
    assert "may have been trained on these images" in found.caveats
    rows = list(csv.DictReader(io.StringIO(predictions_csv(found))))
    assert [row["label"] for row in rows] == [row["predicted"] for row in rows]
    assert all(0.99 < float(row["confidence"]) <= 1 and row["correct"] == "1" for row in rows)
    turned = cs.predict(brightest("class1", "class2", "class0"), folder, limit=6)
    assert (turned.accuracy, len(turned.images)) == (0.0, 6)


def test_predict_of_a_folder_without_classes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", classes=1, each=4) / "class0"
    found = cs.predict(brightest("red", "green", "blue"), folder)
    assert (found.accuracy, found.labels) == (None, (None,) * 4)
    assert [row["predicted"] for row in found.rows()] == ["red"] * 4


def test_images_beside_a_folder_are_predicted_with_those_in_it(tmp_path: Path) -> None:
    """The folder is no class of the model, so it says nothing of labels."""
    folder = write_images(tmp_path / "images", classes=1, each=2) / "class0"
    write_images(folder / "old", classes=1, each=1)
    model = brightest("red", "green", "blue")
    found = cs.predict(model, folder)
    assert [Path(name).relative_to(folder).as_posix() for name in found.images] == [
        "00.png",
        "01.png",
        "old/class0/00.png",
    ]
    assert found.labels == (None,) * 3
    assert len(cs.predict(model, folder, limit=2).images) == 2
    for name in ("train", "test"):  # two parts without classes, were they not photos of trains
        (folder / name).mkdir()
        (folder / name / "c.png").write_bytes((folder / "00.png").read_bytes())
    assert cs.predict(model, folder).labels == (None,) * 5


def test_the_order_of_classes_without_names_is_said(tmp_path: Path) -> None:
    """Numbers are in the order of text, 0, 1, 10, 2, as everywhere: right for a model that was trained on folders."""
    folder = write_images(tmp_path / "images", classes=3, each=2)
    for old, new in (("class1", "10"), ("class2", "2"), ("class0", "0")):
        (folder / old).rename(folder / new)
    said = "The model names no classes: its logits are taken to be, in order, 0 0, 1 10, 2 2."
    assert said in cs.predict(brightest(), folder).caveats
    assert said in " ".join(f"{report(brightest(), data=folder)}".split())
    assert said in deployment_images(brightest(), folder, 100).scored_on
    for found in (cs.predict(brightest("0", "10", "2"), folder), cs.predict(brightest("a", "b", "c"), folder)):
        assert "in order" not in found.caveats


def test_names_of_a_head_that_was_replaced_are_not_used(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", classes=3, each=2)
    for stale in (("class1", "class0"), ("class2", "class1", "class0", "more")):
        found = cs.predict(brightest(*stale), folder)
        assert found.accuracy == 1.0
        assert f"The model names {len(stale)} classes and has 3 logits: its names are not used." in found.caveats
        assert found.rows()[0]["predicted"] == "class0"


def test_images_beside_class_folders_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", classes=2, each=3)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes((folder / "class0/00.png").read_bytes())
    found = cs.predict(brightest("class0", "class1", "class2"), folder)
    assert (found.accuracy, len(found.images)) == (1.0, 6)
    assert f"2 images were left out: directly in {folder}, beside its class folders." in summary_lines(found)[0]
    assert len(cs.predict(brightest("red", "green", "blue"), folder).images) == 8
    (folder / "class2").mkdir()
    with pytest.raises(InputError, match="class folders without images: class2"):
        cs.predict(brightest("class0", "class1", "class2"), folder)


def test_predict_of_a_run_takes_its_validation_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", classes=3, each=10)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(to_toml(TrainingOptions().updated({"data": {"folder": str(folder)}})))
    found = cs.predict(brightest("class0", "class1", "class2"), run)
    assert (len(found.images), found.held_out, found.caveats) == (6, True, "")


def test_predict_of_a_run_whose_data_are_gone_is_an_error(tmp_path: Path) -> None:
    """A run directory has an image, its curves, which is none of the run's."""
    run = write_images(tmp_path / "run")
    (run / "recipe.toml").write_text(to_toml(TrainingOptions().updated({"data": {"folder": str(tmp_path / "gone")}})))
    (run / "curves.png").write_bytes((run / "class0/00.png").read_bytes())
    with pytest.raises(InputError, match=r"There is no .*gone"):
        find_images_to_predict(run)


def test_an_unconverted_network_has_a_report_without_gates(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", classes=3, each=4)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    attach_recipe(model, Recipe(input=SPEC, classes=("class0", "class1", "class2")))
    found = report(model, data=folder)
    assert found.routing is None
    assert found.predictions is not None
    assert found.predictions.accuracy is not None
    for form in (found.to_html(), found.to_markdown()):
        text = re.sub(r"<(style|script)>.*?</\1>", "", form, flags=re.DOTALL)
        for word in ("before", "after", "original", "gates", "experts", "conditional only"):
            assert word not in text, word
        assert "The network is not converted" in form
        assert "12 images of" in form


@pytest.mark.parametrize("name", ["limit", "batch"])
@pytest.mark.parametrize("value", [0, -5])
def test_counts_below_one_are_refused(tmp_path: Path, name: str, value: int) -> None:
    """A negative limit left the last images out; a batch of 0 was measured as the first batch size."""
    folder, model = write_images(tmp_path / "data"), brightest("class0", "class1", "class2")
    for measure in (report, lambda model, data, **how: cs.predict(model, data, **how)):
        with pytest.raises(InputError, match=rf"{name} is {value}\.\n  It must be at least 1\.\n  Try: {name}="):
            measure(model, data=folder, **{name: value})


def test_a_recorded_accuracy_is_a_share() -> None:
    model = brightest("a", "b", "c")
    assert report(model, recorded=1).accuracy == 1.0
    with pytest.raises(InputError, match=r"The recorded top-1 is 93\.5\.\n  It is a share, from 0 to 1\."):
        report(model, recorded=93.5)


def test_data_in_memory_are_no_data_by_name() -> None:
    """The text of an object was taken for the name of a folder."""
    loader = torch.utils.data.DataLoader([torch.zeros(3, 8, 8)])
    model = brightest("a", "b", "c")
    calls = (
        lambda: report(model, data=loader),  # type: ignore[arg-type]
        lambda: cs.predict(model, loader),  # type: ignore[arg-type]
        lambda: cs.check_data(loader),  # type: ignore[arg-type]
        lambda: cs.finetune(model, data=loader, output="run"),  # type: ignore[arg-type]
    )
    for call in calls:
        with pytest.raises(InputError, match=r"data= is a DataLoader\.(.|\n)*or your own loop with"):
            call()


def test_classes_without_an_error_are_not_called_weak() -> None:
    assert "Weakest classes: owl 0/1, cat 2/3." in summary_lines(FOUND)  # all dogs are right
    perfect = replace(FOUND, predicted=(1, 1, 1, 2, 2, 4))
    assert len(summary_lines(perfect)) == 2  # accuracy and calibration
