"""Which files below a folder are images: hidden entries are skipped, each real folder is walked once, content decides.

A file with a usual image suffix is an image (a damaged one is reported when it is read, not left out). Others are
images if their first bytes say so. What is not read is counted by reason.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.toml_text import RECIPE

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff", ".ppm"),
    *(".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".pcx"),
)
_SUFFIXES = frozenset(SUFFIXES)
HEIC = (".heic", ".heif", ".hif")
RAW = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".kdc", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw"),
    *(".rw2", ".sr2", ".srw", ".x3f"),
)
NOT_IMAGES = (
    *(".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".md", ".html", ".py", ".db"),
    *(".ini", ".log", ".npy", ".npz"),
)
KNOWN_BY_CONTENT = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "MPO", "HEIF")
ALIEN_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")
RUN_FILES = (RECIPE, "metrics.jsonl", "state.safetensors")
RUN_LOCK = "run.lock"  # of a run that has just begun


def is_hidden(name: str) -> bool:
    """Entries that a file manager does not show, or that another program has left: ``.cache``, ``__MACOSX``."""
    return name.startswith(".") or name in ALIEN_FOLDERS


def visible_folders(root: Path) -> list[str]:
    """Names of the folders directly in ``root``, sorted, without hidden ones and without folders of runs."""
    found = [entry for entry in entries_of(root) if not is_hidden(entry.name) and entry.is_dir()]
    return sorted(entry.name for entry in found if not _is_run(Path(entry.path)))


def images_below(root: Path, names: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, Counter[str]]]:
    """The images of each of the folders ``names`` in ``root`` at any depth, by path from ``root``, and what is skipped.

    A link to a folder is followed unless it leads to ``root``, into it or above it, or to a folder read before.
    """
    walk = _Walk(root)
    skipped = {name: Counter[str]() for name in names}
    entered = [name for name in skipped if walk.enters(root / name, False, skipped[name])]  # before what is in them
    return {name: sorted(walk.files(name, skipped[name])) if name in entered else [] for name in skipped}, skipped


def loose_images(root: Path) -> list[str]:
    """Names of the images directly in ``root``, sorted."""
    files = (entry for entry in entries_of(root) if not is_hidden(entry.name) and not entry.is_dir())
    return sorted(entry.name for entry in files if why_no_image(entry) is None)


def why_no_image(entry: os.DirEntry[str]) -> str | None:
    """``None`` for an image, else the reason to skip the file."""
    path = Path(entry.path)
    if not entry.is_file() and path.exists():
        return "not a regular file"  # a named pipe: reading it would wait for ever
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return None
    if suffix in HEIC and not _reads_heic():
        return f"{suffix} needs pillow-heif"
    if suffix in RAW:
        return f"camera raw ({suffix})"
    if suffix in HEIC or (suffix not in NOT_IMAGES and _is_image_by_content(path)):
        return None
    return f"not an image ({suffix or 'no suffix'})"


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder. Raises ``InputError`` where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be read: {error.strerror}.",
            "Its folders must be readable.",
            f"chmod -R u+rX {shlex.quote(str(folder))}",
        ) from error


class _Walk:
    def __init__(self, root: Path) -> None:
        self.root, self.real = root, os.path.realpath(root)
        self.linked = set[str]()  # real paths of folders that links lead to, and of those in them

    def files(self, name: str, skipped: Counter[str]) -> list[str]:
        """Images at any depth of a folder in the root, by path from the root."""
        found: list[str] = []
        waiting = [(name, (self.root / name).is_symlink())]
        while waiting:
            relative, outside = waiting.pop()
            for entry in entries_of(self.root / relative):
                base = entry.name
                below = f"{relative}{os.sep}{base}"
                if base[0] != "." and base[base.rfind(".") :].lower() in _SUFFIXES and entry.is_file():
                    found.append(below)  # most entries, by the fewest calls: there may be millions
                elif is_hidden(base):
                    skipped["hidden"] += 1
                elif entry.is_dir():
                    if self.enters(Path(entry.path), outside, skipped):
                        waiting.append((below, outside or entry.is_symlink()))
                elif reason := why_no_image(entry):
                    skipped[reason] += 1
                else:
                    found.append(below)
        return found

    def enters(self, folder: Path, outside: bool, skipped: Counter[str]) -> bool:
        """Is the folder to be walked here? Folders that a link leads to are remembered."""
        if not outside and not folder.is_symlink():
            return True
        target = os.path.realpath(folder)
        inside = (target + os.sep).startswith(self.real + os.sep)
        above = (self.real + os.sep).startswith(target.rstrip(os.sep) + os.sep)
        if inside or above or target in self.linked:
            skipped["link to a folder that is read already"] += 1
            return False
        self.linked.add(target)
        return True


def _is_image_by_content(path: Path) -> bool:
    try:
        with Image.open(path, formats=_content_formats()):
            return True
    except Image.DecompressionBombError:
        return True
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return False


@cache
def _content_formats() -> tuple[str, ...]:
    _reads_heic()
    Image.init()
    return tuple(name for name in KNOWN_BY_CONTENT if name in Image.OPEN)


@cache
def _reads_heic() -> bool:
    """Is pillow-heif installed? It is registered with Pillow then."""
    if find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def _is_run(folder: Path) -> bool:
    return (folder / RUN_LOCK).is_file() or sum((folder / name).is_file() for name in RUN_FILES) > 1
