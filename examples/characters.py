"""Write the 62 letters and digits in every font of a folder, 32 px: CHARACTERS/train/CLASS/*.png, val and test.

Each family of fonts is in one part, so test fonts are unseen. Some eighty Debian packages give as many as 60,000:

    mkdir fonts && cd fonts
    apt-get download fonts-aenigma fonts-dustin fonts-georgewilliams fonts-lato fonts-freefont-ttf  # ... any others
    for package in *.deb; do dpkg -x $package .; done
    cd .. && python examples/characters.py fonts CHARACTERS
"""

import argparse
import hashlib
import string
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.digits + string.ascii_letters
SIDE, PADDING = 32, 3


def write_characters(fonts: Path, folder: Path) -> int:
    """Returns the number of images. A font that lacks a character, or cannot be read, is left out."""
    files = sorted(path for path in fonts.rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
    written = 0
    for number, file in enumerate(files):
        images = list(drawn(file))
        for character, image in zip(CHARACTERS, images, strict=False):
            path = folder / part_of(file) / class_of(character) / f"{number:04d}-{file.stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        written += len(images)
    return written


def drawn(file: Path) -> Iterator[Image.Image]:
    """An image of each character, scaled so that the font's tallest one fits; nothing for an unusable font."""
    try:
        font = ImageFont.truetype(str(file), 64)
        boxes = [font.getbbox(character) for character in CHARACTERS]
    except OSError:
        return
    sizes = {(right - left, bottom - top) for left, top, right, bottom in boxes}
    missing = bytes(font.getmask("\uffff"))
    if len(sizes) < 10 or any(bytes(font.getmask(character)) in (b"", missing) for character in CHARACTERS):
        return
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    side = max(bottom - top, *(right - left for left, _, right, _ in boxes))
    for character, (left, _, right, _) in zip(CHARACTERS, boxes, strict=True):
        image = Image.new("L", (side, side), 255)
        ImageDraw.Draw(image).text(((side - right + left) / 2 - left, -top), character, fill=0, font=font)
        small = image.resize((SIDE - 2 * PADDING, SIDE - 2 * PADDING), Image.Resampling.LANCZOS)
        framed = Image.new("L", (SIDE, SIDE), 255)
        framed.paste(small, (PADDING, PADDING))
        yield framed


def part_of(file: Path) -> str:
    """``"train"`` for five eighths of the families, ``"val"`` for one, ``"test"`` for two."""
    family = file.stem.lower().split("-")[0][:5]  # Lato-Bold and LatoLatin-Thin are one family
    eighth = hashlib.sha256(family.encode()).digest()[0] % 8
    return {0: "test", 4: "test", 1: "val"}.get(eighth, "train")


def class_of(character: str) -> str:
    """A folder's name, also where file names ignore case."""
    return f"upper-{character}" if character.isupper() else character


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fonts", type=Path)
    parser.add_argument("folder", type=Path, metavar="CHARACTERS")
    given = parser.parse_args()
    print(f"Wrote {write_characters(given.fonts, given.folder)} images to {given.folder}")
