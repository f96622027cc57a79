"""The runs of ``endless_study``: a base network a seed, its arms, and what is kept of each run in a folder."""

from __future__ import annotations

import fcntl
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import condconv_surgery as cs
from benchmarks.studies.endless_arms import ARMS, RECIPES, TRAINING, Arm
from condconv_surgery.layers import conditional_layers
from condconv_surgery.layers.gate_statistics import total_variation
from condconv_surgery.recipe.study_record import ScoredRun, SearchRun
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.reporting import profile
from condconv_surgery.reporting.measure.expert_similarity import measure_experts
from condconv_surgery.training import Batch, ExpertDropout, GateRecorder, apply_schedule, train_step
from condconv_surgery.training.distillation import Teacher
from condconv_surgery.training.objective import Objective
from condconv_surgery.training.optimization.optimizers import make_optimizer
from condconv_surgery.training.optimization.weight_average import averaged
from examples.endless_emoji import MEAN, STD, EndlessEmoji

BATCH, BASE_STEPS, BASE_LR, STEPS = 64, 20_000, 4e-3, 10_000
TEST_BATCHES, TEST_SIZE = 32, 256
RATES = (4e-3, 8e-3, 16e-3)


def network(classes: int, wider: int = 1) -> nn.Sequential:
    """A small MobileNetV1, 11 convolutions: 30k parameters for 300 classes; or one that is ``wider`` times as wide."""

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers, width = conv(3, 8 * wider, 3, 2), 8 * wider
    for outputs, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        layers += [*conv(width, width, 3, stride, width), *conv(width, outputs * wider, 1)]
        width = outputs * wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


@dataclass
class Study:
    """The folder of a study and what its runs share."""

    task: EndlessEmoji
    folder: Path
    steps: int = STEPS
    base_steps: int = BASE_STEPS
    arms: dict[str, Arm] = field(default_factory=lambda: ARMS | RECIPES)

    def base(self, seed: int) -> nn.Module:
        """The static network that the arms of a seed start from, trained once."""
        return self._trained_once(f"base-{seed}", seed, wider=1)

    def _trained_once(self, name: str, seed: int, wider: int) -> nn.Module:
        file = self.folder / f"{name}.safetensors"
        with _locked(file):
            torch.manual_seed(seed)
            model = network(self.task.classes, wider)
            if not file.exists():
                say(f"{name}: {self.base_steps} steps")
                batches = self.task.batches(self.base_steps, BATCH, "base", seed)
                train(model, batches, self.base_steps, TRAINING.updated({"optimizer": {"lr": BASE_LR}}))
                save_file(model.state_dict(), file.with_suffix(".new"))
                file.with_suffix(".new").rename(file)
        model.load_state_dict(load_file(file))
        return model

    def teacher(self, arm: Arm, seed: int) -> nn.Module | None:
        """The network that an arm learns from, if any. All seeds have one wide teacher."""
        if arm.teacher == "start":
            return self.base(seed)
        return self._trained_once("wide", 1, wider=3) if arm.teacher == "wide" else None

    def images(self, seed: int, steps: int) -> Iterator[Batch]:
        """The training batches of a seed, drawn once and stored with 8 bits, as image files are."""
        count = self.steps * max(arm.length for arm in self.arms.values())
        file, shape = self.folder / f"images-{seed}.u8", (count, BATCH, 3, self.task.size, self.task.size)
        labels = file.with_suffix(".labels.npy")
        with _locked(file):
            if not labels.exists():
                stored = np.memmap(file, np.uint8, "w+", shape=shape)
                rows = np.zeros((count, BATCH), np.int64)
                for step, batch in enumerate(self.task.batches(count, BATCH, "train", seed)):
                    stored[step] = ((batch.images * STD + MEAN).clamp(0, 1) * 255).round().byte().numpy()
                    rows[step] = batch.labels.numpy()
                np.save(labels, rows)
        stored, rows = np.memmap(file, np.uint8, "r", shape=shape), np.load(labels)
        for step in range(steps):
            pixels = torch.from_numpy(np.array(stored[step])).float()
            yield Batch((pixels / 255 - MEAN) / STD, torch.from_numpy(rows[step]))

    def search(self, name: str, lr: float, seed: int) -> None:
        """One run of an arm with a learning rate, scored on validation images."""
        self._run(name, seed, lr, self.folder / f"search-{file_name(name)}-{lr:g}-{seed}.json", "validation")

    def run(self, name: str, seed: int) -> None:
        """One run of an arm with the best of its rates, scored on test images."""
        lr = self.rate(self.arms[name].rate_of or name)
        self._run(name, seed, lr, self.folder / f"{file_name(name)}-{seed}.json", "test")

    def rates(self, name: str) -> list[SearchRun]:
        """The search of an arm, as far as it is done: by learning rate, means over its seeds."""
        found: dict[float, list[ScoredRun]] = {}
        for file in sorted(self.folder.glob(f"search-{file_name(name)}-[0-9]*.json")):
            run = ScoredRun(**json.loads(file.read_text())["run"])
            found.setdefault(run.lr or 0.0, []).append(run)
        return [
            SearchRun(lr, statistics.mean(run.top1 for run in runs), seconds=sum(run.seconds or 0.0 for run in runs))
            for lr, runs in sorted(found.items())
        ]

    def rate(self, name: str) -> float:
        """The best learning rate of an arm. Exits where its search is not over."""
        found = self.rates(name)
        if {run.lr for run in found} < set(RATES):
            raise SystemExit(f"{name}: the search has {len(found)} of {len(RATES)} rates. Run search first.")
        return max(found, key=lambda run: run.val_top1 or 0.0).lr

    def _run(self, name: str, seed: int, lr: float, file: Path, part: str) -> None:
        """Train and score; writes ``file``. Nothing if another process has it, or it is done."""
        arm = self.arms[name]
        with _claimed(file) as free:
            if not free:
                return
            started, steps = time.perf_counter(), self.steps * arm.length
            model = self.converted(arm, seed)
            say(f"{file.stem}: {steps} steps")
            options = arm.options.updated({"optimizer": {"lr": lr}})
            model, seconds = train(model, self.images(seed, steps), steps, options, self.teacher(arm, seed))
            correct, use = score(model, self.task, part)
            row = ScoredRun(seed, correct, lr, steps=steps, seconds=time.perf_counter() - started)
            facts = {"run": asdict(row), "step_seconds": seconds, **use, **_cost(model, self.task)}
            file.with_suffix(".new").write_text(json.dumps(facts), encoding="utf-8")
            file.with_suffix(".new").rename(file)
            say(f"{file.stem}: top-1 {row.top1:.4f}, {use}")

    def converted(self, arm: Arm, seed: int) -> nn.Module:
        """The base network of a seed, converted as the arm says."""
        model = self.base(seed)
        if arm.variant is None:
            return model
        options = dict(arm.conversion)
        if options.get("start") != "noise":
            options["calibration"] = self.task.batch(512, "calibration", seed).images
        example = self.task.batch(2, "example").images
        converted = cs.convert(model, arm.variant, example=example, seed=seed, **options).model
        if arm.classifier is None:
            return converted
        return cs.convert(converted, arm.classifier, example=example, seed=seed, classifier=True).model


