"""Decode one image, and say why where that is not possible."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from condconv_surgery.errors import InputError, one_line
from condconv_surgery.models.eight_bits import UnknownRangeError
from condconv_surgery.models.preprocess import to_channels

EMPTY = "empty"


class UnreadableImageError(InputError):
    """A file that is named like an image and cannot be decoded. ``reason``: a short phrase, equal for equal causes."""

    def __init__(self, given: str, allowed: str = "", fix: str = "", reason: str = "damaged") -> None:
        super().__init__(given, allowed, fix)
        self.reason = reason


def read_image(path: str | Path, channels: int = 3, least: int = 0) -> Image.Image:
    """The image in a file, in RGB (or grey for one channel). Raises ``UnreadableImageError``."""
    return decode_image(lambda: Image.open(path), channels, str(path), least)


def decode_image(
    open_image: Callable[[], Image.Image], channels: int = 3, name: str = "It", least: int = 0
) -> Image.Image:
    """The image that ``open_image()`` opens: upright, 8 bits, RGB (or grey for one channel), transparency on white.

    least: pixels of the shorter side that the caller needs; a JPEG may be decoded smaller then (``reduce_jpeg``).
    Raises ``UnreadableImageError`` where PIL cannot open it, finds it truncated, or warns of a decompression bomb.
    """
    try:
        with strict_pillow(), open_image() as image:
            reduce_jpeg(image, least)
            return to_channels(image, channels)
    except Exception as error:  # PIL's readers raise whatever the bytes lead them into
        reason, fix = diagnosis(error)
        raise UnreadableImageError(
            f"{name} is not a readable image: {reason} ({one_line(error)})", "", fix, reason
        ) from error


def open_bytes(content: bytes) -> Image.Image:
    """The image in the content of a file, not yet decoded. Passes on what PIL raises."""
    if not content:
        raise UnidentifiedImageError(EMPTY)
    return Image.open(io.BytesIO(content))


def reduce_jpeg(image: Image.Image, least: int) -> None:
    """Let a JPEG that is opened and not yet decoded be decoded at 1/2, 1/4 or 1/8 of its size, if ``least`` is not 0.

    Its shorter side stays at least ``least`` pixels. The decoder then skips the high frequencies of each block, which a
    resize would remove, and takes a fraction of the time.
    """
    if least and isinstance(image, JpegImageFile):
        image.draft(None, (least, least))


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Inside, PIL raises for decompression bombs and keeps quiet about metadata. The warning filters are global."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        yield


def diagnosis(error: Exception) -> tuple[str, str]:
    """Why an image cannot be read, as a phrase that is equal for equal causes, and what to do."""
    if isinstance(error, UnknownRangeError):
        return error.given, "save it with 8 or 16 bits"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return f"more than {most} megapixels", "make it smaller, or set PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, PermissionError):
        return "no permission to read it", "chmod u+r FILE"
    if isinstance(error, FileNotFoundError):
        return "missing", "restore or remove it"
    if isinstance(error, UnidentifiedImageError):
        return (EMPTY if _is_empty(error) else "not an image of a known format"), "remove or replace it"
    if isinstance(error, MemoryError):
        return "not enough memory", "make it smaller"
    if "truncated" in str(error) or "unrecognized data stream contents" in str(error):
        return "truncated", "replace or remove it"
    return "damaged", "replace or remove it"


def _is_empty(error: UnidentifiedImageError) -> bool:
    if str(error) == EMPTY:
        return True
    name = str(error).partition("'")[2].rpartition("'")[0]
    return bool(name) and Path(name).is_file() and Path(name).stat().st_size == 0
