"""Find the images that ``data`` names: a folder, shards, or a data set by name."""

from __future__ import annotations

from pathlib import Path

from condconv_surgery.data.hub_datasets import find_hub, require_datasets
from condconv_surgery.data.image_folders import find_training_images, require_folder, scan
from condconv_surgery.data.labelled_images import LabelledImages, split, with_classes_of
from condconv_surgery.data.torchvision_datasets import find_torchvision, require_known
from condconv_surgery.data.webdataset_shards import find_shards, scan_shards
from condconv_surgery.errors import InputError
from condconv_surgery.recipe.training_sections import DataOptions


def find_data(options: DataOptions, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The training and the validation images. Raises ``InputError`` for missing or unusable data."""
    source, val = options.folder, options.val
    kind, _, name = source.partition(":")
    if kind == "torchvision":
        return find_torchvision(name, Path(options.root), options.download, options.val_fraction, seed)
    if kind == "hf":
        return find_hub(options, seed)
    if is_shards(source):
        train = scan_shards(source)
        return (
            (train, with_classes_of(train, scan_shards(val), val)) if val else split(train, options.val_fraction, seed)
        )
    if not val:
        return find_training_images(Path(source), options.val_fraction, seed)
    require_folder(Path(source))
    require_folder(Path(val))
    folder = scan(Path(source))
    return folder, with_classes_of(folder, scan(Path(val), min_classes=1), val)


def require_data(options: DataOptions) -> None:
    """Check what can be checked before a model is loaded. Raises ``InputError``."""
    kind, _, name = options.folder.partition(":")
    if options.streaming and kind != "hf":
        raise InputError(
            f'data.streaming=True with data="{options.folder}".',
            "Only Hugging Face data sets are streamed.",
            'data="hf:NAME", or data.streaming=False',
        )
    if kind == "torchvision":
        require_known(name)
        if options.val:
            raise InputError(
                f'data.val="{options.val}" with data="{options.folder}".',
                "Data sets of torchvision have their own validation images, or are split.",
                'data.val=""',
            )
    elif kind == "hf":
        require_datasets()
    elif is_shards(options.folder):
        find_shards(options.folder)
        if options.val:
            find_shards(options.val)
    else:
        require_folder(Path(options.folder))


def is_shards(source: str) -> bool:
    """A file or pattern of tar files, not a folder."""
    return not Path(source).is_dir() and (".tar" in Path(source).name or "://" in source or source.startswith("pipe:"))
