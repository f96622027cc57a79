"""All options of a training run, in sections as in a recipe file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from condconv_surgery.errors import InputError, nearest, unknown_name
from condconv_surgery.recipe.option_rules import ALL_OPTIONS, Section, option, rules
from condconv_surgery.recipe.training_sections import (
    AugmentOptions,
    DataOptions,
    DistillOptions,
    EngineOptions,
    LayerOptions,
    OptimizerOptions,
    ScheduleOptions,
)

FINETUNE_CALL = 'finetune("MODEL", data="FOLDER", output="RUN")'
"""What an error message tells a user to call."""


@dataclass(frozen=True)
class TrainingOptions(Section):
    """The whole recipe of a training run."""

    model: str = option("", "model to train: a file, torchvision:NAME, timm:NAME, package.module:factory")
    arch: str | None = option(
        None,
        "architecture of a file that holds only a state_dict: torchvision:NAME, timm:NAME",
        kind=str,
        flag="--arch",
    )
    weights: str = option("default", "weights of a model given by name: default, none or a file", flag="--weights")
    trust: tuple[str, ...] = option((), "packages whose code may be run to build the model", kind=str, flag="--trust")
    output: str = option("", "folder of the run", flag="-o")
    seed: int = option(0, "seed of the split, the order of images, the transforms and a new head", low=0, flag="--seed")
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
                f'schedule.early_stop={self.schedule.early_stop} with layers.batch_norm="recalibrate".',
                "Statistics are recomputed after the last epoch, which early stopping does not know in advance.",
                'schedule.early_stop=0, or layers.batch_norm="train"',
            )

    def sections(self) -> dict[str, Section]:
        """The sections by name, in the order of the file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Section)}

    def require_complete(self, *, model_is_given: bool = False) -> None:
        """Raise ``InputError`` when the model, the images or the folder to write is not given."""
        for value, what, fix in (
            (self.model or model_is_given, "No model is given.", FINETUNE_CALL),
            (self.data.folder, "No images are given.", 'data="FOLDER"'),
            (self.output, "No output folder is given.", 'output="RUN"'),
        ):
            if not value:
                raise InputError(what, "finetune needs a model, a folder of images and a folder to write.", fix)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainingOptions:
        """The inverse of ``to_dict``; options left out keep their defaults. Raises ``InputError``."""
        return cls().updated(data)

    def updated(self, changes: dict[str, Any]) -> TrainingOptions:
        """A copy with changes: ``{"seed": 1, "optimizer": {"lr": 0.01}}``, or ``{"optimizer.lr": 0.01}``."""
        known = {**self.sections(), **rules(type(self))}
        values: dict[str, Any] = {}
        for name, value in _in_sections(changes).items():
            if name not in known:
                raise self._unknown(name, value)
            section = self.sections().get(name)
            if section is None:
                values[name] = value
            elif isinstance(value, dict):
                for key in value.keys() - rules(type(section)).keys():
                    if error := self._in_a_section(key, value[key]):
                        raise error
                values[name] = type(section).from_dict({**asdict(section), **value})
            else:
                raise InputError(f"{name} is {value!r}.", "It is a section: a mapping of options.", f"[{name}]")
        return replace(self, **values)

    def _unknown(self, name: str, value: object) -> InputError:
        """The error for a name that is neither an option of the run nor a section."""
        if not isinstance(value, dict) and (error := self._in_a_section(name, value, or_nearly=True)):
            return error
        known = {**self.sections(), **rules(type(self))}
        return unknown_name("option or section of the recipe", name, known, f"{ALL_OPTIONS} prints them all")

    def _in_a_section(self, name: str, value: object, *, or_nearly: bool = False) -> InputError | None:
        """The error for an option that (another) section has by this name; ``None`` where no section has it."""
        paths: dict[str, list[str]] = {}
        for title, section in self.sections().items():
            for option_name in rules(type(section)):
                paths.setdefault(option_name, []).append(f"{title}.{option_name}")
        close = [name] if name in paths or not or_nearly else nearest(name, paths, 1)
        found = paths.get(close[0], []) if close else []
        if not found:
            return None
        return InputError(
            f"Unknown option or section of the recipe {name!r}.",
            f"{'It is' if close[0] == name else 'Nearest:'} {' or '.join(found)}.",
            f"{found[0]}={value!r}",
        )


def _in_sections(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with names as messages write them, ``optimizer.lr``, put into their sections."""
    nested: dict[str, Any] = {}
    for name, value in changes.items():
        section, dot, key = name.partition(".")
        within = nested.get(section, {})
        if dot and isinstance(within, dict):
            nested[section] = {**within, key: value}
        else:
            nested[name] = {**within, **value} if isinstance(value, dict) and isinstance(within, dict) else value
    return nested
