"""The scripts that write image sets: which images, and in which part."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from tests.examples.emoji_packages import write_packages

ROOT = Path(__file__).parents[2]
FONTS = Path(mpl.get_data_path()) / "fonts" / "ttf"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.usefixtures("examples")
def test_characters_of_a_font_are_upright_centred_and_apart(tmp_path: Path) -> None:
    characters, fonts, out = module("characters"), tmp_path / "fonts", tmp_path / "out"
    fonts.mkdir()
    shutil.copy(FONTS / "DejaVuSans.ttf", fonts)
    shutil.copy(FONTS / "STIXSizOneSymReg.ttf", fonts)  # brackets only: left out
    (fonts / "broken.otf").write_bytes(b"no font")
    assert characters.write_characters(fonts, out) == 62
    (part,) = out.iterdir()
    assert part.name == characters.part_of(fonts / "DejaVuSans.ttf")
    assert len(list(part.iterdir())) == 62
    ink = {path.parent.name: 255 - pil_to_tensor(Image.open(path)).float()[0] for path in part.rglob("*.png")}
    assert all(image.shape == (32, 32) and image[3:-3, 3:-3].sum() == image.sum() for image in ink.values())
    assert len({image.numpy().tobytes() for image in ink.values()}) == 62
    assert ink["l"].sum() < ink["upper-M"].sum()
    columns = torch.arange(32) + 0.5
    centre = {name: float((image.sum(0) * columns).sum() / image.sum()) for name, image in ink.items()}
    assert centre["upper-H"] == pytest.approx(16, abs=0.5)
    rows = ink["upper-L"].sum(1)
    assert rows.argmax() > 20, "the foot of an L is below"


@pytest.mark.usefixtures("examples")
def test_all_fonts_of_a_family_are_in_one_part() -> None:
    part_of = module("characters").part_of
    assert len({part_of(Path(name)) for name in ("Lato-Bold.ttf", "Lato-Thin.ttf", "other/Lato-Bold.otf")}) == 1
    counts = dict.fromkeys(("train", "val", "test"), 0)
    for number in range(4000):
        counts[part_of(Path(f"{number:05d}-Regular.ttf"))] += 1
    assert counts["train"] == pytest.approx(2500, rel=0.06)
    assert counts["val"] == pytest.approx(500, rel=0.15)
    assert counts["test"] == pytest.approx(1000, rel=0.1)


@pytest.mark.usefixtures("examples")
def test_three_parts_of_the_emoji_keep_the_two_vendors_together(tmp_path: Path) -> None:
    emoji = module("emoji")
    for package in write_packages(tmp_path):
        emoji.write_emoji(package, tmp_path / "two")
        emoji.write_emoji(package, tmp_path / "three", parts=True)
    names = {part: {p.name for p in (tmp_path / "three" / part).rglob("*.png")} for part in ("train", "val", "test")}
    assert names["test"] == {p.name for p in (tmp_path / "two" / "val").rglob("*.png")}
    assert {name.replace("google", "twitter") for name in names["test"]} <= names["test"] | {"1F700-twitter.png"}
    assert sum(map(len, names.values())) == 23  # ten faces and a flag of two vendors, one more of one
