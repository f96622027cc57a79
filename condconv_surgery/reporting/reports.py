"""``report``: one call from a model to everything that is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from condconv_surgery.recipe import recipe_of
from condconv_surgery.reporting.model_profile import Profile
from condconv_surgery.reporting.profile import profile
from condconv_surgery.reporting.tables import to_csv, to_markdown
from condconv_surgery.reporting.terminal import make_console, render_profile


@dataclass(frozen=True)
class Report:
    """The numbers of one model, and their forms.

    title: the model's source, or its class. profile: parameters and MACs.
    """

    title: str
    profile: Profile

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``parameters``, ``macs``, ``layers`` and the rest."""
        return {"title": self.title, **self.profile.to_dict()}

    def to_csv(self) -> str:
        """One line a layer, and a total."""
        return to_csv(self.profile)

    def to_markdown(self) -> str:
        """Headings and tables."""
        return to_markdown(self.profile, self.title)

    def print(self, width: int | None = None) -> None:
        """Tables on stdout, as wide as the terminal or ``width`` columns."""
        console = make_console(width)
        console.print(render_profile(self.profile, self.title, console.width))


def report(model: nn.Module, *, inputs: Any = None) -> Report:
    """Measure ``model``, converted or not; nothing is printed and the model is as before.

    inputs: one tensor, a tuple of arguments, an ``InputSpec``; by default what the model's recipe says.
    Raises ``InputError`` when the model does not run on the input.
    """
    return Report(title_of(model), profile(model, inputs))


def title_of(model: nn.Module) -> str:
    """The source in the model's recipe, else its class."""
    recipe = recipe_of(model)
    return recipe.source.name if recipe is not None and recipe.source.name else type(model).__name__
