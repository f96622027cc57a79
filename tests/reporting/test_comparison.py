"""Several models in one table, and the accuracy that a run recorded."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from condconv_surgery import report
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import TrainingOptions
from condconv_surgery.recipe.toml_text import to_toml
from condconv_surgery.reporting import (
    Comparison,
    Predictions,
    RecordedAccuracy,
    Report,
    paired_difference,
    recorded_accuracy,
)
from condconv_surgery.reporting.render.comparison_table import rows_of
from condconv_surgery.reporting.render.plots import accuracy_against_cost
from condconv_surgery.reporting.render.terminal import render_comparison
from condconv_surgery.reporting.study.binomial_interval import binomial_interval
from tests.measured_report import SPEC, shown
from tests.small_networks import small_net


def test_comparison(measured: Report, tmp_path: Path) -> None:
    plain = replace(report(small_net(), inputs=SPEC), title="plain", recorded=RecordedAccuracy(0.5, 10, "digits"))
    both = Comparison((plain, measured))
    assert both.to_dict()["models"][0]["accuracy"] == 0.5
    text = shown(render_comparison(both.reports))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "50.0% *" in text
    assert "* as its own run recorded: plain on 10 validation images of digits." in text.replace("\n", " ")
    assert "not of the same images" in text.replace("\n", " ")
    for form in (text, both.to_markdown(), both.to_html()):
        assert "latency" not in form, "a column in which nothing was measured"
        assert "top-1" in form
    assert [line.count("|") for line in both.to_markdown().splitlines() if line.startswith("|")] == [7] * 4
    assert len(both.to_csv().splitlines()) == 3
    assert "<svg" in both.to_html()
    assert [f.name for f in both.write_plots(tmp_path)] == ["comparison.png", "comparison.svg"]
    unknown = Comparison((replace(plain, recorded=None),))
    assert "<svg" not in unknown.to_html()
    with pytest.raises(InputError, match="No accuracy of these models is known"):
        unknown.write_plots(tmp_path)


def test_runs_of_one_file_name_are_told_apart_in_every_form(measured: Report) -> None:
    titles = ("studies/seven/static/best.safetensors", "studies/seven/converted/best.safetensors")
    both = Comparison(tuple(replace(measured, title=title) for title in titles))
    rows = [line.split()[0] for line in shown(render_comparison(both.reports)).splitlines() if "layer" in line]
    assert rows == ["static", "converted"]
    assert (
        both.to_markdown().count("| static |") == both.to_markdown().count("| converted |") - 1 == 1
    )  # and the header
    same = [replace(measured, title=f"{folder}/a/best.safetensors") for folder in "xy"]
    assert [row[0] for row in rows_of(same)] == ["x/a/best.safetensors", "y/a/best.safetensors"]


def test_axes_of_accuracy_end_at_a_hundred_percent(measured: Report) -> None:
    """And the legend covers no point and no bar."""
    perfect = [predicted(measured, digits) for digits in ("1" * 20, "1" * 19 + "0")]
    figure = accuracy_against_cost(perfect)
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low >= 0
        assert 100 < high < 101.5
        legend, area = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert legend.y0 >= area.y1


def test_accuracy_that_a_run_recorded(tmp_path: Path) -> None:
    rows = [{"val_top1": 0.3, "best": True}, {"val_top1": 0.5, "best": True}, {"val_top1": 0.4, "best": False}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"val_t')
    for name in ("best", "last", "other"):
        (tmp_path / f"{name}.safetensors").touch()
    found = [recorded_accuracy(tmp_path / f"{name}.safetensors") for name in ("best", "last", "other", "missing")]
    assert found == [RecordedAccuracy(0.5), RecordedAccuracy(0.4), None, None]
    recipe = TrainingOptions().updated({"seed": 2, "data": {"folder": "digits"}})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    (tmp_path / "data.json").write_text('{"train": 30, "val": 8}')
    assert recorded_accuracy(tmp_path / "best.safetensors") == RecordedAccuracy(0.5, 8, "digits (seed 2)")
    assert recorded_accuracy("torchvision:resnet18") is None


def test_recorded_accuracies_are_of_the_same_images_only_where_the_records_say_so(
    plain: Report, tmp_path: Path
) -> None:
    """Two runs with equally many validation images of one folder and one seed, between which the folder has changed."""
    rows = {"a": ["0", "1"], "b": ["1", "0"], "c": ["0", "2"]}
    for name, images in rows.items():
        run = tmp_path / name
        run.mkdir()
        (run / "best.safetensors").touch()
        (run / "metrics.jsonl").write_text('{"val_top1": 0.5, "best": true}\n')
        (run / "recipe.toml").write_text(to_toml(TrainingOptions().updated({"data": {"folder": "digits"}})))
        (run / "data.json").write_text('{"train": 30, "val": 2}')
        lines = [["train", "cat", "cat/9.png"], *(["val", "cat", f"cat/{image}.png"] for image in images)]
        (run / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def answer(*names: str) -> str:
        own = [replace(plain, title=name, recorded=recorded_accuracy(tmp_path / name)) for name in names]
        return str(Comparison(tuple(own)).to_dict()["answer"])

    assert answer("a", "b").startswith("Each run recorded its top-1 on the same 2 validation images of digits (seed 0)")
    assert answer("a", "c").startswith("The accuracies are not of the same images")
    for name in ("a", "b"):
        (tmp_path / name / "images.jsonl").unlink()
    assert answer("a", "b").startswith("The accuracies are not of the same images")


def predicted(report: Report, right: str, images: str = "a") -> Report:
    """``report`` of a model that is right where ``right`` has a 1, on images of two classes."""
    labels = tuple(i % 2 for i in range(len(right)))
    own = tuple(label if digit == "1" else 1 - label for label, digit in zip(labels, right, strict=True))
    names = tuple(f"{images}{i}" for i in range(len(right)))
    found = Predictions(names, labels, own, (0.75,) * len(right), ("cat", "dog"), ("cat", "dog"), (0, 1), True, "pets")
    return replace(report, predictions=found, routing=None)


@pytest.fixture(scope="module")
def plain() -> Report:
    return replace(report(small_net(), inputs=SPEC), title="plain")


def test_models_are_compared_on_the_same_images_with_an_interval(plain: Report) -> None:
    """40 of 400 images differ: 30 are won and 10 lost."""
    base = "1" * 320 + "0" * 80
    other = "0" * 10 + "1" * 310 + "1" * 30 + "0" * 50
    both = Comparison((predicted(plain, base), predicted(replace(plain, title="other"), other)))
    assert both.differences[1] == paired_difference([other], [base])
    assert both.differences[1].mean == pytest.approx(0.05)
    sentence = both.to_dict()["answer"]
    assert sentence.startswith("other is better than plain: +5.0 ± 3.1 points of top-1 (95% interval) on the same 400 ")
    assert "images of pets; +0.0% parameters, +0.0% MACs." in sentence
    for form in (both.to_html(), both.to_markdown(), shown(render_comparison(both.reports))):
        assert "+5.0 ± 3.1" in form
    row = next(csv.DictReader(both.to_csv().splitlines()[:1] + both.to_csv().splitlines()[2:]))
    assert (float(row["difference"]), row["images"]) == (pytest.approx(0.05), "400")
    worse = Comparison((both.reports[1], both.reports[0]))
    assert worse.to_dict()["answer"].startswith("plain is worse than other: -5.0 ± 3.1 points")


def test_a_difference_within_its_interval_is_no_evidence(plain: Report) -> None:
    reports = [
        predicted(replace(plain, title=name), text) for name, text in (("a", "1110"), ("b", "1011"), ("c", "1111"))
    ]
    assert Comparison(tuple(reports[:2])).to_dict()["answer"].startswith("No evidence that b and a differ: +0.0 ± ")
    assert (
        Comparison(tuple(reports))
        .to_dict()["answer"]
        .startswith("No evidence that any model is better than a; best is c")
    )


def test_inputs_of_different_sizes_are_named(plain: Report) -> None:
    """Four times the MACs are then of the size, not of the model."""
    larger = replace(report(small_net(), inputs=replace(SPEC, height=64, width=64)), title="larger")
    note = "MACs, latency and top-1 are those of each model on its own input: plain on 1x3x32x32, larger on 1x3x64x64."
    both = Comparison((plain, larger))
    for form in (both.to_html(), both.to_markdown(), " ".join(shown(render_comparison(both.reports)).split())):
        assert note in form
    assert "its own input" not in Comparison((plain, plain)).to_markdown()


def test_models_on_different_images_are_not_compared(plain: Report) -> None:
    both = Comparison((predicted(plain, "1110"), predicted(replace(plain, title="other"), "1110", images="b")))
    assert both.differences == [None, None]
    assert "measured on different images" in both.to_markdown()
    assert both.to_dict()["answer"].startswith("The accuracies are not of the same images")


def test_images_without_labels_are_not_those_of_a_recorded_accuracy(plain: Report) -> None:
    model = replace(predicted(plain, "1110"), recorded=RecordedAccuracy(0.5, 10))
    assert model.predictions is not None
    unlabelled = replace(model, predictions=replace(model.predictions, labels=(None,) * 4))
    for form, expected in ((model, ("0.75", "4")), (unlabelled, ("0.5", "10"))):
        row = next(csv.DictReader(Comparison((form,)).to_csv().splitlines()))
        assert (row["accuracy"], row["images"]) == expected


def test_plots_of_a_comparison_have_error_bars_and_counts(plain: Report) -> None:
    figure = accuracy_against_cost(
        [predicted(plain, "1110" * 25), replace(plain, title="r", recorded=RecordedAccuracy(0.5))]
    )
    axes = figure.axes[0]
    assert axes.get_ylabel() == "top-1, % (100 images, bars: 95%)"
    bars = [sorted(y for _, y in bar) for bar in axes.collections[0].get_segments()]
    assert bars == [[50.0, 50.0], pytest.approx([100 * end for end in binomial_interval(75, 100)])]
