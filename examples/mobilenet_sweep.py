"""Accuracy against multiply-adds of MobileNetV1: width multipliers times numbers of experts, as in CondConv's figure.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python examples/mobilenet_sweep.py emoji-datasource-*-16.0.0.tgz -o sweep

trains one static network per width on endless emoji of 32 px, then, for each seed, each number of experts from that
network on the same images; one expert is the static network, trained as many more steps. Run again, it continues after
the last finished point. It writes sweep/points.jsonl (a line per point), sweep/mobilenet-sweep.png and .svg. With
the C++ kernels (condconv --version) the defaults take an hour of one core.

The paper's experiment (ImageNet, 224 px, every point from random weights; use a GPU):

    python examples/mobilenet_sweep.py --imagenet FOLDER --scratch --widths 0.25 0.5 0.75 1.0 --base-length 120 -o sweep

Without --scratch each number of experts starts from the trained static network, for --length more epochs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from endless_emoji import EndlessEmoji, read_emoji
from sweep_figure import draw
from torch import nn

import condconv_surgery as cs
from condconv_surgery.models.mobilenet_v1 import CONDCONV_LAYERS
from condconv_surgery.recipe.training_sections import OptimizerOptions, ScheduleOptions
from condconv_surgery.reporting.measure.profile import profile
from condconv_surgery.training import apply_schedule, evaluate, parameter_groups, train_step


class EmojiTask:
    """Endless emoji; length: steps of ``batch`` images."""

    full_size = 112
    """With a stem of stride 1, 112 px cost what 224 px cost with one of stride 2."""

    def __init__(self, emoji: EndlessEmoji, batch: int, scored: int) -> None:
        self.emoji, self.batch, self.scored = emoji, batch, scored
        self.size, self.classes = emoji.size, emoji.classes

    def network(self, width: float) -> nn.Module:
        return cs.mobilenet_v1(width, self.classes, stem_stride=1)

    def calibration(self) -> torch.Tensor:
        return self.emoji.batch(256, "calibration").images

    def train(self, model: nn.Module, length: int, lr: float, seed: int, run: Path) -> dict[str, float]:
        """Train in place; top-1 and loss on test images that no training sees, the same for every point."""
        options, schedule = OptimizerOptions(lr=lr, weight_decay=0.02), ScheduleOptions(final_lr=0.0)
        optimizer = torch.optim.AdamW(parameter_groups(model, options), fused=True)
        model.train()
        for step, batch in enumerate(self.emoji.batches(length, self.batch, "train", seed)):
            apply_schedule(model, optimizer, step, length, schedule)
            train_step(model, optimizer, [batch], clip_norm=1.0)
        scores = evaluate(model, self.emoji.batches(self.scored // 256, 256, "test"))
        return {"top1": scores.top1, "loss": scores.loss}


class FolderTask:
    """An image folder, by ``cs.finetune``; length: epochs."""

    full_size = 224

    def __init__(self, folder: Path, batch: int, size: int, precision: str, workers: int) -> None:
        self.folder, self.batch, self.size, self.precision, self.workers = folder, batch, size, precision, workers
        self.classes = sum(path.is_dir() for path in (folder / "train").iterdir())

    def network(self, width: float) -> nn.Module:
        return cs.mobilenet_v1(width, self.classes)

    def calibration(self) -> None:
        """Random directions: the recipe of the paper has no calibration."""

    def train(self, model: nn.Module, length: int, lr: float, seed: int, run: Path) -> dict[str, float]:
        options = {
            "seed": seed,
            "data": {"batch_size": self.batch, "image_size": self.size, "workers": self.workers},
            "optimizer": {"lr": lr, "weight_decay": 0.02},
            "schedule": {"epochs": length},
            "engine": {"precision": self.precision},
        }
        unfinished = (run / "state.safetensors").exists()
        result = cs.finetune(model, options, data=self.folder, output=run, resume=unfinished)
        if result.stopped_by:
            raise SystemExit(f"Stopped by {result.stopped_by}; the same command continues.")
        return {"top1": result.top1, "loss": result.loss}


def main() -> None:
    given = arguments()
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / "points.jsonl"
    if not given.only_draw:
        torch.set_num_threads(given.threads)
        for point in sweep(given, finished(file)):
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(point) + "\n")
            print(json.dumps(point), flush=True)
    draw(finished(file), given.output)


def sweep(given: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The points that are not done, those of the first seed first."""
    task = task_of(given)
    known = {(p["seed"], p["width"], p["experts"]) for p in done}
    for seed in range(given.seeds):
        for width in given.widths:
            for experts in given.experts:
                if (seed, width, experts) not in known:
                    yield point(given, task, seed, width, experts)


