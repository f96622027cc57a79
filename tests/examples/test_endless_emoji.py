"""The task with endless images: what it reads, and that each batch is a function of its position."""

from __future__ import annotations

import importlib
import io
import math
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from tests.examples.emoji_packages import CODES, write_packages

ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("endless_emoji")


def test_the_emoji_that_all_vendors_draw_are_read(example: ModuleType, tmp_path: Path) -> None:
    files = write_packages(tmp_path)
    task = example.read_emoji(files, classes=10, size=16)
    assert task.images.shape == (10, 2, 4, 16, 16)
    assert (task.classes, task.size) == (10, 16)
    with tarfile.open(files[1]) as tar:
        data = [tar.extractfile(f"package/img/twitter/64/{code.lower()}.png").read() for code in CODES]  # type: ignore[union-attr]
    theirs = [Image.open(io.BytesIO(d)).resize((16, 16), Image.Resampling.BOX) for d in data]
    expected = {tv.pil_to_tensor(image).numpy().tobytes() for image in theirs}
    assert {(255 * image).round().byte().numpy().tobytes() for image in task.images[:, 1]} == expected
    fewer = example.read_emoji(files, classes=4, size=16)
    assert torch.equal(fewer.images, task.images[:4])
    with pytest.raises(SystemExit, match="10 emoji in common; give --classes 10 or less"):
        example.read_emoji(files, classes=11)


def test_a_batch_is_a_function_of_its_position_and_no_image_comes_twice(example: ModuleType) -> None:
    task = example.EndlessEmoji(torch.rand(10, 2, 4, 16, 16))
    first, again, other = (task.batch(64, seed, "train", 5) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert first.images.shape == (64, 3, 16, 16)
    assert not torch.equal(first.labels, other.labels)
    batches = list(task.batches(4, 64, 0, "train"))
    assert set(torch.cat([b.labels for b in batches]).tolist()) == set(range(10))
    assert len(torch.cat([b.images for b in batches]).unique(dim=0)) == 256


def test_the_emoji_are_moved_as_torchvision_moves_them(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every random value at 3/4: rotated by 40.5 degrees, 1/1.9 of the size, shifted."""
    image = torch.rand(1, 4, 32, 32)
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.75))
    monkeypatch.setattr(torch, "randint", lambda high, shape, generator: torch.ones(shape, dtype=torch.int64))
    moved = example._moved(image, torch.Generator())
    angle, scale = 0.9 * math.pi / 4, 1.9
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    shift = 0.25 * 16  # pixels of the source
    back = [-(cos * shift + sin * shift), -(-sin * shift + cos * shift)]
    expected = tv.affine(
        image, -math.degrees(angle), back, 1 / scale, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR
    )
    assert torch.allclose(moved, expected, atol=1e-4)


def test_the_label_is_that_of_the_emoji_in_front(example: ModuleType) -> None:
    """Plain red and plain blue, both also in backgrounds: the mean colour of each class."""
    images = torch.zeros(2, 1, 4, 16, 16)
    images[0, :, 0], images[1, :, 2], images[:, :, 3] = 1, 1, 1
    batch = example.EndlessEmoji(images).batch(256, "colours")
    redness = (batch.images[:, 0] - batch.images[:, 2]).mean((1, 2))
    assert redness[batch.labels == 0].mean() > 0.5
    assert redness[batch.labels == 1].mean() < -0.5
