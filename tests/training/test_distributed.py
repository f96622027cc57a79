"""Runs in processes of their own: several at once, and killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from condconv_surgery.models.artifact.save_load import load
from condconv_surgery.recipe import TrainingOptions
from condconv_surgery.training import evaluate
from condconv_surgery.training.batches.loaders import input_spec, open_data
from condconv_surgery.training.distributed.world import World
from condconv_surgery.training.state.run_state import LAST, read_state
from tests import small_run
from tests.images import find_training_images, write_images
from tests.small_networks import small_net
from tests.training.forked import forked, several

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "PYTHONFAULTHANDLER": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", each=11)  # 27 to train on, 6 to validate on


def options_for(folder: Path, name: str, epochs: int = 2, **sections: object) -> TrainingOptions:
    return TrainingOptions().updated(
        {
            "output": str(folder.parent / name),
            "data": {"folder": str(folder), "image_size": 16, "batch_size": 8, "workers": 0},
            "optimizer": {"lr": 0.01},
            "schedule": {"epochs": epochs},
            **sections,
        }
    )


def launch(options: TrainingOptions, *arguments: str, processes: int = 1, restarts: int = 0) -> BaseProcess:
    file, output = written(options)
    if processes == 1:
        return forked(small_run.main, [file, *arguments], output=output)
    return forked(several, small_run.main, processes, restarts, [file, *arguments], output=output)


def finish(process: BaseProcess, options: TrainingOptions) -> None:
    process.join(300)
    assert process.exitcode == 0, written(options)[1].read_text()


def run(options: TrainingOptions, *arguments: str, processes: int = 1, restarts: int = 0) -> None:
    finish(launch(options, *arguments, processes=processes, restarts=restarts), options)


def run_by_torchrun(options: TrainingOptions, processes: int) -> None:
    """As a user starts it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, "-m", "tests.small_run", written(options)[0]]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def written(options: TrainingOptions) -> tuple[str, Path]:
    """A file with the options, and one for what is printed."""
    file = Path(options.output).with_suffix(".json")
    file.write_text(json.dumps(options.to_dict()))
    return str(file), file.with_suffix(".txt")


def rows(options: TrainingOptions) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(options.output) / "metrics.jsonl").read_text().splitlines()]


def weights(options: TrainingOptions) -> dict[str, torch.Tensor]:
    return load_file(Path(options.output) / "last.safetensors")


def assert_same(one: TrainingOptions, other: TrainingOptions) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    ("start", "processes"), [(run_by_torchrun, 2), pytest.param(run, 4, marks=pytest.mark.slow)], ids=["2", "4"]
)
def test_processes_train_as_one(folder: Path, start: Callable[..., None], processes: int) -> None:
    """Classes of unlike size, weighed; two images that can't be read, which different processes meet."""
    for image in sorted((folder / "class2").iterdir())[4:]:
        image.unlink()
    sections = {"optimizer": {"lr": 0.01, "class_weights": True}}
    spoilt = [find_training_images(folder)[part].path(index) for part, index in ((0, 5), (1, 1))]
    for image in spoilt:
        image.write_bytes(b"text")
    alone, together = (
        options_for(folder, name, **sections).updated({"data": {"max_bad": 2}}) for name in ("alone", "together")
    )
    run(alone)
    start(together, processes=processes)
    for options in (alone, together):
        state = read_state(Path(options.output) / LAST)
        assert sorted(state.facts["unreadable"]) == sorted(map(str, spoilt))
    for one, other in zip(rows(alone), rows(together), strict=True):
        for name in ("train_loss", "train_top1", "val_loss", "val_top1"):
            assert one[name] == pytest.approx(other[name], abs=1e-5), name
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(tensor, weights(together)[name], atol=1e-5, rtol=1e-4)


def test_what_is_scored_is_what_is_saved(folder: Path) -> None:
    """Batch norms have seen other images in each process; those of the first are saved, and all score with them."""
    options = options_for(folder, "run", engine={"ema": 0.9})
    run(options, "norm", processes=2)
    model = load(Path(options.output) / "last.safetensors", model=small_net())
    scores = evaluate(model, open_data(options, input_spec(model, options), World()).val_loader)
    assert scores is not None
    assert rows(options)[-1]["val_loss"] == pytest.approx(scores.loss, abs=1e-6)


def test_a_sharded_model_trains_as_a_whole_one(folder: Path) -> None:
    """Weights and optimizer state split over two processes; two of seven validation images' batches are uneven."""
    engine = {"ema": 0.5, "save_every": 2}
    alone = options_for(folder, "alone", engine=engine, optimizer={"lr": 0.01, "accumulate": 2})
    sharded = options_for(folder, "sharded", engine={**engine, "shard": True}, optimizer=alone.to_dict()["optimizer"])
    run(alone)
    run(sharded, processes=2)
    for one, other in zip(rows(alone), rows(sharded), strict=True):
        for name in ("train_loss", "train_top1", "val_loss", "val_top1"):
            assert one[name] == pytest.approx(other[name], abs=1e-5), name
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(tensor, weights(sharded)[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_sharded_run_goes_on_exactly(folder: Path) -> None:
    engine = {"shard": True, "ema": 0.5, "save_every": 2}
    whole, cut = options_for(folder, "whole", engine=engine), options_for(folder, "cut", engine=engine)
    run(whole, processes=2)
    run(cut, "resume", "kill:1:5", processes=2, restarts=1)
    assert_same(whole, cut)


@pytest.mark.slow
def test_a_killed_process_is_restarted_to_the_same_weights(folder: Path) -> None:
    whole = options_for(folder, "whole", engine={"save_every": 2})
    cut = options_for(folder, "cut", engine={"save_every": 2})
    run(whole, processes=2)
    run(cut, "resume", "kill:1:5", processes=2, restarts=1)
    assert_same(whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_twenty_stops_at_random_moments_change_nothing(folder: Path, number: int) -> None:
    whole = options_for(folder, "whole", epochs=10, engine={"save_every": 2})
    run(whole)
    output = Path(whole.output)
    duration = (output / "last.safetensors").stat().st_mtime - (output / "recipe.toml").stat().st_mtime
    rng, stopped = random.Random(number), 0
    for attempt in range(60):
        cut = options_for(folder, f"cut{attempt}", epochs=10, engine={"save_every": 2})
        process = launch(cut)
        while not (Path(cut.output) / "recipe.toml").exists() and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.9) * duration)
        with suppress(ProcessLookupError):  # done, and buried by the fork server
            os.kill(process.pid or 0, number)
        process.join()
        if process.exitcode == 0:
            continue  # it was done before the signal
        stopped += 1
        assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number)
        run(cut, "resume")
        assert_same(whole, cut)
        assert rows(whole)[-1]["val_loss"] == rows(cut)[-1]["val_loss"]
        if stopped == 20:
            return
    pytest.fail(f"only {stopped} runs were stopped before their end")
