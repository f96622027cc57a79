"""Every decision of a training run, in sections as the recipe file has them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.recipe.options import Section, option, rules


@dataclass(frozen=True)
class DataOptions(Section):
    """Which pictures, and how they are read."""

    title: ClassVar[str] = "data"

    folder: str = option("", "pictures: FOLDER/CLASS/*.png, or FOLDER/train/CLASS and FOLDER/val/CLASS", flag="--data")
    val_fraction: float = option(
        0.2, "share of each class kept for validation where there is no val folder", low=0.001, high=0.9
    )
    image_size: int | None = option(
        None, "side in pixels; not set: the model's own", kind=int, low=8, flag="--image-size"
    )
    batch_size: int = option(32, "pictures per optimizer step, over all processes", low=1, flag="--batch-size")
    workers: int = option(2, "processes that read pictures, for each training process", low=0, flag="--workers")
    max_bad: int = option(
        0, "unreadable pictures that are passed over before the run is refused", low=0, flag="--max-bad"
    )


@dataclass(frozen=True)
class AugmentOptions(Section):
    """Random transforms of the training pictures (torchvision.transforms.v2)."""

    title: ClassVar[str] = "augment"

    crop: tuple[float, ...] = option(
        (0.35, 1.0), "share of the area that a random crop keeps: least, most", low=0.01, high=1.0
    )
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.crop) != 2 or self.crop[0] > self.crop[1]:
            raise InputError(
                f"augment.crop is {list(self.crop)}.",
                "It must be two numbers, least and most.",
                "--set augment.crop=[0.35,1.0]",
            )


@dataclass(frozen=True)
class OptimizerOptions(Section):
    """How the weights move."""

    title: ClassVar[str] = "optimizer"

    lr: float = option(1e-3, "peak learning rate", low=0, above=True, flag="--lr")
    weight_decay: float = option(0.05, "of weights; norms, biases and routers have none", low=0, flag="--weight-decay")
    label_smoothing: float = option(
        0.1, "share of the target spread over all classes", low=0, high=0.99, flag="--label-smoothing"
    )
    clip_norm: float = option(1.0, "largest norm of the whole gradient; 0: not clipped", low=0)


@dataclass(frozen=True)
class ScheduleOptions(Section):
    """How the learning rate and the temperature run over the steps."""

    title: ClassVar[str] = "schedule"

    epochs: int = option(10, "passes over the training pictures", low=1, flag="--epochs")
    warmup: float = option(0.05, "share of all steps in which the rate rises from 0", low=0, high=1, flag="--warmup")
    final_lr: float = option(0.01, "last learning rate as a share of the peak", low=0, high=1)
    temperature: float | None = option(
        None,
        "temperature of the first step, for layers that have one; not set: as it is",
        kind=float,
        low=0,
        above=True,
        flag="--temperature",
    )
    temperature_end: float = option(1.0, "temperature after annealing", low=0, above=True)
    temperature_steps: float = option(0.1, "share of all steps in which the temperature falls", low=0, high=1)


@dataclass(frozen=True)
class EngineOptions(Section):
    """How the computer does it."""

    title: ClassVar[str] = "engine"

    precision: str = option("fp32", "bf16: autocast", choices=("fp32", "bf16"), flag="--precision")
    save_every: int = option(500, "steps between states, besides one at each epoch's end", low=1, flag="--save-every")


@dataclass(frozen=True)
class TrainingOptions(Section):
    """The whole recipe of a training run."""

    model: str = option("", "what to train: a file, torchvision:NAME, timm:NAME, package.module:factory")
    output: str = option("", "the folder that the run writes", flag="-o")
    seed: int = option(0, "of the split, the order, the transforms and a new head", low=0, flag="--seed")
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)

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
