"""The data check: its facts, its lines, duplicates across the split, and the option that groups them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from condconv_surgery.cli.main import app
from PIL import Image
from typer.testing import CliRunner

from condconv_surgery.data.data_check import DataCheck, check_data
from condconv_surgery.data.duplicates import duplicate_groups
from condconv_surgery.data.find_data import find_data, find_parts
from condconv_surgery.errors import InputError
from condconv_surgery.recipe.training_sections import DataOptions
from condconv_surgery.training import finetune
from tests.images import write_images
from tests.small_networks import small_net


def photo(number: int, side: int = 48) -> Image.Image:
    """A smooth image that is like no other number's."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def write_photos(folder: Path, numbers: range, name: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        photo(number).save(folder / f"{name}{number}.png")


def test_the_facts_of_a_folder(tmp_path: Path) -> None:
    write_photos(tmp_path / "cat", range(10))
    write_photos(tmp_path / "dog", range(10, 16))
    photo(50, 96).convert("P").save(tmp_path / "cat/a.gif")
    photo(51, 24).convert("CMYK").save(tmp_path / "cat/b.jpg")
    Image.fromarray(np.asarray(photo(52).convert("L")).astype(np.uint16) * 257).save(tmp_path / "dog/c.png")
    (tmp_path / "dog/d.png").touch()
    (tmp_path / "dog/e.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (tmp_path / "dog/notes.txt").touch()
    (tmp_path / "dog/.hidden").touch()
    check = check_data(str(tmp_path))
    assert (check.train + check.val, check.classes, check.checked) == (21, ("cat", "dog"), 21)
    assert check.sizes == ((24, 24), (48, 48), (96, 96))
    assert check.modes == {"palette": 1, "CMYK": 1, "16-bit grey": 1}
    assert check.skipped == {"hidden": 1, "not an image (.txt)": 1}
    assert sum(check.unreadable.values()) == 2
    assert check.unreadable["empty"] == 1
    assert (check.equal, check.near) == (0, 0)
    lines = check.lines()
    assert len(lines) <= 10
    assert "Classes: smallest dog (7), largest cat (10 training images)." in lines
    assert any("chosen by the seed 0" in line for line in lines)
    assert json.loads(json.dumps(check.to_dict()))["unreadable"]["empty"] == 1


def test_a_class_without_validation_images_is_named(tmp_path: Path) -> None:
    for name, numbers in (("cat", range(4)), ("dog", range(4, 8)), ("owl", range(8, 12))):
        write_photos(tmp_path / "train" / name, numbers)
    write_photos(tmp_path / "val/cat", range(20, 22))
    found = json.loads(CliRunner().invoke(app, ["check", "--data", str(tmp_path), "--json"]).stdout)
    assert (found["counts"], found["val_counts"]) == ([4, 4, 4], [2, 0, 0])
    assert (found["without_training"], found["without_validation"]) == ([], ["dog", "owl"])
    lines = check_data(str(tmp_path)).lines()
    assert "Without validation images: dog, owl (2 of 3 classes), which top-1 does not measure." in lines
    write_photos(tmp_path / "val/dog", range(22, 24))
    write_photos(tmp_path / "val/owl", range(24, 26))
    assert not [line for line in check_data(str(tmp_path)).lines() if line.startswith("Without")]


def test_a_class_that_a_set_declares_and_does_not_show_is_named() -> None:
    lines = DataCheck(2, 1, ("cat", "dog", "elk"), (2, 0, 0), (0, 1, 0), "a split.", 3).lines()
    assert "Without training images: dog, elk (2 of 3 classes), which cannot be learnt." in lines
    assert "Without validation images: cat (1 of 3 classes), which top-1 does not measure." in lines


def test_a_check_with_every_line_has_ten() -> None:
    found = DataCheck(
        *(2, 2, ("cat", "dog"), (2, 0), (0, 2), "a split.", 4, ((8, 8), (8, 9), (9, 9))),
        modes={"CMYK": 1},
        skipped={"hidden": 1},
        unreadable={"empty": 1},
        unreadable_images={"a.png": "empty"},
        equal=1,
        duplicate_names=("b.png",),
    )
    assert len(found.lines()) == 10


def test_duplicates_across_the_parts(tmp_path: Path) -> None:
    for name, numbers in (("cat", range(6)), ("dog", range(6, 12))):
        write_photos(tmp_path / "train" / name, numbers)
    write_photos(tmp_path / "val/cat", range(20, 24))
    write_photos(tmp_path / "val/dog", range(24, 27))
    photo(0).save(tmp_path / "val/cat/same.bmp")
    photo(7, 40).save(tmp_path / "val/dog/smaller.jpg", quality=92)
    check = check_data(str(tmp_path))
    assert (check.equal, check.near) == (1, 1)
    assert {Path(name).name for name in check.duplicate_names} == {"same.bmp", "smaller.jpg"}
    line = check.lines()[-1]
    assert line.startswith("Duplicates: 1 validation images equal a training image, 1 nearly")
    assert line.endswith("Remove them from one of the two parts.")  # there is no split that could group them
    alone = check_data(str(tmp_path / "val"))
    assert "Duplicates" not in "".join(alone.lines())
    photo(20).save(tmp_path / "val/cat/copy.bmp")
    lines = [check_data(str(tmp_path / "val"), seed=seed).lines()[-1] for seed in range(20)]
    assert any(line.endswith("data.group_duplicates=True keeps them on one side of a split.") for line in lines)


def test_flat_and_unlike_images_are_no_duplicates(tmp_path: Path) -> None:
    for part, shift in (("train", 0), ("val", 1)):
        for label in range(2):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(4):
                grey = 20 * i + 10 * label + shift
                Image.new("RGB", (16, 16), (grey, grey, grey)).save(folder / f"{i}.png")
    check = check_data(str(tmp_path))
    assert (check.equal, check.near) == (0, 0)


def test_duplicates_are_kept_together_when_that_is_asked_for(tmp_path: Path) -> None:
    for name, numbers in (("cat", range(10)), ("dog", range(10, 20))):
        write_photos(tmp_path / name, numbers)
        for number in numbers:
            photo(number, 40).save(tmp_path / name / f"again{number}.jpg", quality=92)
    plain = check_data(str(tmp_path))
    assert plain.near > 0
    options = DataOptions(folder=str(tmp_path), group_duplicates=True)
    grouped = check_data(options)
    assert (grouped.equal, grouped.near) == (0, 0)
    assert (grouped.train, grouped.val) == (32, 8)
    images = find_parts(options).train
    groups = duplicate_groups(images)
    assert len(set(groups)) == 20
    assert find_data(options, 3)[1].fingerprint() != find_data(options, 4)[1].fingerprint()


def test_a_class_of_copies_cannot_be_split(tmp_path: Path) -> None:
    write_photos(tmp_path / "cat", range(5))
    (tmp_path / "dog").mkdir()
    for i in range(4):
        photo(9).save(tmp_path / "dog" / f"{i}.png")
    with pytest.raises(InputError, match=r"class dog are equal(.|\n)*group_duplicates=False"):
        find_data(DataOptions(folder=str(tmp_path), group_duplicates=True), 0)


def test_the_command_prints_lines_or_json(tmp_path: Path) -> None:
    write_images(tmp_path, each=5)
    run = CliRunner()
    shown = run.invoke(app, ["check", "--data", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("Data: 12 training and 3 validation images in 3 classes.")
    found = json.loads(run.invoke(app, ["check", "--data", str(tmp_path), "--json", "--seed", "1"]).stdout)
    assert (found["train"], found["val"], found["classes"]) == (12, 3, ["class0", "class1", "class2"])


def test_a_run_checks_its_data_before_the_first_step(tmp_path: Path) -> None:
    write_images(tmp_path / "data/train", each=6)
    write_images(tmp_path / "data/val", each=2)
    spoilt = tmp_path / "data/val/class1/00.png"
    spoilt.write_bytes(b"")
    options = {
        "output": str(tmp_path / "run"),
        "data": {"folder": str(tmp_path / "data"), "image_size": 16, "batch_size": 6, "workers": 0},
        "schedule": {"epochs": 1},
    }
    with pytest.raises(InputError, match=r"1 unreadable image: .*00\.png \(empty\)(.|\n)*data\.max_bad=10"):
        finetune(small_net(), options)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    options["data"]["max_bad"] = 1  # type: ignore[index]
    assert finetune(small_net(), options).unreadable == (str(spoilt),)
    again = (
        CliRunner().invoke(app, ["check", "--data", str(tmp_path / "run"), "--json"]).stdout
    )  # of a run, by its name
    assert again == (tmp_path / "run/data.json").read_text()
    facts = json.loads((tmp_path / "run/data.json").read_text())
    assert (facts["train"], facts["val"], facts["unreadable"]) == (18, 6, {"empty": 1})
