"""What goes wrong in the middle of a run: the machine, the disk, the images. Words, and a state to go on from."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from condconv_surgery.data.image_folders import ImageFiles
from condconv_surgery.errors import InputError, TrainingError
from condconv_surgery.recipe import CondConv, TrainingOptions
from condconv_surgery.training import finetune
from condconv_surgery.training import learner as learner_module
from condconv_surgery.training.batches import loaders as loading_module
from condconv_surgery.training.monitor.callback import Callback, StepView
from condconv_surgery.training.state.run_files import read_rows
from condconv_surgery.training.state.run_state import LAST, load_state, read_state
from tests.images import find_training_images, write_images
from tests.small_networks import small_net
from tests.training.test_training_run import StopAt, assert_same, weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", each=7)  # 18 to train on, 3 to validate on


def options_for(folder: Path, run: str, **data: object) -> TrainingOptions:
    return TrainingOptions().updated(
        {
            "output": str(folder.parent / run),
            "data": {"folder": str(folder), "image_size": 16, "batch_size": 4, "workers": 0, **data},
            "schedule": {"epochs": 3},
            "engine": {"save_every": 2},
        }
    )


# torch looks for free descriptors when a worker is lost, and its report of the lost worker may interrupt that
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_reader_ends_with_an_error_and_the_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = options_for(folder, "whole"), options_for(folder, "cut", workers=1)
    finetune(small_net(CondConv(experts=2)), whole)
    opened = ImageFiles.open
    countdown = [30]  # in the worker, which has a copy: in the 8th batch, when the 6th has been asked for

    def deadly(self: ImageFiles, index: int) -> Image.Image:
        countdown[0] -= torch.utils.data.get_worker_info() is not None
        if countdown[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "open", deadly)
        with pytest.raises(TrainingError, match=r"reads images was killed after step \d(.|\n)*smaller data\.workers"):
            finetune(small_net(CondConv(experts=2)), cut)
    state, _ = load_state(Path(cut.output))  # the one before, if the report came while the last was being saved
    assert state is not None
    assert state.facts["progress"]["step"] >= 2
    finetune(small_net(CondConv(experts=2)), cut, resume=True)
    assert_same(weights(whole), weights(cut))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), r"No memory left after step 5: CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."), "No memory left after step 5"),
        (MemoryError(), "No memory left after step 5: Python"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), "Another process of the run was lost"),
    ],
)
def test_what_the_machine_does_is_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """Raised where torch raises it: in the middle of a step."""
    options = options_for(folder, "run")
    original, left = learner_module.train_step, [5]

    def train_step(*args: object, **how: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(learner_module, "train_step", train_step)
    with pytest.raises(TrainingError, match=rf"{message}(.|\n)*state after step 4 is kept(.|\n)*resume=True"):
        finetune(small_net(), options)
    assert read_state(Path(options.output) / LAST).facts["progress"]["step"] == 4


def test_layers_that_are_never_called_are_reported_where_torch_needs_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of torch 2.14's DistributedDataParallel."""

    def train_step(*args: object, **how: object) -> object:
        raise RuntimeError(
            "Expected to have finished reduction in the prior iteration before starting a new one. This error ...\n"
            "Parameter indices which did not receive grad for rank 0: 12 13\n In addition, ..."
        )

    monkeypatch.setattr(learner_module, "train_step", train_step)
    with pytest.raises(
        TrainingError, match=r'does not depend on .* for rank 0: 12 13\.\n(.|\n)*layers\.freeze=\["LAYER"\]'
    ):
        finetune(small_net(), options_for(folder, "run"))


