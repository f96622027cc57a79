"""Reading images against torchvision's ``ImageFolder`` with v2 transforms: ``python -m benchmarks.images.data_speed``.

Both loaders do the same in one process, in turns: find a folder of many files; decode and transform images of several
sizes as training and evaluation do. Ratios of processor time, ours / torchvision's; at most 1.0 is the aim.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.timing import interleaved, use_clock
from condconv_surgery.data.image_dataset import Draw, ImageDataset
from condconv_surgery.data.image_folders import scan
from condconv_surgery.models.preprocess import EvaluationTransform
from condconv_surgery.recipe import InputSpec
from condconv_surgery.recipe.training_sections import AugmentOptions
from condconv_surgery.training.batches.augmentation import least_side, training_transform

SPEC = InputSpec()
SIZES = {"500x375": (500, 375), "2000x1500": (2000, 1500), "4000x3000": (4000, 3000)}
CLASSES = 100


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images.data_speed", description=__doc__)
    parser.add_argument("--files", type=int, default=200_000, help="files of the folder that is listed")
    parser.add_argument("--images", type=int, default=8, help="images of each size")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loader")
    options = parser.parse_args()
    torch.set_num_threads(1)
    use_clock("cpu")
    with tempfile.TemporaryDirectory() as folder:
        print(listing_line(Path(folder), options.files, options.rounds), flush=True)
        for name, size in SIZES.items():
            root = write_photos(Path(folder) / name, size, options.images)
            for part in ("train", "eval"):
                print(reading_line(root, name, part, options.rounds), flush=True)


def listing_line(folder: Path, files: int, rounds: int) -> str:
    """Seconds to list ``files`` empty files in ``CLASSES`` folders."""
    root = folder / "many"
    for label in range(CLASSES):
        (root / f"class{label:03}").mkdir(parents=True)
        for number in range(files // CLASSES):
            os.close(os.open(root / f"class{label:03}" / f"{number:06}.jpg", os.O_CREAT | os.O_WRONLY))
    times = interleaved({"ours": lambda: scan(root), "torchvision": lambda: ImageFolder(str(root))}, rounds)
    return f"listing {files} files      {_line(times, 1, 's')}"


def reading_line(root: Path, name: str, part: str, rounds: int) -> str:
    """Milliseconds an image: decoded and transformed for training or evaluation."""
    ours, theirs, fast = (
        ours_of(root, part),
        ImageFolder(str(root), torchvision_transform(part)),
        tensors_of(root, part),
    )
    count = len(theirs)
    times = interleaved(
        {
            "ours": lambda: [ours[Draw(0, index)] for index in range(count)],
            "torchvision": lambda: [theirs[index] for index in range(count)],
            "decode_image": lambda: [fast(index) for index in range(count)],
        },
        rounds,
    )
    return f"{name:>9} {part:5}           {_line(times, 1000 / count, 'ms')}"


def ours_of(root: Path, part: str) -> ImageDataset:
    """The data set that a run reads."""
    evaluation = EvaluationTransform(SPEC)
    transform = training_transform(SPEC, AugmentOptions()) if part == "train" else evaluation
    least = least_side(SPEC, AugmentOptions()) if part == "train" else evaluation.least
    return ImageDataset(scan(root), transform, least=least)


def torchvision_transform(part: str) -> v2.Transform:
    """The same steps by torchvision alone."""
    crop = AugmentOptions().crop
    geometry = [v2.RandomResizedCrop(SPEC.height, scale=crop, antialias=True), v2.RandomHorizontalFlip()]
    if part == "eval":
        geometry = [v2.Resize(round(SPEC.height / SPEC.crop_fraction), antialias=True), v2.CenterCrop(SPEC.height)]
    return v2.Compose(
        [*geometry, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(SPEC.mean, SPEC.std)]
    )


def tensors_of(root: Path, part: str) -> Callable[[int], torch.Tensor]:
    """The same by torchvision's own decoder, on tensors."""
    files, transform = ImageFolder(str(root)).samples, torchvision_transform(part)
    return lambda index: transform(decode_image(files[index][0], ImageReadMode.RGB))


def write_photos(root: Path, size: tuple[int, int], count: int) -> Path:
    """JPEGs with smooth shapes and fine noise, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 255, (9, 12, 3)).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + rng.integers(-16, 17, smooth.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
        path = root / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)
    return root


def _line(times: dict[str, list[float]], factor: float, unit: str) -> str:
    medians = {name: statistics.median(own) for name, own in times.items()}
    shown = ", ".join(f"{name} {factor * value:.3g} {unit}" for name, value in medians.items())
    return f"{shown}; ours / torchvision {medians['ours'] / medians['torchvision']:.2f}"


if __name__ == "__main__":
    main()
