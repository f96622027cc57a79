"""What the trainer adds to a bare PyTorch loop: ``python -m benchmarks.training [--data FOLDER]``.

Both loops take turns, a few steps each, on copies of one model; the time is that of this process's CPU, so that other
programs disturb it little. The bare loop is the shortest that trains: ImageFolder, torchvision transforms, forward,
cross-entropy, backward, AdamW, ``loss.item()``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from condconv_surgery.recipe import InputSpec, TrainingOptions
from condconv_surgery.training.distributed import World
from condconv_surgery.training.learner import Learner
from condconv_surgery.training.loading import open_data

SIDE, BATCH = 64, 32
SPEC = InputSpec(height=SIDE, width=SIDE)


def main() -> None:
    """Print the ratio of the trainer's time to the bare loop's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="FOLDER/CLASS/*.png; without it noise is written and read")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.data or _noise(Path(temporary))
        model = torchvision.models.mobilenet_v2(num_classes=len(ImageFolder(folder).classes))
        ours, bare = trainer(copy.deepcopy(model), folder), bare_loop(copy.deepcopy(model), folder)
        ratios = [_seconds(ours) / _seconds(bare) for _ in range(arguments.rounds + 2)][2:]  # two to warm up
    print(f"trainer / bare loop: {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")
    print(f"MobileNetV2 {SIDE} px, batch {BATCH}, torch {torch.__version__}, one thread, reading included")


def trainer(model: nn.Module, folder: Path) -> Callable[[], object]:
    """A function that takes one step of the trainer."""
    options = TrainingOptions().updated(
        {"data": {"folder": str(folder), "batch_size": BATCH, "workers": 0}, "schedule": {"epochs": 1000}}
    )
    data = open_data(options, SPEC, World())
    learner = Learner(model, options, World(), data.train.counts(), {})
    batches, steps = data.batches_from(0), iter(range(10**9))
    return lambda: learner.step([next(batches)], next(steps), data.order.steps)


def bare_loop(model: nn.Module, folder: Path) -> Callable[[], object]:
    """A function that takes one step of the bare loop."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop((SIDE, SIDE), scale=(0.35, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    loader = DataLoader(ImageFolder(folder, transform), BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.train().parameters())
    batches = _endless(loader)

    def step() -> float:
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _endless(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _seconds(step: Callable[[], object], count: int = 4) -> float:
    began = time.process_time()
    for _ in range(count):
        step()
    return time.process_time() - began


def _noise(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for label in range(4):
        (folder / f"class{label}").mkdir()
        for i in range(80):
            pixels = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
            torchvision.io.write_png(pixels, str(folder / f"class{label}" / f"{i}.png"))
    return folder


if __name__ == "__main__":
    main()
