"""The sections of a training recipe, each a group of decisions with its meanings and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.option_rules import Section, option


@dataclass(frozen=True)
class DataOptions(Section):
    """Which images, and how they are read."""

    title: ClassVar[str] = "data"

    folder: str = option(
        "",
        "FOLDER/CLASS/*.png, or FOLDER/train and FOLDER/val; shards-{000..127}.tar; torchvision:NAME; hf:PATH_OR_NAME",
        flag="--data",
    )
    val: str = option("", "validation images where they lie apart: a folder, shards, or the split of a hf: data set")
    root: str = option("data", "where torchvision's data sets lie")
    download: bool = option(False, "let torchvision download what is not there")
    image: str = option("", "hf: the column of images; not set: the only one")
    label: str = option("", "hf: the column of classes; not set: the only one")
    streaming: bool = option(False, "hf: read the set over and over and never store it")
    buffer: int = option(1000, "streaming: images among which the next one is drawn", low=1)
    val_fraction: float = option(
        0.2, "share of each class kept for validation where nothing is set apart", low=0.001, high=0.9
    )
    image_size: int | None = option(
        None, "side in pixels; not set: the model's own", kind=int, low=8, flag="--image-size"
    )
    batch_size: int = option(32, "images per optimizer step, over all processes", low=1, flag="--batch-size")
    workers: int = option(2, "processes that read images, for each training process", low=0, flag="--workers")
    max_bad: int = option(
        0, "unreadable images that are passed over before the run is refused", low=0, flag="--max-bad"
    )


@dataclass(frozen=True)
class AugmentOptions(Section):
    """Random transforms of the training images (torchvision.transforms.v2)."""

    title: ClassVar[str] = "augment"

    crop: tuple[float, ...] = option(
        (0.35, 1.0), "share of the area that a random crop keeps: least, most", low=0.01, high=1.0
    )
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    policy: str = option("none", "random operations on each image", choices=("none", "randaugment", "trivialaugment"))
    magnitude: int = option(9, "strength of randaugment", low=0, high=30)
    erasing: float = option(0.0, "probability that a rectangle is erased", low=0, high=1)
    mixup: float = option(0.0, "alpha of mixup; 0: off", low=0)
    cutmix: float = option(0.0, "alpha of CutMix; 0: off; with mixup, each batch draws one of them", low=0)

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

    name: str = option("adamw", "any optimizer of torch.optim that needs no closure", flag="--optimizer")
    lr: float = option(1e-3, "peak learning rate", low=0, above=True, flag="--lr")
    weight_decay: float = option(0.05, "of weights; norms, biases and routers have none", low=0, flag="--weight-decay")
    momentum: float = option(0.9, "for the optimizers that have it", low=0, high=0.9999)
    betas: tuple[float, ...] = option((0.9, 0.999), "for the optimizers that have them", low=0, high=0.999999)
    label_smoothing: float = option(
        0.1, "share of the target spread over all classes", low=0, high=0.99, flag="--label-smoothing"
    )
    class_weights: bool = option(False, "weigh classes by the inverse of their number of images")
    clip_norm: float = option(1.0, "largest norm of the whole gradient; 0: not clipped", low=0)
    accumulate: int = option(1, "parts that each process splits its share of a batch into", low=1, flag="--accumulate")
    layer_decay: float = option(
        1.0, "rate of the first layer as a share of the last one's, geometric between", low=0, high=1, above=True
    )


@dataclass(frozen=True)
class ScheduleOptions(Section):
    """How the learning rate and the temperature run over the steps."""

    title: ClassVar[str] = "schedule"

    epochs: int = option(10, "passes over the training images", low=1, flag="--epochs")
    shape: str = option("cosine", "of the rate after warm-up", choices=("cosine", "step", "constant"))
    warmup: float = option(0.05, "share of all steps in which the rate rises from 0", low=0, high=1, flag="--warmup")
    final_lr: float = option(0.01, "cosine: last learning rate as a share of the peak", low=0, high=1)
    milestones: tuple[int, ...] = option(
        (), "step: epochs after which the rate is multiplied by gamma", kind=int, low=1
    )
    gamma: float = option(0.1, "step: factor at each milestone", low=0, high=1)
    early_stop: int = option(0, "epochs without a better top-1 after which the run ends; 0: never", low=0)
    temperature: float | None = option(
        None,
        "temperature of the first step, for layers that have one (30 in the papers); not set: as it is",
        kind=float,
        low=0,
        above=True,
        flag="--temperature",
    )
    temperature_end: float = option(1.0, "temperature after annealing", low=0, above=True)
    temperature_steps: float = option(0.1, "share of all steps in which the temperature falls", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.shape == "step") != bool(self.milestones):
            raise InputError(
                f"schedule.shape is {self.shape} and schedule.milestones is {list(self.milestones)}.",
                "The rate falls in steps at milestones, and no other shape has any.",
                "--set schedule.shape=step --set schedule.milestones=[6,8], or neither",
            )


@dataclass(frozen=True)
class LayerOptions(Section):
    """What is particular to some layers, above all conditional ones."""

    title: ClassVar[str] = "layers"

    router_lr: float = option(1.0, "rate of routers as a share of the rate", low=0)
    expert_lr: float = option(1.0, "rate of experts as a share of the rate", low=0)
    router_decay: float = option(0.0, "weight decay of routers as a share of the weight decay", low=0)
    expert_decay: float = option(1.0, "weight decay of experts as a share of the weight decay", low=0)
    warm_routers: int = option(
        0, "first epochs in which only routers (and a new head) learn", low=0, flag="--warm-routers"
    )
    freeze: tuple[str, ...] = option((), "globs over layer names that do not learn", kind=str, flag="--freeze")
    expert_dropout: float = option(0.0, "probability that an expert is left out for a image", low=0, high=0.99)
    balance: float = option(0.0, "weight of log E minus the entropy of the mean gate: all experts are used", low=0)
    sharpness: float = option(0.0, "weight of the mean entropy of the gates: each image has few experts", low=0)
    batch_norm: str = option(
        "train",
        "freeze: keep the trained statistics; recalibrate: measure them anew after the last epoch",
        choices=("train", "freeze", "recalibrate"),
        flag="--batch-norm",
    )


@dataclass(frozen=True)
class DistillOptions(Section):
    """A teacher beside the labels."""

    title: ClassVar[str] = "distill"

    teacher: str = option(
        "", "start: the model as it is before training; or any model; not set: none", flag="--distill"
    )
    weight: float = option(0.5, "share of the teacher's logits in the loss", low=0, high=1)
    temperature: float = option(2.0, "divides both logits", low=0, above=True)
    features: tuple[str, ...] = option((), "layers, of the same name in both, whose outputs are compared", kind=str)
    feature_weight: float = option(1.0, "of the relative squared difference of those outputs", low=0)


@dataclass(frozen=True)
class EngineOptions(Section):
    """How the computer does it."""

    title: ClassVar[str] = "engine"

    precision: str = option("fp32", "bf16, fp16: autocast", choices=("fp32", "bf16", "fp16"), flag="--precision")
    ema: float = option(
        0.0,
        "decay per step of averaged weights, which are then scored and saved; 0: off",
        low=0,
        high=0.99999,
        flag="--ema",
    )
    channels_last: bool = option(False, "memory format of images and kernels")
    compile: bool = option(False, "torch.compile the model")
    checkpointing: bool = option(False, "recompute the inside of blocks in the backward pass: less memory, more time")
    sync_batch_norm: bool = option(False, "batch statistics over all processes (GPUs only)")
    shard: bool = option(False, "split weights and optimizer state over the processes (FSDP2)")
    deterministic: bool = option(False, "only deterministic algorithms; exact repetition on GPUs, slower")
    save_every: int = option(500, "steps between states, besides one at each epoch's end", low=1, flag="--save-every")
    tensorboard: bool = option(False, "also write TensorBoard events into the run's folder")
