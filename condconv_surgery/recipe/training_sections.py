"""The sections of a training recipe: options with defaults, help texts and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.option_rules import Section, option


@dataclass(frozen=True)
class DataOptions(Section):
    """The images, and how they are read."""

    title: ClassVar[str] = "data"

    folder: str = option(
        "",
        "images: FOLDER/CLASS/*.png or FOLDER/train and FOLDER/val; x-{00..99}.tar; torchvision:NAME; hf:PATH_OR_NAME",
        flag="--data",
    )
    val: str = option("", "separate validation images: a folder, shards, or the split of a hf: data set")
    layout: str = option(
        "auto",
        "auto: folders named train, val and test are parts; classes: each folder is a class, whatever its name",
        choices=("auto", "classes"),
    )
    root: str = option("data", "folder of torchvision's data sets")
    download: bool = option(False, "download missing data sets of torchvision")
    image: str = option("", "hf: column of the images; not set: the only such column")
    label: str = option("", "hf: column of the classes; not set: the only such column")
    streaming: bool = option(False, "hf: read the data set from the start each epoch and do not store it")
    buffer: int = option(1000, "streaming: size of the shuffle buffer, in images", low=1)
    val_fraction: float = option(
        0.2,
        "share of each class used for validation where there are no separate validation images",
        low=0.001,
        high=0.9,
    )
    group_duplicates: bool = option(
        False, "keep equal and nearly equal images on one side of a split; decodes every image first"
    )
    image_size: int | None = option(
        None, "side of the input in pixels; not set: that of the model", kind=int, low=8, flag="--image-size"
    )
    batch_size: int = option(32, "images per optimizer step, over all processes", low=1, flag="--batch-size")
    workers: int = option(2, "processes that read images, per training process", low=0, flag="--workers")
    max_bad: int = option(0, "number of unreadable images to skip before the run fails", low=0, flag="--max-bad")


@dataclass(frozen=True)
class AugmentOptions(Section):
    """Random transforms of the training images (torchvision.transforms.v2)."""

    title: ClassVar[str] = "augment"

    crop: tuple[float, ...] = option(
        (0.35, 1.0), "area of a random crop as a share of the image: minimum, maximum", low=0.01, high=1.0
    )
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    policy: str = option(
        "none", "policy of random operations on each image", choices=("none", "randaugment", "trivialaugment")
    )
    magnitude: int = option(9, "magnitude of randaugment", low=0, high=30)
    erasing: float = option(0.0, "probability of erasing a rectangle", low=0, high=1)
    mixup: float = option(0.0, "alpha of mixup; 0: off", low=0)
    cutmix: float = option(0.0, "alpha of CutMix; 0: off; with mixup, one of them per batch at random", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.crop) != 2 or self.crop[0] > self.crop[1]:
            raise InputError(
                f"augment.crop is {list(self.crop)}.",
                "It must be two numbers, minimum and maximum.",
                "augment.crop=[0.35, 1.0]",
            )


@dataclass(frozen=True)
class OptimizerOptions(Section):
    """The optimizer and the loss."""

    title: ClassVar[str] = "optimizer"

    name: str = option("adamw", "optimizer: any of torch.optim that needs no closure", flag="--optimizer")
    lr: float = option(1e-3, "peak learning rate", low=0, above=True, flag="--lr")
    weight_decay: float = option(
        0.05, "weight decay; norms, biases and routers have none", low=0, flag="--weight-decay"
    )
    momentum: float = option(0.9, "momentum of the optimizers that have it", low=0, high=0.9999)
    betas: tuple[float, ...] = option((0.9, 0.999), "betas of the optimizers that have them", low=0, high=0.999999)
    label_smoothing: float = option(
        0.1,
        "label smoothing: share of the target that is spread over all classes",
        low=0,
        high=0.99,
        flag="--label-smoothing",
    )
    class_weights: bool = option(False, "weight classes by the inverse of their number of images")
    clip_norm: float = option(1.0, "maximum norm of the gradient; 0: no clipping", low=0)
    accumulate: int = option(1, "micro-batches per step in each process", low=1, flag="--accumulate")
    layer_decay: float = option(
        1.0,
        "learning rate of the first layer relative to the last one, geometric in between",
        low=0,
        high=1,
        above=True,
    )


@dataclass(frozen=True)
class ScheduleOptions(Section):
    """Learning rate and temperature over the steps."""

    title: ClassVar[str] = "schedule"

    epochs: int = option(10, "epochs: passes over the training images", low=1, flag="--epochs")
    shape: str = option("cosine", "shape of the learning rate after warm-up", choices=("cosine", "step", "constant"))
    warmup: float = option(
        0.05, "warm-up of the learning rate, as a share of all steps", low=0, high=1, flag="--warmup"
    )
    final_lr: float = option(0.01, "cosine: final learning rate relative to the peak", low=0, high=1)
    milestones: tuple[int, ...] = option(
        (), "step: epochs after which the learning rate is multiplied by gamma", kind=int, low=1
    )
    gamma: float = option(0.1, "step: factor of the learning rate at each milestone", low=0, high=1)
    early_stop: int = option(0, "epochs without a better top-1 before the run ends; 0: never", low=0)
    temperature: float | None = option(
        None,
        "temperature at the first step (30 in the papers of DynamicConv and ODConv); not set: no annealing",
        kind=float,
        low=0,
        above=True,
        flag="--temperature",
    )
    temperature_end: float = option(1.0, "temperature after annealing", low=0, above=True)
    temperature_steps: float = option(0.1, "length of the annealing as a share of all steps", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.shape == "step") != bool(self.milestones):
            raise InputError(
                f"schedule.shape is {self.shape} and schedule.milestones is {list(self.milestones)}.",
                "Milestones belong to the shape step, and to no other.",
                'schedule.shape="step" with schedule.milestones=[6, 8], or neither',
            )


@dataclass(frozen=True)
class LayerOptions(Section):
    """Options of single layers, above all of conditional ones."""

    title: ClassVar[str] = "layers"

    router_lr: float = option(1.0, "learning rate of routers relative to optimizer.lr", low=0)
    expert_lr: float = option(1.0, "learning rate of experts relative to optimizer.lr", low=0)
    router_decay: float = option(0.0, "weight decay of routers relative to optimizer.weight_decay", low=0)
    expert_decay: float = option(1.0, "weight decay of experts relative to optimizer.weight_decay", low=0)
    warm_routers: int = option(
        0, "first epochs in which only routers and a new head are trained", low=0, flag="--warm-routers"
    )
    freeze: tuple[str, ...] = option((), "globs of layer names that are not trained", kind=str, flag="--freeze")
    expert_dropout: float = option(0.0, "probability of dropping an expert for an image", low=0, high=0.99)
    balance: float = option(0.0, "weight of the balance loss, log E - H(mean gate): all experts are used", low=0)
    sharpness: float = option(0.0, "weight of the sharpness loss, mean H(gate): each image uses few experts", low=0)
    batch_norm: str = option(
        "train",
        "batch-norm statistics: train, freeze (keep those of the model), recalibrate (recompute after the last epoch)",
        choices=("train", "freeze", "recalibrate"),
        flag="--batch-norm",
    )


@dataclass(frozen=True)
class DistillOptions(Section):
    """Distillation from a teacher."""

    title: ClassVar[str] = "distill"

    teacher: str = option(
        "", "teacher: start (the model before training) or any model; not set: none", flag="--distill"
    )
    weight: float = option(
        0.5, "weight of the loss on the teacher's logits; the rest is that of the labels", low=0, high=1
    )
    temperature: float = option(2.0, "temperature that divides the logits of both", low=0, above=True)
    features: tuple[str, ...] = option(
        (), "layers, with the same name in both models, whose outputs are compared", kind=str
    )
    feature_weight: float = option(1.0, "weight of the relative squared difference of those outputs", low=0)


@dataclass(frozen=True)
class EngineOptions(Section):
    """Precision, memory, processes and files of a run."""

    title: ClassVar[str] = "engine"

    precision: str = option(
        "fp32",
        "precision of the computation; bf16 and fp16 by autocast",
        choices=("fp32", "bf16", "fp16"),
        flag="--precision",
    )
    ema: float = option(
        0.0,
        "decay per step of averaged weights (EMA), which are scored and saved instead; 0: off",
        low=0,
        high=0.99999,
        flag="--ema",
    )
    channels_last: bool = option(False, "use the channels-last memory format")
    compile: bool = option(False, "compile the model with torch.compile")
    checkpointing: bool = option(False, "gradient checkpointing of blocks: less memory, more time")
    sync_batch_norm: bool = option(False, "synchronise batch norms over all processes (GPUs only)")
    shard: bool = option(False, "shard weights and optimizer state over the processes (FSDP2)")
    deterministic: bool = option(False, "use only deterministic algorithms: bit-exact repetition on GPUs, slower")
    save_every: int = option(
        500, "steps between saved states; one more is saved at the end of each epoch", low=1, flag="--save-every"
    )
    tensorboard: bool = option(False, "write TensorBoard events into the run's folder")
