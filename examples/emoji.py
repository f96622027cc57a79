"""Write 3,812 emoji as an image folder of 9 classes: EMOJI/train/CLASS/*.png and EMOJI/val/CLASS/*.png.

With ``--parts`` there is EMOJI/test too, for ``condconv compare``.

The images come from npm, as two packages of two vendors:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python examples/emoji.py [--parts] emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz EMOJI

A quarter of the emoji is for validation: both vendors' images of each, because they look alike. With ``--parts`` that
quarter is for the test, and an eighth for validation.
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image


def write_emoji(package: Path, folder: Path, parts: bool = False) -> int:
    """Unpack the images of one vendor; returns their number. parts: write a test part too."""
    vendor = package.name.split("-")[2]
    written = 0
    with tarfile.open(package) as tar:
        for row in json.load(tar.extractfile("package/emoji.json")):
            if row["category"] == "Component" or not row[f"has_img_{vendor}"]:
                continue
            data = tar.extractfile(f"package/img/{vendor}/64/{row['image']}").read()
            part, name = part_of(row["unified"], parts), f"{row['unified']}-{vendor}.png"
            path = folder / part / class_of(row["category"]) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            on_white(data).save(path)
            written += 1
    return written


def part_of(unified: str, parts: bool = False) -> str:
    """``"train"`` or ``"val"``, with parts or ``"test"``; equal for both vendors and on every machine."""
    eighth = hashlib.sha256(unified.encode()).digest()[0] % 8
    if not parts:
        return "val" if eighth in (0, 4) else "train"
    return {0: "test", 4: "test", 1: "val"}.get(eighth, "train")


def class_of(category: str) -> str:
    return category.lower().replace(" & ", "-and-").replace(" ", "-")


def on_white(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


if __name__ == "__main__":
    parts = "--parts" in sys.argv
    *packages, target = (Path(argument) for argument in sys.argv[1:] if argument != "--parts")
    if not packages:
        sys.exit(__doc__)
    print(f"Wrote {sum(write_emoji(package, target, parts) for package in packages)} images to {target}")
