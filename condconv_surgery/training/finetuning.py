"""``finetune``: a run with all that must be there around it, and taken away again."""

from __future__ import annotations

from torch import nn

from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.training.distributed.world import open_world
from condconv_surgery.training.monitor.explained_errors import in_words
from condconv_surgery.training.monitor.progress_display import Watcher
from condconv_surgery.training.monitor.tensorboard_events import watcher_of
from condconv_surgery.training.run import Run
from condconv_surgery.training.state.determinism import deterministic
from condconv_surgery.training.state.progress import TrainingResult
from condconv_surgery.training.state.stop_signals import watching_signals


def finetune(
    model: nn.Module, options: TrainingOptions, *, resume: bool = False, watcher: Watcher | None = None
) -> TrainingResult:
    """Train ``model``, in place, as ``options`` say; writes into the folder ``options.output``:

    ``last.safetensors`` and ``best.safetensors`` (artifacts), ``metrics.jsonl`` (a row per epoch), ``recipe.toml`` (the
    effective options), ``state.safetensors`` (to go on from), and at the end ``curves.png``.

    resume: go on from the state in the folder; the final weights are those of a run that was never stopped. ``model``
    is then the model that the run began with.
    SIGTERM or Ctrl-C save the state and return early (``stopped_by``). Seeds torch's global generators.
    With ``engine.shard`` the model in memory stays split over the processes, which torch can't undo: load
    ``last.safetensors`` for a whole one.

    Raises ``InputError`` for options, images or folders that cannot be used, ``TrainingError`` when training cannot
    go on, ``DamagedFileError`` when no whole state is left.
    """
    with open_world() as world, watching_signals() as wish, deterministic(options.engine.deterministic):
        with in_words():
            run = Run(model, options, world, wish, watcher_of(options, watcher, world))
        with in_words(lambda: run.progress.step):  # around the end too: torch reports a dead reader at any moment
            try:
                run.begin(resume)
                return run.train()
            finally:
                run.close()
