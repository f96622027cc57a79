"""Hugging Face data sets, by a path on this machine or a name on the hub: ``data="hf:PATH_OR_NAME"``."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from condconv_surgery.data.decode_image import open_bytes
from condconv_surgery.data.folder_layout import role_of
from condconv_surgery.data.labelled_images import Rows
from condconv_surgery.errors import InputError, one_line
from condconv_surgery.recipe.training_sections import DataOptions


@dataclass(frozen=True)
class HubImages(Rows):
    """Rows of a ``datasets.Dataset`` whose images, in ``column``, this package decodes."""

    column: str

    def key(self, index: int) -> str:
        return str(self.indices[index])

    def open(self, index: int) -> Image.Image:
        return open_cell(self.data[self.indices[index]][self.column])


def hub_images(rows: Any, title: str, options: DataOptions) -> HubImages:
    """The images of a split. Raises ``InputError`` for columns that a classifier cannot be trained on."""
    image, label = columns(rows.features, title, options)
    raw = list(rows[label])
    names = getattr(rows.features[label], "names", None)
    if any(value is None or value == -1 for value in raw):
        raise InputError(f"{title} has images without a label.", "Each needs one.", "filter the data set first")
    classes = tuple(names) if names else tuple(map(str, sorted(set(raw))))
    numbers = {name: i for i, name in enumerate(classes)}
    labels = tuple(map(int, raw)) if names else tuple(numbers[str(value)] for value in raw)
    return HubImages(title, undecoded(rows, image), classes, labels, tuple(range(len(labels))), image)


def load_splits(options: DataOptions, streaming: bool) -> dict[str, Any]:
    """Every split by name, as the ``datasets`` library returns it. Raises ``InputError``."""
    datasets = require_datasets()
    place, config = place_of(options.folder)
    path = Path(place)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(place)
            if streaming:
                loaded = {n: d.to_iterable_dataset() for n, d in _by_name(loaded).items()}
        elif path.is_file():
            loaded = datasets.load_dataset(str(path.parent.absolute()), data_files=path.name, streaming=streaming)
        else:  # absolute: a folder may be called like a format, parquet
            where = str(path.absolute()) if path.exists() else place
            loaded = datasets.load_dataset(where, config or None, streaming=streaming)
    except Exception as error:  # its readers have no base class in common
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            raise InputError(
                f"hf:{place} can't be stored: {error}.",
                f"The datasets library keeps what it reads in {datasets.config.HF_DATASETS_CACHE}.",
                "HF_DATASETS_CACHE=FOLDER in the environment",
            ) from error
        raise InputError(
            f"hf:{place} can't be read: {one_line(error).rstrip('.')}.",
            "It is what the datasets library reads (save_to_disk, parquet, imagefolder) or a name on the hub.",
            'data="hf:FOLDER", or data="hf:NAME#CONFIG"',
        ) from error
    return _by_name(loaded)


def place_of(source: str) -> tuple[str, str]:
    """The path or the name in ``hf:PATH_OR_NAME#CONFIG``, and the configuration. A path may contain ``#``.

    Raises ``InputError`` when there is neither.
    """
    name = source.partition(":")[2]
    if not name:
        raise InputError(
            f'data="{source}" names no data set.',
            "A path or a name follows hf:.",
            'data="hf:FOLDER", or data="hf:NAME"',
        )
    place, _, config = name.partition("#")
    return (name, "") if Path(name).exists() else (place, config)


def require_datasets() -> Any:
    """The ``datasets`` package. Raises ``InputError`` when it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "Hugging Face datasets is not installed.", 'data="hf:..." needs it.', 'pip install "condconv-surgery[data]"'
        ) from error
    return datasets


def split_names(names: list[str], options: DataOptions) -> dict[str, str]:
    """The name of the split of each part; a single split is the training part. Raises ``InputError``."""
    if len(names) == 1 and not options.val:
        return {"train": names[0]}
    parts: dict[str, str] = {}
    for name in names:
        role = role_of(name)
        if role in parts and not (role == "val" and options.val):
            raise InputError(
                f"{options.folder} has the splits {', '.join(names)}.",
                f"{parts[role]} and {name} both mean {role}.",
                f'data.val="{name}"' if role == "val" else "rename one",
            )
        if role:
            parts[role] = name
    others = [name for name in names if name != options.val]
    if "train" not in parts and options.val and len(others) == 1:
        parts["train"] = others[0]
    if "train" not in parts:
        raise InputError(
            f"{options.folder} has the splits {', '.join(names)}.",
            "One must be named train; of two splits the one that is not data.val is it.",
            f'data.val="{names[-1]}"' if len(names) == 2 else 'rename one: DatasetDict(train=rows["NAME"], ...)',
        )
    if options.val:
        if options.val not in names:
            raise InputError(
                f"{options.folder} has no split {options.val}.",
                f"It has: {', '.join(names)}.",
                f'data.val="{names[-1]}"',
            )
        parts = {role: name for role, name in parts.items() if name != options.val} | {"val": options.val}
    return parts


def columns(features: Any, title: str, options: DataOptions) -> tuple[str, str]:
    """The names of the image and the label column. Raises ``InputError`` where they are ambiguous or not supported."""
    datasets = require_datasets()
    names = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in (features or {}).items())
    images = [n for n, kind in (features or {}).items() if isinstance(kind, datasets.Image)]
    labels = [n for n, kind in (features or {}).items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [n for n in ("label", "labels", "fine_label", "class") if n in (features or {})]
    chosen = []
    for what, requested, candidates in (("image", options.image, images), ("label", options.label, labels)):
        if requested and requested not in (features or {}):
            raise InputError(f"{title} has no column {requested}.", f"It has: {names}.", f'data.{what}="COLUMN"')
        if not requested and len(candidates) != 1:
            raise InputError(
                f"{title} has {len(candidates)} columns that may be the {what}.",
                f"It has: {names}.",
                f'data.{what}="COLUMN"',
            )
        chosen.append(requested or candidates[0])
    _require_classes(features[chosen[1]], f"{title}: the column {chosen[1]}")
    return chosen[0], chosen[1]


def open_cell(cell: Any) -> Image.Image:
    """The image in an undecoded cell, from its bytes, else its path. Raises ``FileNotFoundError`` for an empty cell."""
    if not cell or (cell.get("bytes") is None and not cell.get("path")):
        raise FileNotFoundError("no image in the row")
    return open_bytes(cell["bytes"]) if cell.get("bytes") is not None else Image.open(cell["path"])


def undecoded(rows: Any, column: str) -> Any:
    """``rows`` with images as bytes."""
    return rows.cast_column(column, require_datasets().Image(decode=False))


def _require_classes(kind: Any, where: str) -> None:
    """Raise ``InputError`` for columns of other tasks: many labels per image, regression."""
    if getattr(kind, "names", None):
        return
    dtype = str(getattr(kind, "dtype", type(kind).__name__))
    if dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        return
    task = "regression targets" if dtype.startswith(("float", "decimal")) else "many labels per image"
    raise InputError(
        f"{where} holds {task}: {kind}.",
        "finetune trains classifiers with one label per image.",
        'data.label="COLUMN", or your own loop with the functions of condconv_surgery.training',
    )


def _by_name(loaded: Any) -> dict[str, Any]:
    return dict(loaded) if hasattr(loaded, "items") else {"train": loaded}
