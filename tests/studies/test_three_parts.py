"""Training, validation and test images of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.data.three_parts import ThreeParts, find_three_parts
from condconv_surgery.errors import InputError
from condconv_surgery.recipe.training_sections import DataOptions
from tests.images import write_images


def parts_of(folder: Path, **options: object) -> ThreeParts:
    return find_three_parts(DataOptions(folder=str(folder), **options), seed=0)  # type: ignore[arg-type]


def names(images: LabelledImages) -> set[str]:
    return {images.name(index) for index in range(len(images))}


def assert_apart(parts: ThreeParts) -> None:
    assert not names(parts.train) & names(parts.val)
    assert not (names(parts.train) | names(parts.val)) & names(parts.test)


def test_a_plain_folder_is_split_in_three(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", each=10)
    parts = parts_of(folder)
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [18, 6, 6]
    assert parts.test.counts() == [2, 2, 2]
    assert_apart(parts)
    assert "18 training, 6 validation and 6 test images" in parts.origin
    assert "split in three" in parts.origin
    assert parts_of(folder).fingerprints() == parts.fingerprints()


@pytest.mark.parametrize("held_out", ["val", "Test", "VALIDATION"])
def test_the_given_validation_images_are_the_test_part(tmp_path: Path, held_out: str) -> None:
    write_images(tmp_path / "Train", each=10)
    write_images(tmp_path / held_out, each=3)
    parts = parts_of(tmp_path)
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [24, 6, 9]
    assert all(f"/{held_out}/" in name for name in names(parts.test))
    assert f"{tmp_path / held_out} are the test part" in parts.origin
    assert_apart(parts)


def test_three_folders_are_used_as_they_are(tmp_path: Path) -> None:
    for name, each in (("train", 5), ("Val", 2), ("test", 3)):
        write_images(tmp_path / name, each=each)
    parts = parts_of(tmp_path)
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [15, 6, 9]
    assert "the parts train, Val and test" in parts.origin


def test_a_second_folder_is_the_test_part(tmp_path: Path) -> None:
    folder, other = write_images(tmp_path / "data", each=10), write_images(tmp_path / "other", each=2)
    parts = parts_of(folder, val=str(other))
    assert names(parts.test) == {str(path) for path in other.rglob("*.png")}
    assert len(parts.train) + len(parts.val) == 30


def test_data_that_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has fewer than three images"):
        parts_of(write_images(tmp_path / "few", each=2))
    with pytest.raises(InputError, match="There is no"):
        parts_of(tmp_path / "nowhere")
    with pytest.raises(InputError, match="streaming=True in a comparison"):
        parts_of(tmp_path, streaming=True)
