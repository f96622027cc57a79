"""Images as they are shown: turned upright by their EXIF orientation, deep values scaled to 8 bits."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from condconv_surgery.errors import InputError

ORIENTATION, PHOTOMETRIC, BITS_PER_SAMPLE, SMALLEST_VALUE, LARGEST_VALUE = 274, 262, 258, 340, 341  # tags of TIFF
SIXTEEN_BITS_IN_32 = ("PNG", "PPM")  # Pillow has 16 bits of these formats in mode I


class UnknownRangeError(InputError):
    """Values whose black and white the file does not tell: floats, 32-bit integers, signed integers."""


def upright(image: Image.Image) -> Image.Image:
    """``image`` as a viewer shows it: its EXIF orientation is applied (and removed, so that it is applied once)."""
    load(image)  # the tag may come after the pixels
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def load(image: Image.Image) -> None:
    """Decode an opened image. (Pillow reads a turned TIFF wrongly from mapped memory, which it uses by file name.)"""
    if isinstance(image, TiffImageFile):
        image.filename = ""
    image.load()


def to_eight_bits(image: Image.Image) -> Image.Image:
    """``image`` with values of 0 to 255: 16 bits scaled by 65535, floats by the range that a TIFF file declares.

    Raises ``UnknownRangeError`` where the format does not define a range; a guess would make the image black or white.
    """
    if not is_deep(image):
        return image
    low, high = _range(image)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # white is zero; Pillow inverts 8 bits only
        low, high = high, low
    load(image)
    values = np.asarray(image)
    scaled = np.clip((values.astype(np.float64) - low) * (255 / (high - low)) + 0.5, 0, 255)
    grey = Image.fromarray(scaled.astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if "exif" in image.info:
        grey.info["exif"] = image.info["exif"]  # the orientation
    return grey


def is_deep(image: Image.Image) -> bool:
    """Does a value of the image have more than 8 bits?"""
    return image.mode.startswith("I") or image.mode == "F"


def _range(image: Image.Image) -> tuple[float, float]:
    """The values of black and white."""
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        return 0, 2**bits - 1
    if image.mode == "I" and image.format in SIXTEEN_BITS_IN_32:
        return 0, 65535
    if SMALLEST_VALUE in tags and LARGEST_VALUE in tags:
        low, high = (float(np.max(tags[tag])) for tag in (SMALLEST_VALUE, LARGEST_VALUE))
        if high > low:
            return low, high
    kind = "32-bit floats" if image.mode == "F" else "32-bit or signed integers"
    raise UnknownRangeError(
        f"{kind} of unknown range", "16-bit values, and TIFF files that declare their range, are scaled.", "save 8 bits"
    )
