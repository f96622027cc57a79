"""``finetune``: train a model on labelled images."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condconv_surgery.data.find_data import require_data, source_of
from condconv_surgery.errors import InputError, listed
from condconv_surgery.layers.find_layers import folded_layers, require_exact_experts, require_stored_experts
from condconv_surgery.models.artifact.save_load import why_not_alone
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.runtime.wrappers import unwrapped
from condconv_surgery.training.batches.loaders import TrainAndVal
from condconv_surgery.training.distributed.world import World, open_world
from condconv_surgery.training.monitor.callback import Callback
from condconv_surgery.training.monitor.explained_errors import explained_errors
from condconv_surgery.training.monitor.progress_display import displayed
from condconv_surgery.training.monitor.run_summary import next_call
from condconv_surgery.training.monitor.tensorboard_events import make_callback
from condconv_surgery.training.optimization.parameter_groups import preserving_frozen
from condconv_surgery.training.run import Run
from condconv_surgery.training.state.progress import TrainingResult
from condconv_surgery.training.state.run_lock import locked_folder
from condconv_surgery.training.state.stop_signals import StopRequest, catch_signals


def finetune(
    model: nn.Module | str | Path,
    options: TrainingOptions | Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
    progress: bool | None = None,
) -> TrainingResult:
    """Train a converted or plain classifier with labelled images and write the run into a folder.

        import condconv_surgery as cs
        result = cs.finetune(model, {"schedule": {"epochs": 3}, "optimizer": {"lr": 1e-3}}, data="photos", output="run")
        tuned = cs.load("run/best.safetensors")

    model: a module, trained in place, or what ``load_model`` loads: a file, ``torchvision:NAME``, ``timm:NAME``,
        ``transformers:FOLDER``.
    options: a ``TrainingOptions``, or a mapping by section as in a recipe file; options left out have their defaults.
    data: overrides ``data.folder``: ``FOLDER/CLASS/*.png``, ``FOLDER/train`` and ``FOLDER/val``, tar shards,
        ``torchvision:NAME`` or ``hf:NAME``.
    output: overrides ``output``, the run's folder. It gets ``last.safetensors`` and ``best.safetensors`` (models),
        ``metrics.jsonl`` (a row per epoch), ``recipe.toml`` (all options), ``state.safetensors`` (to resume from), and
        at the end ``curves.png``.
    resume: continue from the state in the folder; the final weights are those of an uninterrupted run. ``model`` is the
        one that the run began with, or the object that it left half-trained.
    callback: called before the first step, after steps and epochs, and at the end.
    progress: show the run on stderr, as a bar on a terminal, else as lines. Default: unless ``callback`` is given.

    SIGTERM, SIGHUP or Ctrl-C save the state and return early (``stopped_by``). A folder holds one run at a time. Seeds
    torch's global generators. With ``engine.shard`` the model in memory stays sharded, which torch cannot undo: load
    ``last.safetensors``.

    Raises ``InputError`` for options, images or folders that cannot be used, ``TrainingError`` when training cannot
    continue, ``DamagedFileError`` when all saved states are damaged.
    """
    _require_guard()
    options = complete_options(model, options, data, output)
    model = model_of(model, options)
    shown = displayed(callback, callback is None if progress is None else progress)
    with open_world() as world, catch_signals() as request:
        result = train_run(model, options, world, request, shown, resume=resume)
        if world.is_first:
            shown.end(result, next_call(result, bool(why_not_alone(model))))
    return result


def model_of(model: nn.Module | str | Path, options: TrainingOptions) -> nn.Module:
    """``model``, or the one that the options name, in float32: a file may hold half precision, too coarse for steps."""
    if isinstance(model, nn.Module):
        return unwrapped(model)
    torch.manual_seed(options.seed)  # for weights that are initialised at random
    return load_model(options.model, arch=options.arch, weights=options.weights, trust=options.trust).float()


def train_run(
    model: nn.Module,
    options: TrainingOptions,
    world: World,
    request: StopRequest,
    callback: Callback | None = None,
    *,
    resume: bool = False,
    images: TrainAndVal | None = None,
) -> TrainingResult:
    """One run of ``finetune`` inside processes and signal handlers that are already set up.

    images: training and validation images, instead of those that ``options.data`` names.
    """
    _require_trainable(model)
    callback = make_callback(options, callback, world)
    with (
        deterministic(options.engine.deterministic),
        locked_folder(Path(options.output), world, callback.note) as lock,
        preserving_frozen(model),
    ):
        with explained_errors():
            run = Run(model, options, world, request, callback, lock, images, resume)
        with explained_errors(lambda: run.progress.step, run.kept):  # closing too: torch may report a dead worker then
            try:
                run.begin()
                return run.train()
            except Exception:
                run.rescue()
                raise
            finally:
                run.close()


def complete_options(
    model: nn.Module | str | Path,
    options: TrainingOptions | Mapping[str, Any] | None,
    data: str | Path | None,
    output: str | Path | None,
) -> TrainingOptions:
    """The options of a run with its model, data and output. Raises ``InputError`` when one of them is missing."""
    if not isinstance(options, TrainingOptions):
        options = TrainingOptions.from_dict(dict(options or {}))
    changes: dict[str, Any] = {} if isinstance(model, nn.Module) else {"model": str(model)}
    if data is not None:
        changes["data"] = {"folder": source_of(data)}
    if output is not None:
        changes["output"] = str(output)
    options = options.updated(changes)
    options.require_complete(model_is_given=isinstance(model, nn.Module))
    require_data(options.data)  # before a model is loaded: a wrong path fails at once
    return options


def _require_guard() -> None:
    """Raise ``InputError`` in a spawned process that is still importing the script which spawned it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks
        raise InputError(
            "finetune is called while a process that reads images imports the script.",
            "Where processes are spawned, each imports the script, so that calls in it need a guard.",
            'if __name__ == "__main__": before the call of finetune',
        )


def _require_trainable(model: nn.Module) -> None:
    require_exact_experts(model, "Training needs exact ones.")
    require_stored_experts(model)
    if folded := folded_layers(model):
        raise InputError(
            f"The model is folded: {listed(folded)} took in the batch norm behind.",
            "Folding is for inference; training needs the batch norms.",
            "the artifact from before it was folded",
        )


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside the block torch uses deterministic algorithms only, and raises where there is none."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
