"""Small image folders that a network can learn: the class is the colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from condconv_surgery.data.find_data import find_data
from condconv_surgery.data.image_folders import ImageFiles
from condconv_surgery.recipe.training_sections import DataOptions


def write_images(folder: Path, classes: int = 3, each: int = 7, side: int = 24) -> Path:
    """``classes`` folders of ``each`` noisy images, the class's colour channel brighter."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = rng.integers(0, 120, (side, side, 3)).astype("uint8")
            pixels[..., label % 3] += 100 + label // 3 * 20
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i:02}.png")
    return folder


def find_training_images(folder: Path, val_fraction: float = 0.2, seed: int = 0) -> tuple[ImageFiles, ImageFiles]:
    """The training and the validation images that a run finds in a folder."""
    train, val = find_data(DataOptions(folder=str(folder), val_fraction=val_fraction), seed)
    assert isinstance(train, ImageFiles)
    assert isinstance(val, ImageFiles)
    return train, val
