"""Small image folders that a network can learn: the class is the colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


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
