"""Find the classifier heads of a model, and fit them to the number of classes and to their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor, nn

from condconv_surgery.errors import InputError, one_line
from condconv_surgery.layers import ConditionalConv2d, ConditionalLinear, conditional_like
from condconv_surgery.models.build_model import resized
from condconv_surgery.models.classifier_logits import are_probabilities, matrices_of, other_tensors
from condconv_surgery.models.transformers_source import name_labels
from condconv_surgery.recipe import InputSpec, Recipe, attach_recipe, recipe_of
from condconv_surgery.runtime.class_names import classes_of
from condconv_surgery.runtime.model_call import image_keyword
from condconv_surgery.runtime.modes import in_mode
from condconv_surgery.runtime.snapshot import preserving_state
from condconv_surgery.training.head_order import is_reordered, reorder_heads

TOO_SMALL = ("output size is too small", "kernel size can't be greater than actual input size", "expected more than 1")
"""What torch says of an image that is smaller than a network needs."""


def fit_heads(model: nn.Module, classes: tuple[str, ...], spec: InputSpec) -> dict[str, int]:
    """Give every head of ``model`` one logit per class, in place; returns the widths of the new heads by name.

    A head of the right width is kept as trained; where the recipe has the same classes in another order, its rows are
    put in the order of ``classes``. A new one is initialised from torch's global generator. The recipe of the model
    records the new widths and the class names. Raises ``InputError`` when a head can be neither found nor reordered.
    """
    recipe = recipe_of(model) or Recipe()
    names = find_heads(model, spec)
    old = {name: _width(model.get_submodule(name)) for name in names}
    changed = {name: len(classes) for name, width in old.items() if width != len(classes)}
    before = classes_of(model)
    if is_reordered(before, classes) and names[0] not in changed:
        kept = [name for name in names if name not in changed]
        reorder_heads(model, kept, before, classes, partial(_logits_of_noise, model, spec))
    for name, width in changed.items():
        model.set_submodule(name, _like(model.get_submodule(name), width))
        if "." not in name and isinstance(getattr(model, "num_classes", None), int):
            model.num_classes = width  # type: ignore[assignment]  # timm's attribute
    name_labels(model, classes)
    attach_recipe(model, replace(recipe, input=spec, heads={**recipe.heads, **changed}, classes=classes))
    return changed


def find_heads(model: nn.Module, spec: InputSpec) -> list[str]:
    """Names of the layers whose outputs are the logits, auxiliary heads in train mode included.

    Runs the model once in each mode on zeros, and leaves it as it was.
    Raises ``InputError`` when no layer has the width of the output.
    """
    heads: list[str] = []
    for _, produced, output in _passes(model, spec):
        main, *auxiliary = matrices_of(output)
        names = [_layer_of(produced, main, or_by_width=True)]
        names += [_layer_of(produced, extra, or_by_width=False) for extra in auxiliary]
        heads += [name for name in names if name and name not in heads]
    if not heads:
        raise InputError(
            f"No last layer found: no Linear or convolution of {type(model).__name__} has the width of its output.",
            "The logits must come from an nn.Linear or an nn.Conv2d.",
            "give the model a head with the right number of classes, then finetune",
        )
    return heads


def output_notes(model: nn.Module, spec: InputSpec) -> list[str]:
    """A note where outputs are not logits but probabilities, or a sigmoid of what the head returns; and one for each
    other tensor beside them.

    Runs the model once in each mode on zeros, and leaves it as it was.
    """
    kinds: dict[str, list[str]] = {"probabilities": [], "a sigmoid of its logits": []}
    left_out: dict[str, None] = {}
    for mode, produced, outputs in _passes(model, spec):
        output = matrices_of(outputs)[0]
        left_out |= dict.fromkeys(_left_out(index, other, output) for index, other in other_tensors(outputs).items())
        raw = dict(produced).get(_layer_of(produced, output, or_by_width=True) or "")
        if are_probabilities(output):
            kinds["probabilities"].append(mode)
        elif raw is not None and raw.shape == output.shape and _is_close(raw.sigmoid(), output):
            kinds["a sigmoid of its logits"].append(mode)
    effects = ("the loss takes their logarithms", "the loss takes it for the logits; top-1 is right")
    return [
        f"The model returns {kind} in {' and '.join(modes)} mode: {effect}."
        for (kind, modes), effect in zip(kinds.items(), effects, strict=True)
        if modes
    ] + list(left_out)


def _left_out(index: int, other: Tensor, logits: Tensor) -> str:
    shape, of_logits = (str([*tensor.shape]).replace("[2", "[B", 1) for tensor in (other, logits))  # of two images
    return f"model(images)[{index}], {shape}, is not of the logits' shape, {of_logits}: the loss leaves it out."


Produced = list[tuple[str, Tensor]]
"""Outputs of linear layers and convolutions by name, in the order of their calls."""


def _passes(model: nn.Module, spec: InputSpec) -> Iterator[tuple[str, Produced, object]]:
    """A pass on zeros in each mode: its name, what the layers produced, and the model's output."""
    produced: Produced = []

    def record(name: str, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            produced.append((name, output))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, ConditionalConv2d)):
                hooks.enter_context(module.register_forward_hook(partial(record, name)))
        for mode in ("eval", "train"):
            produced.clear()
            yield mode, produced, _run(model, spec, mode == "train")


