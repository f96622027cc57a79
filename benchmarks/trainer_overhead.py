"""Overhead of the trainer over a bare PyTorch loop: ``python -m benchmarks.trainer_overhead [--data FOLDER]``.

The trainer is a whole run of ``condconv finetune``: loader, schedule, gradient clipping, progress lines, and its files
after each epoch and at the default interval. The bare loop is the shortest one that trains: ImageFolder, torchvision
transforms, a DataLoader with as many workers, forward, cross-entropy, backward, AdamW, ``loss.item()``; it saves
nothing. Neither validates. They run in turns on copies of one model, in alternating order, and each is timed by wall
clock and by the processor time of this process and of the loop's own workers.

On a machine with other load only the processor time of one thread is meaningful.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.turns import Loop, Turn, busy_cores, take_turns
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import InputSpec, TrainingOptions
from condconv_surgery.training import Tally, fit_heads
from condconv_surgery.training.batches.loaders import input_spec
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.monitor.progress_display import console_display
from condconv_surgery.training.run import Run
from condconv_surgery.training.state.stop_signals import StopRequest


def main(arguments: list[str] | None = None) -> None:
    """Print trainer time / bare loop time, and how many cores each loop keeps busy."""
    chosen = _parser().parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.data or _noise(Path(temporary) / "noise", chosen.side)
        options = _options(folder, Path(temporary) / "run", chosen)
        model = load_model(chosen.model, weights=chosen.weights)
        spec = input_spec(model, options)
        fit_heads(model, tuple(ImageFolder(_train_folder(folder)).classes), spec)
        run = Run(copy.deepcopy(model), options, World(), StopRequest(), console_display())
        loops = {
            "trainer": Loop(trainer(run)),
            "bare": Loop(bare_loop(copy.deepcopy(model), folder, spec, options)),
        }
        turns = take_turns(loops, chosen.rounds, chosen.steps)
        busy = {name: busy_cores(loop, chosen.steps) for name, loop in loops.items()}
        run.close()
    _print(turns, busy, chosen)


def trainer(run: Run) -> Callable[[], object]:
    """A function that runs one step, and writes the files of an epoch at its end."""
    run.folder.mkdir(parents=True, exist_ok=True)  # as the lock of a run does
    run.begin()
    batches, order = run.data.batches_from(0), run.data.order

    def step() -> None:
        run.advance(batches)
        if run.progress.step % order.steps_per_epoch == 0:
            run.end_epoch(Tally.of(1.0, 1.0, 1.0))

    return step


def bare_loop(model: nn.Module, folder: Path, spec: InputSpec, options: TrainingOptions) -> Callable[[], object]:
    """A function that runs one step of the bare loop, with the same random transforms."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop((spec.height, spec.width), scale=options.augment.crop, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(spec.mean, spec.std),
        ]
    )
    data, workers = options.data, options.data.workers
    loader = DataLoader(
        ImageFolder(_train_folder(folder), transform),
        data.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer_overhead", description=__doc__)
    parser.add_argument("--data", type=Path, help="FOLDER/train/CLASS/*.png; default: generated noise images")
    parser.add_argument("--model", default="torchvision:mobilenet_v2", help="model, as for condconv finetune")
    parser.add_argument("--weights", default="none", help="weights of a model by name: default, none or a file")
    parser.add_argument("--side", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="data workers, in both loops")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument(
        "--rounds", type=int, default=20, help="turns of each loop; work done once per epoch shows only in their sum"
    )
    parser.add_argument("--steps", type=int, default=30, help="steps per turn")
    return parser


def _options(folder: Path, output: Path, chosen: argparse.Namespace) -> TrainingOptions:
    data = {"folder": str(folder), "image_size": chosen.side, "batch_size": chosen.batch_size}
    return TrainingOptions().updated(
        {
            "output": str(output),
            "data": {**data, "workers": chosen.workers},
            "schedule": {"epochs": 10**6},  # no end within the benchmark
        }
    )


def _print(turns: dict[str, list[Turn]], busy: dict[str, float], chosen: argparse.Namespace) -> None:
    for what, clock in (("wall clock", "wall"), ("processor time", "cpu")):
        ours, bare = ([getattr(turn, clock) for turn in turns[name]] for name in ("trainer", "bare"))
        ratios = [one / other for one, other in zip(ours, bare, strict=True)]
        print(
            f"trainer / bare loop, {what}: {sum(ours) / sum(bare):.3f} in all, {statistics.median(ratios):.3f} in the "
            f"median round (from {min(ratios):.3f} to {max(ratios):.3f})"
        )
    for name, share in busy.items():
        print(f"{name}: {share:.2f} of {os.cpu_count()} cores busy")
    print(
        f"{chosen.model} {chosen.side} px, batch {chosen.batch_size}, {chosen.workers} workers, "
        f"{chosen.threads} threads, {chosen.rounds} rounds of {chosen.steps} steps, torch {torch.__version__}"
    )


def _train_folder(folder: Path) -> Path:
    return folder / "train" if (folder / "train").is_dir() else folder


def _endless(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _noise(folder: Path, side: int) -> Path:
    generator = random.Random(0)
    for part, count in (("train", 160), ("val", 2)):
        for label in range(4):
            target = folder / part / f"class{label}"
            target.mkdir(parents=True)
            for i in range(count):
                Image.frombytes("RGB", (side, side), generator.randbytes(3 * side * side)).save(target / f"{i}.png")
    return folder


if __name__ == "__main__":
    main()
