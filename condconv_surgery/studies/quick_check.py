"""``quick_check``: can conversion pay at all? Two runs of the static network answer before any study."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from condconv_surgery.data.labelled_images import even_subset
from condconv_surgery.models.artifact.save_load import load
from condconv_surgery.recipe.study_arms import Arm
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.reporting.study.binomial_interval import Z
from condconv_surgery.reporting.study.paired_difference import Difference, paired_difference
from condconv_surgery.reporting.study.study_results import points
from condconv_surgery.studies.arm_models import arm_options
from condconv_surgery.studies.arm_runs import is_over
from condconv_surgery.studies.image_scores import correct_images
from condconv_surgery.studies.study_folder import (
    read_quick_settings,
    require_same_quick_check,
    write_quick_settings,
)
from condconv_surgery.studies.study_inputs import study_inputs
from condconv_surgery.studies.study_settings import run_settings
from condconv_surgery.training.distributed.world import World, open_world
from condconv_surgery.training.finetuning import train_run
from condconv_surgery.training.monitor.callback import Callback
from condconv_surgery.training.monitor.progress_display import console_display
from condconv_surgery.training.state.run_files import make_folder
from condconv_surgery.training.state.stop_signals import catch_signals

FITS = 0.98
"""From this top-1 on its training images on, a network fits them: more capacity has nothing left to fit."""

GENERALISES = 2.0
"""Where a network errs more than so many times as often on validation images, data limit it more than capacity."""

TRAINED_OUT = 0.02
"""What twice the steps may gain: top-1 on training images, and the upper end of the interval on validation images."""

MOST_IMAGES = 2000
"""Training images that are scored, evenly from all classes."""


@dataclass(frozen=True)
class QuickCheck:
    """Scores of the static network after the budget and after twice of it, top-1 as shares.

    train_top1: on training images, without augmentation, in eval mode. val_top1: on validation images.
    longer: validation top-1 of the longer run minus that of the shorter, with its interval over images (one seed).
    chance: the share of the commonest class in the training images that were scored; ``train_images``: their number.
    """

    epochs: tuple[int, int]
    train_top1: tuple[float, float]
    val_top1: tuple[float, float]
    longer: Difference
    origin: str = ""
    chance: float = 0.0
    train_images: int = 0

    @property
    def improves(self) -> bool:
        """Does the network gain from more training steps?"""
        return self.longer.low > 0

    @property
    def has_learnt(self) -> bool:
        """Is top-1 on training images above chance, by more than images that are drawn at random explain?"""
        error = math.sqrt(self.chance * (1 - self.chance) / max(self.train_images, 1))
        return max(self.train_top1) > self.chance + Z * error

    @property
    def is_trained_out(self) -> bool:
        """Is there evidence that more training steps gain at most ``TRAINED_OUT``?"""
        return not self.improves and self.longer.high <= TRAINED_OUT and self._training_gain <= TRAINED_OUT

    @property
    def limit(self) -> str:
        """What limits the network: ``"data"`` (it fits its training images), ``"mostly data"`` or ``"capacity"``.

        ``"not known"`` for a network that has learnt nothing, or is not trained out.
        """
        train, val = max(zip(self.train_top1, self.val_top1, strict=True))
        if train >= FITS:
            return "data"
        if not (self.has_learnt and self.is_trained_out):
            return "not known"
        return "mostly data" if 1 - val > GENERALISES * (1 - train) else "capacity"

    @property
    def verdict(self) -> str:
        """What to do, in one sentence."""
        fit, steps = f"{100 * max(self.train_top1):.1f}%", f"{points(self.longer)} points with twice the steps"
        if self.limit == "data":
            return (
                f"Conversion is unlikely to pay: the network fits its training images ({fit}), so capacity is not the "
                "limit; more data or stronger augmentation is."
            )
        if not self.has_learnt:
            return (
                f"The network has learnt nothing at this rate: its top-1 on training images ({fit}) is not above "
                f"chance ({100 * self.chance:.1f}%); find a learning rate and a number of epochs at which it trains."
            )
        if self.improves:
            return f"Train longer first: the static network still improves ({steps}); compare when it no longer does."
        if not self.is_trained_out:
            return (
                f"Not known: there is no evidence that the network is trained out ({steps}; on training images "
                f"{100 * self._training_gain:+.1f}); {self._what_would_tell} would tell."
            )
        if self.limit == "mostly data":
            return (
                f"Conversion may pay little: the network is trained out ({steps}) and right on {fit} of its training "
                "images, but errs much more often on others, so data limit it more than capacity."
            )
        return (
            f"Conversion can pay: the network is trained out ({steps}) and does not fit its training images ({fit}): "
            "capacity is the limit."
        )

    @property
    def _training_gain(self) -> float:
        return self.train_top1[1] - self.train_top1[0]

    @property
    def _what_would_tell(self) -> str:
        """More images where the interval is too wide for any answer, longer training where a gain is possible."""
        helps = []
        if self.longer.half > TRAINED_OUT:
            helps.append(f"more validation images (now {self.longer.images})")
        if not helps or self._training_gain > TRAINED_OUT:
            helps.append(f"longer training (now {self.epochs[0]} and {self.epochs[1]} epochs)")
        return " and ".join(helps)

    def to_dict(self) -> dict[str, Any]:
        longer = {**asdict(self.longer), "low": self.longer.low, "high": self.longer.high}
        found = {"improves": self.improves, "limit": self.limit, "verdict": self.verdict}
        return {**asdict(self), "longer": longer, **found}


def quick_check(
    model: nn.Module | str | Path,
    options: TrainingOptions | Mapping[str, Any] | None = None,
    *,
    data: str | Path | None = None,
    output: str | Path | None = None,
    display: Callable[[], Callback] | None = None,
    progress: bool = True,
) -> QuickCheck | int:
    """Train the unconverted network for the budget and for twice of it; say whether conversion can pay.

    Takes the arguments of ``compare``. Both runs start from ``model``, each with a learning-rate schedule of its own
    length; the last epoch of each is scored. Returns the number of the signal that stopped it, where one did: the same
    call goes on. Raises as ``compare`` does, also for an output in which another model, other images or options began.
    """
    given = study_inputs(model, options, data, output)
    folder = Path(given.training.output) / "quick"
    display = display or (console_display if progress else Callback)
    original, training, parts = given.original, arm_options(Arm("static"), given.training), given.parts
    images, epochs = (parts.train, parts.val), (training.schedule.epochs, 2 * training.schedule.epochs)
    scored, train, val = even_subset(parts.train, MOST_IMAGES), [], []
    with open_world() as world, catch_signals() as request:
        _begin(folder, run_settings(original, training, parts), world)
        for length in epochs:
            run = training.updated({"output": str(folder / str(length)), "schedule": {"epochs": length}})
            trained = copy.deepcopy(original)
            callback = display() if world.is_first else Callback()
            result = train_run(trained, run, world, request, callback, resume=True, images=images)
            if not is_over(result, run):
                return result.stopped_by
            last = load(f"{run.output}/last.safetensors", model=copy.deepcopy(original), trust=run.trust)
            train.append(correct_images(last, scored, run, world))
            val.append(correct_images(last, parts.val, run, world))
    shares = [tuple(text.count("1") / len(text) for text in texts) for texts in (train, val)]
    longer = paired_difference([val[1]], [val[0]])
    chance = max(scored.counts()) / len(scored)
    top1 = (shares[0][0], shares[0][1]), (shares[1][0], shares[1][1])
    return QuickCheck(epochs, *top1, longer, parts.origin, chance, len(scored))


def _begin(folder: Path, settings: dict[str, Any], world: World) -> None:
    """Record the model, images and options of the runs in ``folder``. Raises ``InputError`` where theirs are others."""
    before = read_quick_settings(folder)
    world.barrier()  # every process has looked
    if before is not None:
        require_same_quick_check(before, settings, folder)
    elif world.is_first:
        make_folder(folder)
        write_quick_settings(folder, settings)