def _logits_of_noise(model: nn.Module, spec: InputSpec) -> Tensor:
    """Logits for two images of noise in eval mode, equal for each call: [2, C]."""
    return matrices_of(_run(model, spec, training=False, images=torch.randn))[0]


def _is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def _run(model: nn.Module, spec: InputSpec, training: bool, images: Callable[..., Tensor] = torch.zeros) -> object:
    """The output for two images, zeros by default; the model is left as it was, with its batch norms' statistics."""
    if name := image_keyword(model):
        raise InputError(
            f"The forward of {type(model).__name__} takes {name} by keyword only.",
            "finetune calls model(images).",
            f"def forward(self, {name}, ...), without the * before it",
        )
    parameter = next(model.parameters())
    with preserving_state(model), in_mode(model, training):
        x = images(2, spec.channels, spec.height, spec.width, device=parameter.device, dtype=parameter.dtype)
        try:
            output = model(x)
            matrices_of(output)  # raises for one that is not a classifier's
            return output
        except (RuntimeError, ValueError) as error:
            if not any(words in str(error).lower() for words in TOO_SMALL):
                raise
            raise InputError(
                f"The model does not run on images of {spec.height}x{spec.width}: {one_line(error)}",
                "Each layer must have an input of at least its kernel, and a batch norm more than one value.",
                f"data.image_size={max(2 * max(spec.height, spec.width), 64)}",
            ) from error


def _layer_of(produced: Produced, logits: Tensor, *, or_by_width: bool) -> str | None:
    """The layer whose output tensor is ``logits``; else, if ``or_by_width``, the last one of that width."""
    for name, output in reversed(produced):
        if output.data_ptr() == logits.data_ptr():
            return name
    if or_by_width:
        return next((name for name, output in reversed(produced) if output.shape[1] == logits.shape[1]), None)
    return None


def _width(head: nn.Module) -> int:
    if isinstance(head, ConditionalConv2d):
        return head.geometry.out_channels
    return int(head.out_features if isinstance(head, nn.Linear) else head.out_channels)  # type: ignore[arg-type]


def _like(head: nn.Module, width: int) -> nn.Module:
    """A new, randomly initialised head of another width and otherwise equal options."""
    if isinstance(head, ConditionalLinear):
        g = head.geometry
        plain = nn.Linear(g.in_channels, width, head.bias is not None, head.weight.device, head.weight.dtype)
        return conditional_like(plain, head.variant)
    if isinstance(head, ConditionalConv2d) and head.geometry.groups == 1:
        conv = nn.Conv2d(**asdict(head.geometry), bias=head.bias is not None).to(head.weight)
        return conditional_like(resized(conv, width), head.variant)
    if isinstance(head, nn.Linear) or (isinstance(head, nn.Conv2d) and head.groups == 1):
        return resized(head, width)
    raise InputError(
        f"The last layer is a {type(head).__name__}, which cannot be replaced.",
        "It must be an nn.Linear or an nn.Conv2d with one group, converted or not.",
        'convert after fine-tuning, or leave the last layer out: convert(model, ..., exclude=["NAME"])',
    )
