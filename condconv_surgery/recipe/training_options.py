"""Every decision of a training run, in sections as the recipe file has them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.recipe.option_rules import Section, option, rules
from condconv_surgery.recipe.training_sections import (
    AugmentOptions,
    DataOptions,
    DistillOptions,
    EngineOptions,
    LayerOptions,
    OptimizerOptions,
    ScheduleOptions,
)


@dataclass(frozen=True)
class TrainingOptions(Section):
    """The whole recipe of a training run."""

    model: str = option("", "what to train: a file, torchvision:NAME, timm:NAME, package.module:factory")
    arch: str | None = option(None, "architecture of a file of weights that is not recognised", kind=str, flag="--arch")
    weights: str = option("default", "of a model by name: default, none or a file", flag="--weights")
    trust: tuple[str, ...] = option((), "packages whose code may build the model", kind=str, flag="--trust")
    output: str = option("", "the folder that the run writes", flag="-o")
    seed: int = option(0, "of the split, the order, the transforms and a new head", low=0, flag="--seed")
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    layers: LayerOptions = field(default_factory=LayerOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule.early_stop and self.layers.batch_norm == "recalibrate":
            raise InputError(
                "schedule.early_stop with layers.batch_norm = recalibrate.",
                "Statistics are measured anew after the last epoch, which then nobody knows beforehand.",
                "--set schedule.early_stop=0, or --batch-norm train",
            )

    def sections(self) -> dict[str, Section]:
        """The sections by name, in the order of the file."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Section)}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainingOptions:
        """The inverse of ``to_dict``; options left out keep their defaults. Raises ``InputError``."""
        return cls().updated(data)

    def updated(self, changes: dict[str, Any]) -> TrainingOptions:
        """A copy with some options changed: ``{"seed": 1, "optimizer": {"lr": 0.01}}``."""
        known = {**self.sections(), **rules(type(self))}
        values: dict[str, Any] = {}
        for name, value in changes.items():
            if name not in known:
                raise unknown_name("option or section of the recipe", name, known, "--print-recipe shows them all")
            section = self.sections().get(name)
            if section is None:
                values[name] = value
            elif isinstance(value, dict):
                values[name] = type(section).from_dict({**asdict(section), **value})
            else:
                raise InputError(f"{name} is {value!r}.", "It is a section with options in it.", f"[{name}]")
        return replace(self, **values)
