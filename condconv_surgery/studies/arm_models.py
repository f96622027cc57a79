"""The model of an arm: a copy of the original network, converted where the arm says so."""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from condconv_surgery.data.calibration_images import calibration_subset
from condconv_surgery.data.labelled_images import LabelledImages
from condconv_surgery.errors import SurgeryError
from condconv_surgery.recipe import InputSpec, Selection
from condconv_surgery.recipe.study_arms import Arm
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.recipe.training_sections import LayerOptions
from condconv_surgery.surgery import convert
from condconv_surgery.surgery.observe.pooled_features import FEWEST_IMAGES
from condconv_surgery.surgery.upcycle import start_of
from condconv_surgery.training.monitor.unused_options import CONDITIONAL_ONLY


class ArmModels:
    """Makes the models of a study. images: of the training part, which show converted routers where features vary."""

    def __init__(self, original: nn.Module, images: LabelledImages, spec: InputSpec) -> None:
        self.original, self.images, self.spec = original, images, spec

    def make(self, arm: Arm, seed: int) -> nn.Module:
        """A model to train, of its own memory; equal for equal arguments. Raises ``InputError``, ``ProofError``."""
        model = copy.deepcopy(self.original)
        if arm.variant is None:
            return model
        chosen = replace(arm.upcycling, seed=seed)
        options: dict[str, Any] = {**_selection(arm.selection), **asdict(chosen)}
        if start_of(arm.variant, chosen) != "noise" and self.calibration:
            options["calibration"] = self.calibration
        try:
            return convert(model, arm.variant, inplace=True, **options).model
        except SurgeryError as error:
            fix = re.sub(
                r'^(\w+)=\["([^"]+)"\]$', rf'arms=["{arm.variant.kind}:{arm.variant.experts},\1=\2"]', error.fix
            )
            raise type(error)(f"The arm {arm.name}: {error.given}", error.allowed, fix) from error

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Batches of images; none where they are too few to show directions."""
        batches = calibration_subset(self.images, self.spec)
        return batches if sum(map(len, batches)) >= FEWEST_IMAGES else []


def arm_options(arm: Arm, shared: TrainingOptions) -> TrainingOptions:
    """The options of the arm's runs: its own before those of the study, without options that a static network lacks."""
    options = shared.updated(dict(arm.training))
    if arm.variant is not None:
        return options
    plain = asdict(LayerOptions())
    unused = {name: plain[name] for name in (*CONDITIONAL_ONLY, "warm_routers")}
    schedule = {"temperature": None, "temperature_end": 1.0, "temperature_steps": 0.1}
    return options.updated({"layers": unused, "schedule": schedule})


def _selection(selection: Selection) -> dict[str, Any]:
    return {name: getattr(selection, name) for name in selection.__dataclass_fields__}
