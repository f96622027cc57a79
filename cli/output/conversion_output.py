"""What ``condconv convert`` says of a plan and of a conversion, as text and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from condconv_surgery.errors import counted

from .console import say, say_by_reason
from .next_step import next_step

if TYPE_CHECKING:
    from condconv_surgery.recipe import Variant
    from condconv_surgery.surgery import Conversion, ModelPlan, Plan


def plan_facts(plan: ModelPlan, variant: Variant) -> dict[str, Any]:
    """The plan as ``--json`` prints it."""
    return {
        "variant": variant.kind,
        "experts": variant.experts,
        "routers": [{"block": router.block, "layers": router.layers} for router in plan.routers],
        "to_convert": [
            {
                "name": site.name,
                "calls": site.calls,
                "input": site.input,
                "followed_by": plan.followers.by_layer.get(site.name, ()),
            }
            for site in plan.to_convert
        ],
        "skipped": _skipped(plan),
        "notes": [*plan.notes, *plan.followers.notes()],
    }


def print_plan(plan: ModelPlan) -> None:
    """A table of all convolutions on stdout, its notes and totals on stderr."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    table.add_column("input", no_wrap=True)
    table.add_column("plan", overflow="fold")
    block_of = {name: router.block for router in plan.routers for name in router.layers}
    for site in plan.to_convert:
        shape = "x".join(map(str, site.input[1:])) if site.input else ""
        times = f", called {site.calls} times" if site.calls > 1 else ""
        routed = f", routed by {block_of[site.name]}" if site.name in block_of else ""
        then = f", then {', '.join(plan.followers.by_layer[site.name])}" if site.name in plan.followers.by_layer else ""
        table.add_row(site.name, shape, f"convert{times}{routed}{then}")
    for skip in plan.skipped:
        table.add_row(skip.name, "", f"skip: {skip.reason}")
    Console().print(table)
    for note in (*plan.notes, *plan.followers.notes()):
        say(f"Note: {note}")
    count = counted(len(plan.to_convert), "layer")
    say(f"Would convert {count} and skip {len(plan.skipped)}. Nothing was changed (--dry-run).")


def conversion_facts(
    source: str, path: Path, variant: Variant, conversion: Conversion, start: str | None, calibrated: bool
) -> dict[str, Any]:
    """The conversion as ``--json`` prints it."""
    from condconv_surgery.recipe import recipe_of
    from condconv_surgery.reporting import profile

    totals = profile(conversion.model)
    recipe, difference = recipe_of(conversion.model), conversion.difference
    assert difference is not None
    return {
        "output": str(path),
        "source": recipe.source.name if recipe and recipe.source.name else source,
        "variant": variant.kind,
        "experts": variant.experts,
        "start": start,
        "calibrated": calibrated,
        "converted": len(conversion.plan.to_convert),
        "routers": len(conversion.plan.to_convert) - sum(len(router.layers) - 1 for router in conversion.plan.routers),
        "skipped": _skipped(conversion.plan),
        "parameters": {"before": totals.parameters_before, "after": totals.parameters},
        "macs": {"before": totals.macs_before, "after": totals.macs.total},
        "difference": {
            "eval": difference.eval and difference.eval.absolute,
            "train": difference.train and difference.train.absolute,
        },
    }


def _skipped(plan: Plan) -> list[dict[str, str]]:
    return [{"name": skip.name, "reason": skip.reason} for skip in plan.skipped]


def say_conversion(facts: dict[str, Any], conversion: Conversion, trust: tuple[str, ...]) -> None:
    """What was converted, the costs, the differences and the next command, on stderr. facts: ``conversion_facts``."""

    def change(name: str, unit: float, suffix: str) -> str:
        before, after = facts[name]["before"], facts[name]["after"]
        return f"{before / unit:.2f}{suffix} -> {after / unit:.2f}{suffix} ({after / before - 1:+.1%})"

    converted, skipped = facts["converted"], facts["skipped"]
    say(f"Source      {facts['source']}")
    how = f"{facts['variant']}, {counted(facts['experts'], 'expert')} each"
    say(f"Converted   {converted} of {converted + len(skipped)} layers to {how}")
    if facts["routers"] < converted:
        say(f"Routers     {facts['routers']}, {len(conversion.plan.routers)} of them for a whole block")
    if facts["start"] not in (None, "noise"):
        along = (
            "in which the images differ most" if facts["calibrated"] else "drawn at random (--data finds better ones)"
        )
        say(f"Start       {facts['start']}: equal experts, routers along directions {along}")
    say_by_reason("Skipped", ((row["name"], row["reason"]) for row in skipped))
    for note in conversion.plan.notes:
        say(f"Note        {note}")
    say(f"Parameters  {change('parameters', 1e6, 'M')}")
    say(f"MACs        {change('macs', 1e6, 'M')} per image")
    for mode, gap in facts["difference"].items():
        text = "not compared (see the note)" if gap is None else f"{gap:.2g} at most between original and converted"
        say(f"Difference  {mode}: {text}")
    if facts["dtype"]:
        say(f"Stored      in {facts['dtype']}, as it came; converted and compared in float32")
    say(f"Wrote       {facts['output']}")
    say(f"Next        {next_step(conversion.model, Path(facts['output']), trust)}")
