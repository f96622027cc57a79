"""Write scikit-learn's 1,797 handwritten digits as an image folder: DIGITS/0/0000.png ... DIGITS/9/1796.png.

With --parts the same images as DIGITS/train, DIGITS/val and DIGITS/test: half of them, and a quarter each; with
--parts 0.1 a tenth for validation, and the rest for the test. The half is the same.
"""

import argparse
import random
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def write_digits(folder: Path, val: float | None = None) -> int:
    """All images, or with ``val``, the share of validation images, in three parts."""
    digits = load_digits()
    count = len(digits.images)
    place = random.Random(0).sample(range(count), count)  # its place in a random order decides the part of an image
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "train" if place[index] < count // 2 else "val" if place[index] < (0.5 + (val or 0)) * count else "test"
        path = (folder / part if val else folder) / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype("uint8")).convert("RGB")
        image.resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIGITS")
    parser.add_argument("--parts", type=float, nargs="?", const=0.25, metavar="VAL")
    given = parser.parse_args()
    print(f"Wrote {write_digits(given.folder, given.parts)} images to {given.folder}")
