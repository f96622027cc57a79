"""The advice of messages about data, options, training, studies and reports, typed as ``test_advice`` types others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import condconv_surgery as cs
from tests.cli.advice import require_help
from tests.cli.test_advice import artifact, here, images, over_a_run, training
from tests.conftest import Run

__all__ = ["here"]

Commands = Callable[[], list[str]]


def checking(change: Callable[[], object], *flags: str) -> Commands:
    def write() -> list[str]:
        images()
        change()
        return ["check", *(flags if "--data" in flags else ("--data", "images", *flags))]

    return write


def comparing(*flags: str) -> Commands:
    def write() -> list[str]:
        images()
        budget = ["--epochs", "1", "--batch-size", "4", "--image-size", "16", "--workers", "0", "--seeds", "1"]
        return ["compare", "nets:tiny", "--data", "images", "-o", "study", "--rates", "1", *budget, *flags]

    return write


def converted(source: str) -> str:
    model = cs.load_model(source)
    cs.save(cs.convert(model, cs.CondConv(experts=2), example=torch.zeros(1, 3, 16, 16)).model, "made.safetensors")
    return "made.safetensors"


def nothing() -> None:
    """The images as they are."""


def alone() -> None:
    """One folder of images, beside them."""
    shutil.copytree("images/val/class0" if Path("images/val").exists() else "images/class0", "only/cats")


def no_images() -> None:
    for name in ("a", "b"):
        Path("bare", name).mkdir(parents=True)
        Path("bare", name, "notes.txt").write_text("no image")


def only_a_test_part() -> None:
    shutil.move("images", "parts_test")
    Path("parts").mkdir()
    shutil.move("parts_test", "parts/test")
    images()


def unreadable() -> None:
    for file in sorted(Path("images").rglob("*.png"))[:2]:
        file.write_bytes(b"no image")


def resumed(*flags: str) -> Commands:
    return lambda: [*over_a_run(), "--resume", *flags]


MISTAKES: dict[str, Commands] = {
    "a folder that is not there": checking(nothing, "--data", "imagse"),
    "a file for a folder": checking(lambda: Path("list.txt").write_text("x"), "--data", "list.txt"),
    "one class": checking(alone, "--data", "only"),
    "class folders without images": checking(no_images, "--data", "bare"),
    "a test part alone": checking(only_a_test_part, "--data", "parts"),
    "another validation folder": checking(nothing, "--set", "data.val=nope"),
    "a check of a stream": checking(nothing, "--set", "data.streaming=true"),
    "an option of no data": checking(nothing, "--set", "optimizer.lr=1"),
    "an unknown layout of folders": checking(nothing, "--set", "data.layout=clases"),
    "shards that are not there": checking(nothing, "--data", "shards.tar"),
    "a data set that is not torchvision's": checking(nothing, "--data", "torchvision:cifar11"),
    "a data set that is not downloaded": checking(nothing, "--data", "torchvision:cifar10"),
    "unreadable images": lambda: [*training("--set", "data.max_bad=0")(), *(unreadable() or ())],
    "an option that is not there": training("--set", "optimizer.lrr=1"),
    "an option of another section": training("--set", "data.lr=1"),
    "a section that is not there": training("--set", "optimiser.lr=1"),
    "an option without a value": training("--set", "optimizer.lr"),
    "an option of another kind": training("--set", "optimizer.lr=fast"),
    "a crop that is none": training("--set", "augment.crop=[2, 1]"),
    "milestones of another schedule": training("--set", "schedule.milestones=[3]"),
    "an early stop before statistics": training(
        "--set", "schedule.early_stop=2", "--set", "layers.batch_norm=recalibrate"
    ),
    "no epochs": training("--epochs", "0"),
    "a batch of none": training("--batch-size", "0"),
    "a precision that is none": training("--set", "engine.precision=int8"),
    "synchronised norms on a CPU": training("--set", "engine.sync_batch_norm=true"),
    "a batch for accumulation": training("--set", "optimizer.accumulate=3"),
    "class weights of a stream": training("--set", "optimizer.class_weights=true", "--set", "data.streaming=true"),
    "a run resumed for fewer epochs": resumed("--epochs", "0"),
    "one arm": comparing("--arm", "static"),
    "an arm twice": comparing("--arm", "static", "--arm", "condconv:2", "--arm", "condconv:2"),
    "an unknown arm": comparing("--arm", "static", "--arm", "condcon:2"),
    "an arm of no experts": comparing("--arm", "static", "--arm", "condconv:none"),
    "a static arm with a start": comparing("--arm", "static,start=noise", "--arm", "condconv:2"),
    "an unknown option of an arm": comparing("--arm", "static", "--arm", "condconv:2,strat=noise"),
    "no seeds": comparing("--arm", "static", "--arm", "condconv:2", "--seeds", "0"),
    "a comparison of a converted model": lambda: [
        *("compare", converted("nets:tiny")),
        *comparing("--arm", "static", "--arm", "condconv:2")()[2:],
    ],
    "predictions of no images": artifact("predict", "made.safetensors"),
    "predictions into no folder": lambda: (
        images() or artifact("predict", "made.safetensors", "--data", "images", "-o", "none/out.csv")()
    ),
    "predictions in batches of none": lambda: (
        images() or artifact("predict", "made.safetensors", "--data", "images", "--batch", "0")()
    ),
    "a report on a GPU that is not there": artifact("report", "made.safetensors", "--device", "cuda"),
    "a report in an unknown runtime": artifact("report", "made.safetensors", "--runtime", "onx"),
    "a page into no folder": artifact("report", "made.safetensors", "--html", "none/report.html"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_advice_helps(mistake: str, here: Path, condconv: Run) -> None:
    require_help(condconv, MISTAKES[mistake]())