def train(
    model: nn.Module, batches: Iterator[Batch], steps: int, options: TrainingOptions, teacher: nn.Module | None = None
) -> tuple[nn.Module, float]:
    """One cycle of the learning rate; returns the network to score and the median seconds of a step without images."""
    optimizer, average = make_optimizer(model, options.optimizer, options.layers), averaged(model, options.engine)
    taught = None if teacher is None else Teacher(teacher, model, options.distill)
    loss, share = Objective(model, options, None, taught), options.layers.expert_dropout
    dropout = ExpertDropout(model, share) if share else None
    model.train()
    times = []
    for step, batch in enumerate(batches):
        started = time.perf_counter()
        apply_schedule(model, optimizer, step, steps, options.schedule)
        train_step(model, optimizer, [batch], loss_of=loss)
        if average is not None:
            average.update(model, step)
        times.append(time.perf_counter() - started)
    loss.close()
    if dropout is not None:
        dropout.close()
    return model if average is None else average.module, statistics.median(times)


@torch.inference_mode()
def score(model: nn.Module, task: EndlessEmoji, part: str) -> tuple[str, dict[str, Any]]:
    """A digit for each image of a part, 1 where the model is right; and how routing varies over them."""
    gates, correct = GateRecorder(model), []
    seen: dict[str, list[Tensor]] = {}
    model.eval()
    for batch in task.batches(TEST_BATCHES, TEST_SIZE, part):
        correct.append(model(batch.images).argmax(1) == batch.labels)
        for name, gate in gates.take().items():
            seen.setdefault(name, []).append(gate)
    gates.close()
    digits = "".join("1" if right else "0" for right in torch.cat(correct).tolist())
    return digits, _use(model, {name: torch.cat(parts) for name, parts in seen.items()})


def _use(model: nn.Module, gates: dict[str, Tensor]) -> dict[str, Any]:
    """By layer: mean distance of an image's gates from the mean gates; mean cosine between experts."""
    if not gates:
        return {}
    variation = {name: float(total_variation(gate)) for name, gate in gates.items()}
    return {"variation": variation, "cosine": {row.name: row.cosine for row in measure_experts(model)}}


def _cost(model: nn.Module, task: EndlessEmoji) -> dict[str, Any]:
    macs = {f"macs_{side}": profile(model, torch.zeros(1, 3, side, side)).macs.total for side in (task.size, 224)}
    return {"parameters": sum(p.numel() for p in model.parameters()), **macs, "layers": len(conditional_layers(model))}


def file_name(arm: str) -> str:
    """An arm's name in file names."""
    return arm.replace(", ", "-").replace(" ", "-").replace(":", "-")


def say(text: str) -> None:
    """Print a line at once, for a log."""
    print(text, flush=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _claimed(file: Path) -> Iterator[bool]:
    """Whether the run is this process's to do: not done yet, and not of another process that is alive."""
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield not file.exists()
