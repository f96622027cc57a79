"""Folders as people have them: names of parts, hidden entries, links, suffixes, and what is ambiguous."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from condconv_surgery.data.evaluation_images import find_evaluation_images
from condconv_surgery.data.find_data import divide, find_data, find_parts
from condconv_surgery.data.image_folders import ImageFiles, find_unlabelled_images, scan
from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.data.three_parts import find_three_parts
from condconv_surgery.errors import InputError
from condconv_surgery.recipe.toml_text import to_toml
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.recipe.training_sections import DataOptions
from condconv_surgery.training.state.image_record import write_image_record
from condconv_surgery.training.state.run_lock import LOCK

IMAGE = Image.new("RGB", (4, 4), (200, 30, 90))


def fill(folder: Path, each: int = 2, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            IMAGE.save(folder / name / f"{i}.png")
    return folder


def options(folder: Path, **more: object) -> DataOptions:
    return DataOptions(folder=str(folder), **more)  # type: ignore[arg-type]


def parts_of(images: LabelledImages) -> set[str]:
    """The first folders below the data folder."""
    assert isinstance(images, ImageFiles)
    return {images.root.name}


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING", "train_set", "trainset", "train-images", "train2017"])
@pytest.mark.parametrize("val", ["val", "Val", "valid", "VALIDATION", "val_set", "dev", "valset", "eval"])
def test_parts_are_recognised_by_every_reader(tmp_path: Path, train: str, val: str) -> None:
    fill(tmp_path / train, 5)
    fill(tmp_path / val, 2)
    run = divide(find_parts(options(tmp_path)), options(tmp_path), 0)
    assert (len(run.train), len(run.val), run.train.classes) == (10, 4, ("cat", "dog"))
    assert str(tmp_path / val) in run.origin
    measured, held_out, _ = find_evaluation_images(options(tmp_path))
    assert (parts_of(measured), held_out) == ({val}, True)
    assert parts_of(find_three_parts(options(tmp_path), 0).test) == {val}
    assert {path.parts[-3] for path in find_unlabelled_images(tmp_path, 100)} == {train}


def test_a_test_folder_never_selects(tmp_path: Path) -> None:
    fill(tmp_path / "train", 5)
    fill(tmp_path / "Test", 3)
    run = divide(find_parts(options(tmp_path)), options(tmp_path), 0)
    assert (len(run.train), len(run.val)) == (8, 2)
    assert parts_of(run.val) == {"train"}
    assert "20% of each class" in run.origin
    assert f"{tmp_path / 'Test'} is not used" in run.origin
    assert parts_of(find_three_parts(options(tmp_path), 0).test) == {"Test"}
    assert parts_of(find_evaluation_images(options(tmp_path))[0]) == {"Test"}
    chosen = options(tmp_path, val=str(tmp_path / "Test"))
    assert parts_of(divide(find_parts(chosen), chosen, 0).val) == {"Test"}, "but it does when that is asked for"


def test_a_test_folder_without_classes_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "train", 5)
    (tmp_path / "test").mkdir()
    IMAGE.save(tmp_path / "test/0.png")
    run = divide(find_parts(options(tmp_path)), options(tmp_path), 0)
    assert len(run.train) + len(run.val) == 10
    assert "Not read: test" in run.origin


@pytest.mark.parametrize(
    "names", [("good", "test"), ("bus", "train"), ("valid", "invalid"), ("train", "station", "track"), ("rain", "sun")]
)
def test_classes_may_have_the_name_of_a_part(tmp_path: Path, names: tuple[str, ...]) -> None:
    fill(tmp_path, 3, names)
    assert find_parts(options(tmp_path)).train.classes == tuple(sorted(names))
    images, held_out, _ = find_evaluation_images(options(tmp_path))
    assert (images.classes, held_out) == (tuple(sorted(names)), False)
    assert find_three_parts(options(tmp_path), 0).train.classes == tuple(sorted(names))


def loose(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    IMAGE.save(folder / "0.png")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: (fill(p / "trian"), fill(p / "val")), "val and trian have folders of the same names"),
        (lambda p: (fill(p / "train"), fill(p / "vla")), "vla, beside train, has folders of the same names"),
        (lambda p: (fill(p / "trainval"), fill(p / "test")), "test and trainval have folders of the same names"),
        (lambda p: (fill(p / "learn"), fill(p / "check")), "check and learn all have the folders cat, dog"),
        (lambda p: (fill(p / "val"), fill(p / "valid"), fill(p / "train")), "val and valid both mean val"),
        (lambda p: (fill(p / "Train"), fill(p / "training"), fill(p / "val")), "Train and training both mean train"),
        (lambda p: (fill(p), fill(p / "test")), "cat is in it and in test"),
        (lambda p: (loose(p / "train"), loose(p / "test")), "test and train hold images"),
        (lambda p: (fill(p / "train"), loose(p / "bus"), loose(p / "car")), "bus beside it images"),
        (lambda p: (fill(p / "train"), loose(p / "val")), "val holds images, not folders of classes"),
        (lambda p: fill(p / "val"), "has val and no training images"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(
    tmp_path: Path, prepare: Callable[[Path], object], message: str
) -> None:
    prepare(tmp_path)
    for read in (find_parts, lambda o: find_three_parts(o, 0)):
        with pytest.raises(InputError, match=message) as caught:
            read(options(tmp_path))
        assert caught.value.fix


def test_the_layout_can_be_said(tmp_path: Path) -> None:
    fill(tmp_path / "learn")
    fill(tmp_path / "check")
    as_classes = options(tmp_path, layout="classes")
    assert find_parts(as_classes).train.classes == ("check", "learn")
    named = options(tmp_path / "learn", val=str(tmp_path / "check"))
    run = divide(find_parts(named), named, 0)
    assert (len(run.train), len(run.val)) == (4, 4)


def test_hidden_entries_are_skipped_at_every_depth(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    for name in (".ipynb_checkpoints", "__MACOSX", "deep/.cache", "@eaDir"):
        shutil.copytree(tmp_path / "cat", tmp_path / "dog" / name, ignore=shutil.ignore_patterns("deep"))
    (tmp_path / "cat/._0.png").write_bytes(b"\0\5\26\7")
    fill(tmp_path / "__MACOSX")
    images = scan(tmp_path)
    assert (images.counts(), images.classes) == ([3, 3], ("cat", "dog"))
    assert dict(images.skipped) == {"hidden": 5}
    assert len(find_unlabelled_images(tmp_path, 100)) == 6


@pytest.mark.parametrize("target", ["..", "../..", ".", "../dog", "../dog/deep"])
def test_each_real_folder_is_read_once(tmp_path: Path, target: str) -> None:
    data = fill(tmp_path / "data", 3)
    fill(data / "dog", 2, ("deep",))
    (data / "cat/up").symlink_to(target)
    assert scan(data).counts() == [3, 5]


def test_links_to_elsewhere_are_followed_once(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 4)
    (store / "cat/back").symlink_to("..")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("cat", "dog"):
        (data / name).symlink_to(store / name)
    assert scan(data).counts() == [4, 4]
    (data / "cow").symlink_to(store / "cat")
    with pytest.raises(InputError, match=r"cow .*read already"):
        scan(data)


def test_a_run_inside_the_data_is_not_a_class(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    run = tmp_path / "run"
    run.mkdir()
    IMAGE.save(run / "curves.png")
    (run / "recipe.toml").touch()
    (run / "metrics.jsonl").touch()
    assert scan(tmp_path).classes == ("cat", "dog")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / LOCK).touch()
    assert scan(tmp_path).classes == ("cat", "dog")


def test_content_decides_where_the_suffix_is_unusual(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    kinds = {"a.gif": "GIF", "b.jfif": "JPEG", "c.avif": "AVIF", "d.webp": "WEBP", "e": "PNG", "f.dat": "TIFF"}
    for name, kind in kinds.items():
        IMAGE.save(tmp_path / "cat" / name, kind)
    (tmp_path / "cat/notes.txt").write_text("P6 hello")
    (tmp_path / "cat/Thumbs.db").write_bytes(b"\x89PNG")
    (tmp_path / "cat/g.xyz").write_bytes(b"nothing")
    (tmp_path / "cat/h.nef").write_bytes((tmp_path / "cat/f.dat").read_bytes())
    images = scan(tmp_path)
    assert images.counts() == [8, 2]
    assert dict(images.skipped) == {
        "not an image (.txt)": 1,
        "not an image (.db)": 1,
        "not an image (.xyz)": 1,
        "camera raw (.nef)": 1,
    }


def test_a_class_of_files_that_are_not_read_is_not_to_be_removed(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/1.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(InputError, match=r"phone \(1 \.heic needs pillow-heif\)") as caught:
        scan(tmp_path)
    assert caught.value.fix == "pip install pillow-heif"


def test_names_in_another_encoding_can_be_printed_and_stored(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    Path(os.fsdecode(os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")).write_bytes(
        (tmp_path / "cat/0.png").read_bytes()
    )
    (tmp_path / "dog").rename(os.fsdecode(os.fsencode(tmp_path) + b"/ch\xe4t"))
    images = scan(tmp_path)
    assert images.classes == ("cat", r"ch\xe4t")
    index = next(i for i in range(len(images)) if "caf" in images.name(i))
    assert images.name(index).endswith(r"caf\xe9.png")
    assert images.name(index).encode()
    with images.open(index) as image:
        assert image.size == (4, 4)
    assert len(images.fingerprint()) == 64


def test_a_named_pipe_is_skipped(tmp_path: Path) -> None:
    """Opening it would wait for ever."""
    fill(tmp_path)
    for name in ("pipe.png", "pipe"):
        os.mkfifo(tmp_path / "cat" / name)
    images = scan(tmp_path)
    assert (len(images), images.skipped) == (4, (("not a regular file", 2),))


def test_a_run_directory_gives_the_validation_images_of_the_run(tmp_path: Path) -> None:
    fill(tmp_path / "images", 10)
    chosen = TrainingOptions().updated({"seed": 3, "data": {"folder": str(tmp_path / "images")}})
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(to_toml(chosen))
    (run / "data.json").write_text('{"train": 16, "val": 4}')
    divided = divide(find_parts(chosen.data), chosen.data, 3)
    found = find_evaluation_images(options(run))
    assert isinstance(found.images, ImageFiles)
    assert isinstance(divided.val, ImageFiles)
    assert (found.images.files, found.held_out) == (divided.val.files, True)
    assert found.where == f"{tmp_path / 'images'} (validation images of {run})"
    fill(tmp_path / "images", 15)
    with pytest.raises(
        InputError, match=r"16 training and 4 validation images then, 24 and 6 now(.|\n)*did not train on"
    ):
        find_evaluation_images(options(run))


def test_the_validation_images_of_a_run_are_those_that_it_recorded(tmp_path: Path) -> None:
    """Images that are added or removed later would give another split, with images that the run trained on."""
    fill(tmp_path / "images", 10)
    chosen = TrainingOptions().updated({"data": {"folder": str(tmp_path / "images")}})
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(to_toml(chosen))
    train, val = find_data(chosen.data, chosen.seed)
    assert isinstance(train, ImageFiles)
    assert isinstance(val, ImageFiles)
    write_image_record(run, train, val)
    train.path(0).unlink()
    fill(tmp_path / "images", 15, ("bird", "cat", "dog"))
    assert find_data(chosen.data, chosen.seed)[1].fingerprint() != val.fingerprint()
    found = find_evaluation_images(options(run))
    assert isinstance(found.images, ImageFiles)
    assert (found.images.classes, found.images.files, found.images.labels) == (val.classes, val.files, val.labels)
    val.path(0).unlink()
    found = find_evaluation_images(options(run))
    assert isinstance(found.images, ImageFiles)
    assert found.images.files == val.files[1:]
    assert found.where == f"{tmp_path / 'images'} (3 of the 4 validation images of {run})"
    for index in range(1, len(val)):
        val.path(index).unlink()
    with pytest.raises(InputError, match=r"None of the 4 validation images of (.|\n)*restore the folder"):
        find_evaluation_images(options(run))
