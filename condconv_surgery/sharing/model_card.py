"""The model card: what was converted, what it costs and scores, whose the original is, and how to use it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

from condconv_surgery.errors import counted
from condconv_surgery.recipe import Recipe

LIBRARY = "condconv-surgery"


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the recipe.

    name: ``OWNER/NAME``. parameters, macs: before and after conversion, MACs per image. scores: 0 to 1, by their name.
    license: of the original weights; empty when unknown. classifier: the model has logits.
    base: of a delta file. experts: their precision in the file, where that is not the model's. error: the largest
    difference of a weight that the file gives.
    """

    name: str
    parameters: tuple[int, int]
    macs: tuple[int, int]
    scores: Mapping[str, float]
    license: str
    classifier: bool
    base: str = ""
    experts: str = ""
    error: float = 0.0


def model_card(recipe: Recipe, facts: CardFacts) -> str:
    """The README.md of a repository, with its front matter."""
    return f"{_front_matter(facts)}\n# {facts.name}\n\n{_table(recipe, facts)}\n\n{_usage(recipe, facts)}"


def config(recipe: Recipe, facts: CardFacts) -> str:
    """The config.json of a repository: the recipe, and the facts of the card."""
    return json.dumps(
        {
            "library_name": LIBRARY,
            "recipe": recipe.to_dict(),
            "parameters": dict(zip(("before", "after"), facts.parameters, strict=True)),
            "macs": dict(zip(("before", "after"), facts.macs, strict=True)),
            "scores": dict(facts.scores),
            "license_of_original": facts.license,
            "base": facts.base,
        },
        indent=2,
    )


def _front_matter(facts: CardFacts) -> str:
    lines = ["---", f"library_name: {LIBRARY}", f"license: {facts.license or 'unknown'}"]
    lines += ["pipeline_tag: image-classification"] if facts.classifier else []
    return "\n".join([*lines, "tags:", "- conditional-convolution", "- pytorch", "---", ""])


def _table(recipe: Recipe, facts: CardFacts) -> str:
    kinds = Counter(f"{row.variant.kind}, {counted(row.variant.experts, 'expert')}" for row in recipe.layers)
    variants = [f"{kind}: {counted(count, 'layer')}" for kind, count in kinds.items()]
    names = [row.names[0] for row in recipe.layers]
    spec = recipe.input
    holds = f"differences from {facts.base}" if facts.base else facts.experts and f"experts in {facts.experts}"
    rows: list[tuple[str, Any]] = [
        ("original", recipe.source.name or "a network of its own"),
        ("license of the original", facts.license or "unknown: ask its authors before you use it"),
        ("variant", "; ".join(variants) or "none: a plain network"),
        ("layers", ", ".join(f"`{name}`" for name in names)),
        ("parameters", _change(facts.parameters)),
        ("MACs per image", _change(facts.macs)),
        ("input", f"{spec.channels}x{spec.height}x{spec.width}, mean {_numbers(spec.mean)}, std {_numbers(spec.std)}"),
        ("classes", ", ".join(recipe.classes)),
        *((name, f"{score:.4f}") for name, score in facts.scores.items()),
        ("file", f"{holds}; weights off by at most {facts.error:.2g}" if holds else ""),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)])


def _usage(recipe: Recipe, facts: CardFacts) -> str:
    aim, command = ("Train it further on a folder of images:", "finetune.txt")
    if not facts.classifier:
        aim, command = ("Export it for a runtime:", "export.txt")
    spec = recipe.input
    sizes = {"channels": spec.channels, "height": spec.height, "width": spec.width}
    typed = _template(command).substitute(name=facts.name).strip()
    return _template("usage.md").substitute(name=facts.name, aim=aim, command=typed, **sizes)


def _template(name: str) -> Template:
    return Template((files("condconv_surgery.sharing") / "templates" / name).read_text(encoding="utf-8"))


def _change(counts: tuple[int, int]) -> str:
    before, after = counts
    return f"{before / 1e6:.2f} M -> {after / 1e6:.2f} M ({after / before - 1:+.1%})"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
