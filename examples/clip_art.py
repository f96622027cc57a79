"""Write some 3,000 images of Debian's clip art as an image folder: CLIPART/train/CLASS/*.png, val and test.

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb unpacked
    python examples/clip_art.py unpacked CLIPART

A class is a folder of the collection with at least 100 images, and has at most 400. Many come in series (``car_01``,
``car_02``), which look alike: at most five of a series are taken, and a series is in one part.
"""

import argparse
import hashlib
import re
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

SIDE = 64
FEWEST, MOST, OF_A_SERIES = 100, 400, 5
LARGEST = 20_000_000  # pixels: some of the collection have 600 million
WITHOUT_SUBJECT = {"special", "unsorted"}


def write_clip_art(unpacked: Path, folder: Path) -> int:
    """Returns the number of images."""
    written = 0
    for class_, images in chosen(unpacked / "usr" / "share" / "openclipart" / "png").items():
        for content, path in sorted(images.items())[:MOST] if len(images) >= FEWEST else []:
            target = folder / part_of(path) / class_ / f"{path.stem}-{content[:6]}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            on_white_square(path).save(target)
            written += 1
    return written


def chosen(collection: Path) -> dict[str, dict[str, Path]]:
    """The images of each class by a hash of their content. One that is there twice is taken once."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    taken: Counter[tuple[str, str]] = Counter()
    seen: set[str] = set()
    for path in sorted(path for path in collection.rglob("*.png") if not path.is_symlink()):
        class_, data = path.relative_to(collection).parts[0], path.read_bytes()
        content = hashlib.sha256(data).hexdigest()
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))  # of PNG's header
        if class_ in WITHOUT_SUBJECT or content in seen or width * height > LARGEST:
            continue
        seen.add(content)
        taken[class_, series_of(path)] += 1
        if taken[class_, series_of(path)] <= OF_A_SERIES:
            found[class_][content] = path
    return found


def on_white_square(path: Path) -> Image.Image:
    """The whole image, scaled to fit a white square of ``SIDE`` pixels."""
    image = Image.open(path).convert("RGBA")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return square.convert("RGB")


def part_of(path: Path) -> str:
    """``"train"`` for five eighths of the series, ``"val"`` for one, ``"test"`` for two."""
    eighth = hashlib.sha256(series_of(path).encode()).digest()[0] % 8
    return {0: "test", 4: "test", 1: "val"}.get(eighth, "train")


def series_of(path: Path) -> str:
    """The start of the name, without its numbers: images of one author and subject begin alike."""
    return re.sub(r"[^a-z]+", " ", path.stem.lower()).strip()[:8]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpacked", type=Path, help="where the package is unpacked")
    parser.add_argument("folder", type=Path, metavar="CLIPART")
    given = parser.parse_args()
    print(f"Wrote {write_clip_art(given.unpacked, given.folder)} images to {given.folder}")
