"""Write 3,812 emoji as an image folder of 9 classes: EMOJI/train/CLASS/*.png and EMOJI/val/CLASS/*.png.

The images come from npm, as two packages of two vendors:

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python examples/emoji.py emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz EMOJI

A quarter of the emoji is for validation: both vendors' images of each, because they look alike.
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image


def write_emoji(package: Path, folder: Path) -> int:
    """Unpack the images of one vendor; returns their number."""
    vendor = package.name.split("-")[2]
    written = 0
    with tarfile.open(package) as tar:
        for row in json.load(tar.extractfile("package/emoji.json")):
            if row["category"] == "Component" or not row[f"has_img_{vendor}"]:
                continue
            data = tar.extractfile(f"package/img/{vendor}/64/{row['image']}").read()
            path = folder / part_of(row["unified"]) / class_of(row["category"]) / f"{row['unified']}-{vendor}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            on_white(data).save(path)
            written += 1
    return written


def part_of(unified: str) -> str:
    """``"train"`` or ``"val"``, equal for both vendors and on every machine."""
    return "val" if hashlib.sha256(unified.encode()).digest()[0] % 4 == 0 else "train"


def class_of(category: str) -> str:
    return category.lower().replace(" & ", "-and-").replace(" ", "-")


def on_white(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


if __name__ == "__main__":
    *packages, target = map(Path, sys.argv[1:])
    if not packages:
        sys.exit(__doc__)
    print(f"Wrote {sum(write_emoji(package, target) for package in packages)} images to {target}")