def test_no_memory_for_the_model_itself_is_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def to(*args: object, **how: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    model = small_net()
    monkeypatch.setattr(model, "to", to)
    with pytest.raises(TrainingError, match="No memory left after step 0: CUDA out of memory"):
        finetune(model, options_for(folder, "run"))


def test_a_failure_of_the_program_stays_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_step(*args: object, **how: object) -> object:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(learner_module, "train_step", train_step)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        finetune(small_net(), options_for(folder, "run"))


def test_an_error_in_a_reader_is_not_taken_for_a_killed_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collate(samples: object) -> object:
        raise RuntimeError("stack expects each tensor to be equal size")

    monkeypatch.setattr(loading_module, "collate", collate)
    monkeypatch.setattr(loading_module._loader, "__defaults__", (collate,))
    with pytest.raises(RuntimeError, match=r"in DataLoader worker process 0(.|\n)*equal size"):
        finetune(small_net(), options_for(folder, "run", workers=1))


def test_a_validation_loss_that_is_not_finite_ends_with_an_error(folder: Path) -> None:
    """In eval mode only, as statistics that overflowed make it; the artifact of the epoch before stays."""
    model, options = small_net(), options_for(folder, "run")
    saved, metrics = Path(options.output) / LAST, Path(options.output) / "metrics.jsonl"

    def spoil(norm: torch.nn.BatchNorm2d, args: object, output: torch.Tensor) -> torch.Tensor | None:
        return output * float("inf") if read_rows(metrics) and not norm.training else None

    model.norm.register_forward_hook(spoil)  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match=r"validation loss is not finite at step 8; first in the output of norm"):
        finetune(model, options)
    assert read_state(saved).facts["progress"]["epochs_done"] == 1
    assert [row["epoch"] for row in read_rows(metrics)] == [1]


class AtStep(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.at, self.action = step, action
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)

    def step(self, view: StepView) -> None:
        if view.step == self.at:
            self.action()


def test_a_file_that_the_system_cuts_short_leaves_the_last_state_whole(folder: Path) -> None:
    """The kernel itself refuses to write on, as a full disk does."""
    options = options_for(folder, "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tight = AtStep(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1])))
    try:
        with pytest.raises(
            TrainingError, match=r"could not be written(.|\n)*state after step 2 is kept(.|\n)*resume=True"
        ):
            finetune(small_net(), options, callback=tight)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert read_state(Path(options.output) / LAST).facts["progress"]["step"] == 2
    assert not list(Path(options.output).glob(".*.tmp"))
    assert finetune(small_net(), options, resume=True).epochs == 3


def test_unreadable_images_are_kept_across_a_resume(folder: Path) -> None:
    train, _ = find_training_images(folder)
    options = options_for(folder, "run", max_bad=1)
    train.path(0).write_bytes(b"text")
    stopped = finetune(small_net(), options, callback=StopAt(5, signal.SIGTERM))
    assert stopped.unreadable == (str(train.path(0)),)
    train.path(9).write_bytes(b"text")
    callback = AtStep(-1, list)
    with pytest.raises(InputError, match=r"2 unreadable images: .*\n.*At most 1"):
        finetune(small_net(), options, resume=True, callback=callback)
    reason = "not an image of a known format"
    assert [line for line in callback.lines if "skipped" in line] == [
        f"Unreadable, skipped: {train.path(9)} ({reason})"
    ]


def test_validation_images_that_all_go_bad_end_the_run(folder: Path) -> None:
    _, val = find_training_images(folder)

    def spoil() -> None:
        for index in range(len(val)):
            val.path(index).write_bytes(b"text")

    callback = AtStep(1, spoil)
    with pytest.raises(TrainingError, match=r"No validation image can be read"):
        finetune(small_net(), options_for(folder, "run", max_bad=100), callback=callback)
    assert sum("skipped" in line for line in callback.lines) == 3
    strict = AtStep(1, spoil)
    with pytest.raises(InputError, match=r"3 unreadable images"):
        finetune(small_net(), options_for(folder, "strict"), callback=strict)


def test_a_batch_without_any_image_is_reported(folder: Path) -> None:
    train, _ = find_training_images(folder)
    for index in range(len(train)):
        train.path(index).write_bytes(b"text")
    with pytest.raises(InputError, match=r"No image of a batch can be read: .*\.png"):
        finetune(small_net(), options_for(folder, "run", max_bad=100))