def point(given: argparse.Namespace, task: EmojiTask | FolderTask, seed: int, width: float, experts: int) -> dict:
    torch.manual_seed(seed)
    network = task.network(width) if given.scratch else trained_base(given, task, width)
    model = network if experts == 1 else converted(network, task, experts, seed)
    run = given.output / f"x{width:g}-experts{experts}-seed{seed}"
    length, lr = (given.base_length, given.base_lr) if given.scratch else (given.length, given.lr)
    started = time.process_time()
    scores = task.train(model, length, lr, seed + 1, run)
    small, large = (profile(model, torch.zeros(1, 3, side, side)) for side in (task.size, task.full_size))
    return {
        "width": width,
        "experts": experts,
        "seed": seed,
        "length": length,
        **{name: round(value, 4) for name, value in scores.items()},
        "macs": small.macs.total,
        "macs_224": large.macs.total,
        "parameters": small.parameters,
        "seconds": round(time.process_time() - started),
        "size": task.size,
    }


def converted(network: nn.Module, task: EmojiTask | FolderTask, experts: int, seed: int) -> nn.Module:
    """CondConv from the sixth separable block on and in the classifier, with the outputs of ``network``."""
    conversion = cs.convert(
        network,
        cs.CondConv(experts=experts),
        example=torch.randn(2, 3, task.size, task.size),
        include=CONDCONV_LAYERS,
        classifier=True,
        start="antithetic",
        calibration=task.calibration(),
        seed=seed,
    )
    return conversion.model


def trained_base(given: argparse.Namespace, task: EmojiTask | FolderTask, width: float) -> nn.Module:
    """The static network of this width; trained and kept in a file the first time."""
    file = given.output / f"base-x{width:g}.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        network, started = task.network(width), time.process_time()
        scores = task.train(network, given.base_length, given.base_lr, 0, given.output / f"base-x{width:g}")
        cs.save(network, file)
        print(f"x{width:g} static: {scores} after {time.process_time() - started:.0f} s of processor time", flush=True)
    return cs.load(file)


def finished(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def task_of(given: argparse.Namespace) -> EmojiTask | FolderTask:
    if given.imagenet:
        return FolderTask(given.imagenet, given.batch or 256, given.size or 224, given.precision, given.workers)
    if not given.packages:
        raise SystemExit("Give the packages of emoji, or --imagenet FOLDER. See --help.")
    return EmojiTask(read_emoji(given.packages, given.classes, given.size or 32), given.batch or 32, given.scored)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", type=Path, help="emoji-datasource-VENDOR-16.0.0.tgz, of npm")
    parser.add_argument("-o", "--output", type=Path, default=Path("sweep"), help="folder of points and figure")
    parser.add_argument("--imagenet", type=Path, help="FOLDER/train/CLASS/*.JPEG and FOLDER/val/CLASS/*.JPEG instead")
    parser.add_argument("--widths", nargs="+", type=float, default=[0.125, 0.25], help="width multipliers")
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="1: static")
    parser.add_argument("--seeds", type=int, default=2, help="points per width and number of experts")
    parser.add_argument("--base-length", type=int, default=10000, help="steps (or epochs) of the static network")
    parser.add_argument("--length", type=int, default=1250, help="more steps (or epochs), of each point")
    parser.add_argument("--base-lr", type=float, default=3e-3, help="peak learning rate of the static network")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of each point")
    parser.add_argument("--scratch", action="store_true", help="each point from random weights, for --base-length")
    parser.add_argument("--batch", type=int, help="images per step (32; 256 with --imagenet)")
    parser.add_argument("--size", type=int, help="side of the images in pixels (32; 224 with --imagenet)")
    parser.add_argument("--classes", type=int, default=300, help="number of emoji")
    parser.add_argument("--scored", type=int, default=8192, help="test images of the emoji task")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images, with --imagenet")
    parser.add_argument("--precision", default="fp32", help="of --imagenet: fp32, bf16 or fp16")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--only-draw", action="store_true", help="draw the finished points and end")
    return parser.parse_args()


if __name__ == "__main__":
    main()
