"""Eight generated images of squares and discs with their labels, in the folders and files that Ultralytics reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("square", "disc")
COLORS = ((230, 60, 40), (40, 90, 230))


def write_shapes(folder: Path, images: int = 8, side: int = 96, task: str = "detect") -> Path:
    """Write ``images`` for training, which also serve for validation; returns the ``data=`` of ``YOLO.train``."""
    random = np.random.default_rng(0)
    for i in range(images):
        pixels = random.integers(90, 130, (side, side, 3), dtype=np.uint8)
        image, kind = Image.fromarray(pixels), i % len(CLASSES)
        size = int(random.integers(side // 3, side // 2))
        left, top = random.integers(2, side - size - 2, 2).tolist()
        draw = ImageDraw.Draw(image)
        (draw.rectangle, draw.ellipse)[kind]((left, top, left + size, top + size), fill=COLORS[kind])
        if task == "classify":
            for part in ("train", "val"):
                path = folder / part / CLASSES[kind] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
            continue
        for kind_of_file in ("images", "labels"):
            (folder / kind_of_file).mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text(f"{kind} {_label(left, top, size, side, task)}\n")
    if task == "classify":
        return folder
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    points = "kpt_shape: [2, 2]\nflip_idx: [0, 1]\n" if task == "pose" else ""
    data = folder / "shapes.yaml"
    data.write_text(f"path: {folder.resolve()}\ntrain: images\nval: images\n{points}names:\n{names}")
    return data


def _label(left: int, top: int, size: int, side: int, task: str) -> str:
    """Values as fractions of the side: centre and size, with two corners as keypoints; or the corners as a polygon."""
    low_x, low_y, high_x, high_y = (value / side for value in (left, top, left + size, top + size))
    box = [(low_x + high_x) / 2, (low_y + high_y) / 2, size / side, size / side]
    corners = [low_x, low_y, high_x, low_y, high_x, high_y, low_x, high_y]
    values = {"segment": corners, "pose": [*box, low_x, low_y, high_x, high_y]}.get(task, box)
    return " ".join(f"{value:.5f}" for value in values)
