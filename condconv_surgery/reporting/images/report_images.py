"""The labelled images on which routing is measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from condconv_surgery.data.decode_image import UnreadableImageError
from condconv_surgery.data.evaluation_images import find_evaluation_images, is_run
from condconv_surgery.data.find_data import is_folder, source_of
from condconv_surgery.data.folder_layout import find_parts_of
from condconv_surgery.data.image_folders import ImageFiles, images_at_any_depth
from condconv_surgery.data.labelled_images import LabelledImages, even_subset, logit_of_each_class
from condconv_surgery.data.walk_images import images_below, loose_images, visible_folders
from condconv_surgery.errors import InputError
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import DataOptions


@dataclass
class ReportImages:
    """Labelled images, whether they come from a validation or test part, apart from training images, and where from.

    unreadable: names of images that could not be decoded. A pass over ``batches`` takes them out of ``images``.
    notes: what else was left out, in sentences.
    """

    images: LabelledImages
    held_out: bool = True
    where: str = ""
    unreadable: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the data."""
        return self.images.classes

    @property
    def files(self) -> tuple[str, ...]:
        """Path or name of each image."""
        return tuple(self.images.name(i) for i in range(len(self.images)))

    def batches(self, spec: InputSpec, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``images`` [B, C, H, W], preprocessed for the model, and ``labels`` [B]. Raises when none can be read."""
        transform, images, readable = EvaluationTransform(spec), self.images, list[int]()
        for start in range(0, len(images), size):
            read: list[Tensor] = []
            for i in range(start, min(start + size, len(images))):
                try:
                    read.append(transform(images.decode(i, spec.channels, transform.least)))
                except UnreadableImageError as error:
                    self.unreadable.append(f"{images.name(i)}: {error.reason}")
                    continue
                readable.append(i)
            if read:
                yield torch.stack(read), torch.tensor([images.labels[i] for i in readable[-len(read) :]])
        if not readable:
            raise InputError(f"No image can be read: {self.unreadable[0]}.", "", "other images")
        if len(readable) < len(images):
            self.images = images.subset(readable)


def find_images(source: str | Path, limit: int = 1000) -> ReportImages:
    """The validation images of what ``finetune`` reads as ``data``, or of a run; else the test images, else all.

    Of more than ``limit``, equally many of each class. Raises ``InputError`` for data without labelled images.
    """
    images, held_out, where = find_evaluation_images(DataOptions(folder=source_of(source)))
    return ReportImages(even_subset(images, limit), held_out, where)


def find_images_to_predict(source: str | Path, limit: int | None = None, classes: tuple[str, ...] = ()) -> ReportImages:
    """As ``find_images``; of a folder with images directly in it, all its images at any depth, with the label -1.

    classes: names of the model's logits. A folder whose own folders are classes of the model keeps its labels, and a
    note says how many images directly in it are left out.
    """
    options, folder, most = DataOptions(folder=source_of(source)), Path(source), sys.maxsize if limit is None else limit
    data_by_name = is_run(options.folder) or not is_folder(options) or not folder.is_dir()
    loose = [] if data_by_name else loose_images(folder)
    if not loose:
        return find_images(source, most)
    names = _folders_with_images(folder)
    if not names or logit_of_each_class(names, classes) is None:
        paths = images_at_any_depth(folder, most)
        files = tuple(str(path.relative_to(folder)) for path in paths)
        return ReportImages(ImageFiles(folder, (), files, (-1,) * len(files)), where=str(folder))
    were = "image was" if len(loose) == 1 else "images were"
    note = f"{len(loose)} {were} left out: directly in {folder}, beside its class folders."
    return replace(find_images(source, most), notes=(note,))


def _folders_with_images(folder: Path) -> tuple[str, ...]:
    """The folders that would be classes, of the part that would be measured, without empty ones."""
    try:
        parts = find_parts_of(folder)
        root = parts.val or parts.test or parts.train or folder
    except InputError:  # of a layout that can be read in two ways, which matters for labels only
        root = folder
    below, _ = images_below(root, visible_folders(root))
    return tuple(name for name, files in below.items() if files)
