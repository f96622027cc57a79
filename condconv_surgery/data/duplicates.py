"""Equal and nearly equal images: by a hash of the decoded image, and by the distance of small copies.

Two images are nearly equal where their copies of 16x16 pixels differ by less than ``NEAR`` levels (root mean square)
and by less than a tenth of their contrast: the same photo in another size, format or quality. Images without contrast
are compared exactly only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from condconv_surgery.data.decode_image import UnreadableImageError
from condconv_surgery.data.labelled_images import LabelledImages

SIDE = 16
NEAR = 4.0  # levels of 255
CONTRAST = 0.1
BLOCK = 512
CHECKED_SIDE = 512  # shorter side to which a large JPEG may be decoded: much more than ``SIDE``

Copy = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Looks:
    """The hash of an image's pixels, and its small copy, [SIDE * SIDE * 3]."""

    digest: bytes
    copy: Copy


def looks_of(image: Image.Image) -> Looks:
    """The hash and the small copy of an upright RGB image."""
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return Looks(digest, np.asarray(small, dtype=np.float32).ravel())


def duplicates(one: Sequence[Looks], other: Sequence[Looks]) -> tuple[set[int], set[int]]:
    """Indices in ``other`` of images that are equal to one in ``one``, and of those that are nearly equal to one."""
    digests = {looks.digest for looks in one}
    equal = {index for index, looks in enumerate(other) if looks.digest in digests}
    return equal, {j for _, j in near_pairs(one, other)} - equal


def near_pairs(one: Sequence[Looks], other: Sequence[Looks]) -> Iterator[tuple[int, int]]:
    """Indices of each nearly equal pair of two lists. Only images of nearly equal mean are compared."""
    if not one or not other:
        return
    a, b = (np.stack([looks.copy for looks in which]).astype(np.float64) for which in (one, other))
    order = np.argsort(b.mean(1))
    b = b[order]
    means, limits = b.mean(1), np.minimum(NEAR, CONTRAST * b.std(1))
    rows = np.argsort(a.mean(1))
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        x = a[block]
        low, high = np.searchsorted(means, [x.mean(1).min() - NEAR, x.mean(1).max() + NEAR])
        y = b[low:high]
        squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
        distance = np.sqrt(np.maximum(squares, 0) / x.shape[1])
        for i, j in np.argwhere((distance <= limits[low:high]) & (limits[low:high] > 0.05)):
            yield int(block[i]), int(order[low + j])


def duplicate_groups(images: LabelledImages) -> list[int]:
    """A number for each image, equal for equal and nearly equal ones. Unreadable images are groups of one."""
    group, first_with, unique, where = list(range(len(images))), dict[bytes, int](), list[Looks](), list[int]()
    for index in range(len(images)):
        try:
            looks = looks_of(images.decode(index, least=CHECKED_SIDE))
        except UnreadableImageError:
            continue
        group[index] = first_with.setdefault(looks.digest, index)
        if group[index] == index:
            unique.append(looks)
            where.append(index)

    def first(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    for i, j in near_pairs(unique, unique):
        one, other = sorted((first(where[i]), first(where[j])))
        group[other] = one
    return [first(index) for index in range(len(images))]
