"""Distillation of logits (Hinton, Vinyals, Dean 2015, arXiv 1503.02531) and of feature maps from a teacher."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condconv_surgery.data.labelled_images import logit_of_each_class
from condconv_surgery.errors import InputError, SurgeryError, listed, nearest, unknown_name
from condconv_surgery.models.classifier_logits import logits_of
from condconv_surgery.models.sources import load_model
from condconv_surgery.recipe import InputSpec, Recipe, recipe_of
from condconv_surgery.recipe.training_sections import DistillOptions
from condconv_surgery.runtime.class_names import classes_of
from condconv_surgery.runtime.modes import device_of

MODEL_NAME = re.compile(r"[\w.]+:[\w./-]+")
"""``torchvision:resnet18``, ``package.module:function``."""


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch. Logits [B, K]."""
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum (s - t)^2 / sum t^2``: 0 for equal maps, 1 for a student of zeros."""
    t = teacher.float()
    return (student.float() - t).square().sum() / t.square().sum().clamp_min(torch.finfo(t.dtype).tiny)


class FeatureRecorder:
    """Records the outputs of some layers, each time they run."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.outputs: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                close = (nearest(name, modules, 1) or [*modules][1:2] or [""])[0]
                raise unknown_name("layer in distill.features", name, modules, f'distill.features=["{close}"]')
        self.handles = [modules[name].register_forward_hook(partial(self._record, name)) for name in names]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _record(self, name: str, module: nn.Module, args: object, output: object) -> None:
        if not isinstance(output, Tensor):
            raise InputError(
                f"The layer {name} returns a {type(output).__name__}.",
                "distill.features compares tensors.",
                "name a layer that returns one",
            )
        self.outputs[name] = output


def renormalisation(student: InputSpec, teacher: InputSpec) -> tuple[Tensor, Tensor] | None:
    """Scale and shift, each [C, 1, 1], that turn the student's input into the teacher's; ``None`` for equal ones.

    ``x std_s / std_t + (mean_s - mean_t) / std_t``
    """
    if (student.mean, student.std) == (teacher.mean, teacher.std) or student.channels != teacher.channels:
        return None
    mean_s, std_s, mean_t, std_t = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
        for values in (student.mean, student.std, teacher.mean, teacher.std)
    )
    return (std_s / std_t).float(), ((mean_s - mean_t) / std_t).float()


def class_order(student: tuple[str, ...], teacher: tuple[str, ...]) -> Tensor | None:
    """The index in the teacher's logits of each of the student's classes; ``None`` for equal or unknown names.

    Raises ``InputError`` when the teacher does not have all of them.
    """
    if not student or not teacher or student == teacher:
        return None
    order = logit_of_each_class(student, teacher)
    if order is None:
        raise InputError(
            f"The teacher does not have the classes {listed(sorted(set(student) - set(teacher)))}.",
            f"Logits are compared by the names of their classes; the teacher's are {listed(teacher)}.",
            "class folders named as the teacher's classes, or a teacher that was fine-tuned on these",
        )
    return order


class Teacher:
    """A frozen network, and the loss between it and the student.

    The recipes of both say how the teacher's images are normalised where the student's are not, and which of its
    logits is the one of each of the student's classes.
    """

    def __init__(self, model: nn.Module, student: nn.Module, options: DistillOptions) -> None:
        self.model = model.requires_grad_(False)
        self.model.eval()  # returns None where a model's own train() does
        self.options = options
        device, mine, its = device_of(model), recipe_of(student), recipe_of(model)
        if mine is None or its is None:  # then it is taken to be as the student
            mine = its = Recipe()
        scaling = renormalisation(mine.input, its.input)
        order = class_order(classes_of(student), classes_of(model)) if options.weight else None
        self.scaling = None if scaling is None else (scaling[0].to(device), scaling[1].to(device))
        self.order = None if order is None else order.to(device)
        self.teacher_features = FeatureRecorder(self.model, options.features)
        self.student_features = FeatureRecorder(student, options.features)

    def loss(self, images: Tensor, student: Tensor) -> tuple[Tensor, Tensor | float]:
        """The loss on the logits and the mean loss on the feature maps, for the batch that the student just processed.

        Raises ``InputError`` when the teacher has another number of classes.
        """
        with torch.no_grad():
            logits = logits_of(self.model(self._normalised(images))).main
        on_logits = student.new_zeros(()) if not self.options.weight else self._on_logits(student, logits)
        maps = [
            feature_loss(self.student_features.outputs[name], self.teacher_features.outputs[name])
            for name in self.options.features
        ]
        return on_logits, sum(maps) / len(maps) if maps else 0.0

    def close(self) -> None:
        self.student_features.close()
        self.teacher_features.close()

    def _normalised(self, images: Tensor) -> Tensor:
        return images if self.scaling is None else images * self.scaling[0] + self.scaling[1]

    def _on_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.order is not None:
            teacher = teacher[:, self.order]
        if student.shape != teacher.shape:
            raise InputError(
                f"The teacher has {teacher.shape[1]} classes, the images have {student.shape[1]}.",
                "Logits are compared class by class.",
                'fine-tune the unconverted model first and convert that, or distill.teacher="OTHER/best.safetensors"',
            )
        return distillation_loss(student, teacher, self.options.temperature)


def teacher_model(
    options: DistillOptions, start: nn.Module, heads: dict[str, int], trust: tuple[str, ...] = ()
) -> nn.Module | None:
    """The teacher that the options name: a copy of the model before training, a model by name or file, or ``None``.

    A converted model starts as the same function as the original one, so its copy is the unconverted teacher.
    trust: packages whose code may build a teacher from a file. Raises ``InputError`` for a copy with a new, untrained
    head (``heads``), unless only features are compared.
    """
    if not options.teacher:
        return None
    if options.teacher == "start" and heads and options.weight:
        raise InputError(
            f"The teacher is the model as it starts, but its head {next(iter(heads))} is new and untrained.",
            "A teacher must have been trained on the classes of the images.",
            'fine-tune the unconverted model first and convert that, or distill.teacher="OTHER/best.safetensors"',
        )
    if options.teacher == "start":
        return copy.deepcopy(start)
    try:
        return load_model(options.teacher, trust=trust).float()
    except SurgeryError as error:
        raise _of_teacher(options.teacher, error) from error


def _of_teacher(name: str, error: SurgeryError) -> SurgeryError:
    """The error for a teacher that cannot be loaded: advice on a model is advice on the teacher here."""
    if error.fix.startswith("trust="):
        fix = error.fix
    elif MODEL_NAME.fullmatch(error.fix):
        fix = f'distill.teacher="{error.fix}"'
    else:
        fix = 'distill.teacher="start", the model before training, or distill.teacher="FILE.safetensors"'
    return type(error)(f"The teacher {name} cannot be loaded. {error.given}", error.allowed, fix)
