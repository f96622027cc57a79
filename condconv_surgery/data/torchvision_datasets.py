"""torchvision's classification data sets by name: ``data="torchvision:cifar10"``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from PIL import Image

from condconv_surgery.data.labelled_images import Rows
from condconv_surgery.errors import InputError, one_line, unknown_name

Part = dict[str, Any]
BY_FLAG: tuple[Part, Part] = ({"train": True}, {"train": False})
BY_TEST: tuple[Part, Part] = ({"split": "train"}, {"split": "test"})
BY_VAL: tuple[Part, Part] = ({"split": "train"}, {"split": "val"})
WHOLE: tuple[Part, ...] = ({},)

SETS: dict[str, tuple[str, tuple[Part, ...]]] = {
    "caltech101": ("Caltech101", WHOLE),
    "caltech256": ("Caltech256", WHOLE),
    "cifar10": ("CIFAR10", BY_FLAG),
    "cifar100": ("CIFAR100", BY_FLAG),
    "clevr": ("CLEVRClassification", BY_VAL),
    "country211": ("Country211", ({"split": "train"}, {"split": "valid"})),
    "dtd": ("DTD", BY_VAL),
    "emnist": ("EMNIST", ({"split": "balanced", "train": True}, {"split": "balanced", "train": False})),
    "eurosat": ("EuroSAT", WHOLE),
    "fakedata": ("FakeData", WHOLE),
    "fashionmnist": ("FashionMNIST", BY_FLAG),
    "fgvcaircraft": ("FGVCAircraft", BY_VAL),
    "flowers102": ("Flowers102", BY_VAL),
    "food101": ("Food101", BY_TEST),
    "gtsrb": ("GTSRB", BY_TEST),
    "imagenet": ("ImageNet", BY_VAL),
    "imagenette": ("Imagenette", BY_VAL),
    "kmnist": ("KMNIST", BY_FLAG),
    "mnist": ("MNIST", BY_FLAG),
    "oxfordiiitpet": ("OxfordIIITPet", ({"split": "trainval"}, {"split": "test"})),
    "pcam": ("PCAM", BY_VAL),
    "places365": ("Places365", ({"split": "train-standard"}, {"split": "val"})),
    "qmnist": ("QMNIST", ({"what": "train"}, {"what": "test"})),
    "renderedsst2": ("RenderedSST2", BY_VAL),
    "semeion": ("SEMEION", WHOLE),
    "stl10": ("STL10", BY_TEST),
    "sun397": ("SUN397", WHOLE),
    "svhn": ("SVHN", BY_TEST),
    "usps": ("USPS", BY_FLAG),
}
"""Class in torchvision.datasets, and its arguments for the training and the validation images."""

OTHER_TASKS = {
    "celeba": "many labels per image",
    "cocodetection": "boxes",
    "kitti": "boxes",
    "vocdetection": "boxes",
    "vocsegmentation": "masks",
    "cityscapes": "masks",
    "widerface": "boxes",
}


@dataclass(frozen=True)
class TorchvisionImages(Rows):
    """Some images of a torchvision data set; ``data`` is the ``VisionDataset``."""

    def open(self, index: int) -> Image.Image:
        image: Image.Image = self.data[self.indices[index]][0]
        return image


def find_torchvision(name: str, root: Path, download: bool) -> dict[str, TorchvisionImages]:
    """The images of ``torchvision:NAME`` by part: ``train``, and ``val`` or ``test`` where the set has one.

    Stored in or downloaded to ``root``. Raises ``InputError`` for an unknown name, another task, missing files.
    """
    require_known(name)
    title, parts = SETS[name.lower()]
    found = [_images(title, root, part, download) for part in parts]
    return {"train": found[0]} if len(found) == 1 else {"train": found[0], second_part(name): found[1]}


def second_part(name: str) -> str:
    """``val`` or ``test``: what the second part of a data set is called."""
    parts = SETS[name.lower()][1]
    return "val" if str(parts[-1].get("split", "")).startswith("val") else "test"


def require_known(name: str) -> None:
    """Raise ``InputError`` unless the name is one of torchvision's classification data sets."""
    if name.lower() in OTHER_TASKS:
        raise InputError(
            f"torchvision:{name} has {OTHER_TASKS[name.lower()]}.",
            "finetune trains classifiers with one label per image.",
            "your own loop with the functions of condconv_surgery.training",
        )
    if name.lower() not in SETS:
        raise unknown_name("data set of torchvision", name.lower(), SETS, 'data="torchvision:cifar10"')


def _images(title: str, root: Path, part: Part, download: bool) -> TorchvisionImages:
    cls = getattr(torchvision.datasets, title)
    taken = inspect.signature(cls).parameters
    where = {"root": root} if "root" in taken else {}
    how = {"download": True} if download and ("download" in taken or title in ("EMNIST", "QMNIST")) else {}
    try:
        data = cls(**where, **part, **how)
    except Exception as error:  # of damaged files, whatever their readers raise
        why = str(error).strip().rstrip(".") or one_line(error)
        raise InputError(
            f"torchvision's {title} can't be read from {root}: {why}.",
            "Its files must be stored as torchvision downloads them.",
            'data.root="FOLDER" with these files' if download else 'data.download=True, or data.root="FOLDER"',
        ) from error
    labels = _labels(data)
    return TorchvisionImages(title, data, _classes(data, labels), labels, tuple(range(len(labels))))


def _labels(data: Any) -> tuple[int, ...]:
    """From the attributes of torchvision's classes; else by reading all images once."""
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(data, attribute, None)
        if found is not None and len(found) == len(data):
            rows = getattr(found, "ndim", 1) == 2  # QMNIST: [N, 8], the class and where the digit comes from
            return tuple(int(label[0] if rows else label) for label in found)
    samples = getattr(data, "_samples", None)
    if samples is not None:
        return tuple(int(label) for _, label in samples)
    return tuple(int(data[index][1]) for index in range(len(data)))


def _classes(data: Any, labels: tuple[int, ...]) -> tuple[str, ...]:
    for attribute in ("classes", "categories"):
        found = getattr(data, attribute, None)
        if found:  # ImageNet has several words for a class
            return tuple(name if isinstance(name, str) else ", ".join(name) for name in found)
    return tuple(str(label) for label in range(max(labels) + 1))
