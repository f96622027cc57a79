from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from condconv_surgery.data.decode_image import UnreadableImageError, read_image
from condconv_surgery.data.image_dataset import Draw, ImageDataset, Sample, collate, collate_whole
from condconv_surgery.errors import InputError
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import AugmentOptions
from condconv_surgery.training.batches.augmentation import training_transform
from condconv_surgery.training.batches.samplers import EvaluationBatches, Steps, TrainingBatches
from condconv_surgery.training.batches.unreadable_images import UnreadableImages
from tests.images import find_training_images, write_images

SPEC = InputSpec(height=16, width=16)


def test_split_is_seeded_stratified_and_disjoint(tmp_path: Path) -> None:
    write_images(tmp_path, each=10)
    train, val = find_training_images(tmp_path, 0.2, seed=1)
    assert (len(train), len(val)) == (24, 6)
    assert Counter(val.labels) == {0: 2, 1: 2, 2: 2}
    assert not set(train.files) & set(val.files)
    assert find_training_images(tmp_path, 0.2, seed=1) == (train, val)
    assert find_training_images(tmp_path, 0.2, seed=2)[1].files != val.files


def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    write_images(tmp_path / "train", classes=3, each=4)
    write_images(tmp_path / "val", classes=2, each=2)
    (tmp_path / "val/class0").rename(tmp_path / "val/class2")
    train, val = find_training_images(tmp_path)
    assert (len(train), len(val)) == (12, 4)
    assert train.classes == val.classes == ("class0", "class1", "class2")
    assert sorted(set(val.labels)) == [1, 2]  # by name, not by position


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: None, "no images"),
        (lambda p: write_images(p, classes=1), "one class only: class0"),
        (lambda p: (write_images(p), (p / "hollow").mkdir()), "without images: hollow"),
        (lambda p: Image.new("RGB", (8, 8)).save(p / "a.png"), "directly in it"),
        (lambda p: write_images(p, each=1), "has one image only"),
        (lambda p: (write_images(p / "train"), write_images(p / "val", classes=4)), "do not have: class3"),
    ],
)
def test_folders_that_cannot_be_trained_on(tmp_path: Path, prepare: object, message: str) -> None:
    prepare(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        find_training_images(tmp_path)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no"):
        find_training_images(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file, not a folder"):
        find_training_images(tmp_path / "file")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "clear.png", channels=1).getpixel((0, 0)) == 255


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"a\.png"):
        read_image(tmp_path / "a.png")


def test_a_image_cut_short_is_unreadable(tmp_path: Path) -> None:
    whole = next(write_images(tmp_path).rglob("*.png"))
    whole.write_bytes(whole.read_bytes()[:-300])
    with pytest.raises(UnreadableImageError):
        read_image(whole)


def test_transforms_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    images, _ = find_training_images(write_images(tmp_path))
    data = ImageDataset(images, training_transform(SPEC, AugmentOptions()), seed=5)
    first = data[Draw(1, 3)].image
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(data[Draw(1, 3)].image, first)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are left alone"
    assert not torch.equal(data[Draw(2, 3)].image, first)  # type: ignore[arg-type]


def test_training_replaces_an_unreadable_image_and_validation_leaves_it_out(tmp_path: Path) -> None:
    images, _ = find_training_images(write_images(tmp_path))
    images.path(2).write_bytes(b"")
    transform = training_transform(SPEC, AugmentOptions())
    training = ImageDataset(images, transform, replace=True)[Draw(0, 2)]
    assert training.image is not None
    assert training.unreadable == (str(images.path(2)),)
    scoring = ImageDataset(images, transform)
    batch = collate([scoring[Draw(0, i)] for i in range(4)])
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.unreadable == (str(images.path(2)),)


def test_a_streams_batch_keeps_its_size() -> None:
    def sample(label: int) -> Sample:
        return Sample(torch.full((3, 2, 2), float(label)), label)

    def bad(name: str) -> Sample:
        return Sample(None, -1, (name,))

    batch = collate_whole([bad("a"), bad("b"), sample(2), bad("c"), sample(4), bad("d")])
    assert batch.labels.tolist() == [2, 2, 2, 4, 4, 2]
    assert batch.images[:, 0, 0, 0].tolist() == [2, 2, 2, 4, 4, 2]
    assert batch.unreadable == ("a", "b", "c", "d")
    assert len(collate_whole([bad("a")]).labels) == 0


def test_unreadable_images_are_counted_once_each_up_to_the_limit() -> None:
    told: list[str] = []
    seen = UnreadableImages(limit=2, note=told.append)
    for names in (["a.png"], ["a.png", "b.png", "b.png"]):
        seen.add(names)
        seen.share()
    assert told == ["Unreadable, skipped: a.png", "Unreadable, skipped: b.png"]
    seen.add(["c.png"])
    with pytest.raises(InputError, match=r"3 unreadable images: .*c\.png"):
        seen.share()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_see_together_what_one_sees_alone(world: int, accumulate: int) -> None:
    alone = list(TrainingBatches(Steps(53, 16, epochs=3), 7))
    steps = Steps(53, 16, epochs=3, world=world, accumulate=accumulate)
    shares = [list(TrainingBatches(steps, 7, rank)) for rank in range(world)]
    for step, expected in enumerate(alone):
        together = [
            draw for share in shares for part in share[step * accumulate : (step + 1) * accumulate] for draw in part
        ]
        assert together == expected


def test_an_epoch_sees_no_image_twice_and_the_order_changes() -> None:
    steps = Steps(50, 16, epochs=2)
    order = TrainingBatches(steps, 0)
    batches = list(order)
    assert len(batches) == steps.steps == len(order) == 6
    epochs = [[draw.image for batch in batches[i : i + 3] for draw in batch] for i in (0, 3)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("start", [0, 2, 3, 5])
def test_sampler_skips_to_any_step(start: int) -> None:
    steps = Steps(50, 16, epochs=2)
    order = TrainingBatches(steps, 0)
    everything = list(order)
    steps.start = start
    assert list(order) == everything[start:]


def test_small_sets_make_one_batch_and_unequal_shares_are_refused() -> None:
    assert [len(batch) for batch in TrainingBatches(Steps(5, 32, epochs=1), 0)] == [5]
    with pytest.raises(InputError, match="a multiple of 4"):
        Steps(100, 30, epochs=1, world=4)
    with pytest.raises(InputError, match="1 training images for 2 processes"):
        Steps(1, 2, epochs=1, world=2)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_counts_each_image_once(world: int) -> None:
    drawn = [
        draw for rank in range(world) for batch in EvaluationBatches(53, 8, rank=rank, world=world) for draw in batch
    ]
    assert sorted(draw.image for draw in drawn) == list(range(53))
