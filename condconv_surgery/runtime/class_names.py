"""The names of a model's classes, in the order of its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from condconv_surgery.recipe import recipe_of
from condconv_surgery.runtime.described_input import is_of_ultralytics

IMAGENET_CLASSES = 1000


def classes_of(model: nn.Module) -> tuple[str, ...]:
    """The class names of the logits, in their order: of the recipe, else as a model of transformers or Ultralytics
    says itself. Empty when unknown.

    ImageNet's labels are none: its folders have other names (``n01440764``), in the order of the logits.
    """
    recipe = recipe_of(model)
    if recipe is not None and (recipe.classes or recipe.heads):
        return recipe.classes
    config: Any = getattr(model, "config", None)
    named: Any = getattr(config, "id2label", None) if hasattr(model, "num_labels") else None
    if is_of_ultralytics(model):
        named = getattr(model, "names", None)
    if not isinstance(named, Mapping) or not all(str(key).isdigit() for key in named):
        return ()
    numbered = {int(key): str(name) for key, name in named.items()}
    names = tuple(numbered.get(index, "") for index in range(len(numbered)))
    unnamed = all(name in (f"LABEL_{index}", f"{index}") for index, name in enumerate(names))
    of_imagenet = len(names) == IMAGENET_CLASSES and names[0].startswith("tench")
    return () if unnamed or of_imagenet or len(set(names)) < len(names) else names
