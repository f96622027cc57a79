"""What to type after a conversion."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def next_step(model: nn.Module, path: Path, trust: tuple[str, ...]) -> str:
    """``condconv finetune`` for a classifier, which it trains; the report and a loop of one's own for any other.

    Runs the model once. trust: packages that the file needs besides that of its own factory.
    """
    from condconv_surgery.models.classifier_logits import is_classifier
    from condconv_surgery.models.factory_source import packages_to_trust
    from condconv_surgery.recipe import recipe_of

    recipe = recipe_of(model)
    packages = packages_to_trust(recipe.source, trust) if recipe else trust
    trusting = "".join(f" --trust {package}" for package in packages)
    file = shlex.quote(str(path))
    if not is_classifier(model):
        return f"condconv report {file}{trusting}     (finetune trains classifiers; this one trains in your own loop)"
    return f"condconv finetune {file} --data FOLDER -o RUN{trusting}"
