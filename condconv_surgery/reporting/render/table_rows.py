"""The rows and sentences that the terminal, Markdown and HTML reports share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from condconv_surgery.errors import counted, listed
from condconv_surgery.reporting.images.network_routing import Routing
from condconv_surgery.reporting.images.routing_statistics import LayerRouting
from condconv_surgery.reporting.measure.cost_table import CONVENTION, PLAIN_CONVENTION, Layer, Profile
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.measure.memory_and_latency import Cost
from condconv_surgery.reporting.measure.other_counters import predicted
from condconv_surgery.reporting.render.number_format import human, human_bytes, human_time, percent, span

Row = tuple[str, str, str, str]
"""What, before, after, change: formatted."""


def totals(profile: Profile, cost: Cost | None) -> tuple[tuple[str, ...], Sequence[tuple[str, ...]]]:
    """The headers behind the name, and the rows; of an unconverted network, where nothing changed, only the values."""
    rows = [*summary_rows(profile), *(cost_rows(cost) if cost else [])]
    if profile.converted:
        return ("before", "after", "change"), rows
    return ("",), [(name, after) for name, _, after, _ in rows]


def summary_rows(profile: Profile) -> list[Row]:
    """The totals. The change of a part of the MACs is relative to all MACs before."""
    macs, before = profile.macs, profile.macs_before

    def row(name: str, a: int, b: int, form: Callable[[float], str] = human) -> Row:
        return (name, form(a), form(b), percent(a, b))

    rows = [row("parameters", profile.parameters_before, profile.parameters), row("MACs per image", before, macs.total)]
    for name in ("convolution", "mixing", "routing", "attention") if profile.converted else ():
        own = getattr(macs, name)
        added = 0 if name == "convolution" else own
        if own:
            rows.append((f"  {name}", human(own - added), human(own), percent(before, before + added)))
    rows.append(row("FLOPs per image", 2 * before, 2 * macs.total))
    rows.append(row("weights", profile.weight_bytes_before, profile.weight_bytes, human_bytes))
    outputs = profile.activation_bytes  # a conditional layer has the output of the plain one
    return [*rows, row("outputs of all layers", outputs, outputs, human_bytes)]


def cost_rows(cost: Cost) -> list[Row]:
    """Peak memory and latency."""
    rows = [
        (f"peak activations, batch {p.batch}", human_bytes(p.before), human_bytes(p.after), percent(p.before, p.after))
        for p in cost.peaks
    ]
    for time in cost.latency:
        rows.append(
            (f"latency, batch {time.batch}", human_time(time.original), human_time(time.median), f"x{time.ratio:.2f}")
        )
    return rows


def latency_line(cost: Cost, converted: bool) -> str:
    """How latency was measured and how much it varies, in one sentence; empty if it was not measured."""
    if not cost.latency:
        return ""
    spreads = ", ".join(f"{t.spread / t.median:.0%} of {t.repeats} at batch {t.batch}" for t in cost.latency)
    environment = ", ".join(f"{name} {value}" for name, value in cost.environment)
    pair = ", original and model alternating in one run" if converted else ""
    return (
        f"Latency: medians{pair} after {cost.latency[0].warm_up} warm-up passes; "
        f"interquartile range {spreads}; {environment}."
    )


def tiles(model: Measurements) -> list[tuple[str, str, str]]:
    """(what, value, what it is compared with) of the first values that a reader looks for."""
    profile, latency = model.profile, model.latency
    rows = [
        ("parameters", human(profile.parameters), percent(profile.parameters_before, profile.parameters)),
        ("MACs per image", human(profile.macs.total), percent(profile.macs_before, profile.macs.total)),
        ("weights", human_bytes(profile.weight_bytes), percent(profile.weight_bytes_before, profile.weight_bytes)),
    ]
    found = [(name, value, f"{change} vs original" if profile.converted else "") for name, value, change in rows]
    if latency is None:
        found.append(("latency", "-", "not measured"))
    else:
        ratio = f"x{latency.ratio:.2f} vs original" if profile.converted else "one image"
        found.append(("latency", human_time(latency.median), f"{ratio}, uncertain" if latency.doubt else ratio))
    if model.accuracy is not None:
        interval = model.accuracy_interval
        note = f"{span(interval)}, 95% interval" if interval else ""
        found.append(("top-1", f"{model.accuracy:.1%}", note if model.measured else "as its run recorded"))
    if model.routing and model.routing.mean_gate_accuracy is not None:
        found.append(("with mean gates", f"{model.routing.mean_gate_accuracy:.1%}", "the same network without routing"))
    return found


def varying_and_static(routing: Routing) -> tuple[list[LayerRouting], list[LayerRouting]]:
    """The layers whose mixtures depend on the image, and those for which a static layer suffices."""
    varying = [layer for layer in routing.layers if not layer.static]
    return varying, [layer for layer in routing.layers if layer.static]


def static_line(static: Sequence[LayerRouting]) -> str:
    """The layers for which a static layer suffices, as one group."""
    count = counted(len(static), "layer")
    return f"Static layer suffices in {count}: {listed([layer.name for layer in static])}."


def multiplying(profile: Profile) -> list[Layer]:
    """The layers that have MACs or are conditional: a table lists them one by one."""
    return [layer for layer in profile.layers if layer.macs.total or layer.conditional]


def convention(profile: Profile) -> str:
    """What is counted, as far as the model has it."""
    return CONVENTION if profile.converted else PLAIN_CONVENTION


def remainder(profile: Profile) -> list[str]:
    """The other layers, by kind: ``20 BatchNorm2d with 9.6 k parameters``."""
    listed = {layer.name for layer in multiplying(profile)}
    kinds: dict[str, list[Layer]] = {}
    for layer in profile.layers:
        if layer.name not in listed:
            kinds.setdefault(layer.kind, []).append(layer)
    return [
        f"{len(rows)} {kind} with {human(sum(row.parameters for row in rows))} parameters"
        for kind, rows in kinds.items()
    ]


def other_counters(profile: Profile) -> str:
    """What other counters print for this model and why it differs, in a sentence or two."""
    number = {name: human(macs) for name, macs in predicted(profile).items()}
    fvcore = f"fvcore about {number['fvcore']} (adds batch norm)"
    if not profile.converted:
        return (
            f"Other counters differ by what they add: {fvcore}, thop {number['thop']}, "
            f"torchinfo {number['torchinfo']}; torch's FlopCounterMode prints FLOPs, twice our MACs."
        )
    ptflops = f", ptflops {number['ptflops']} (misses the convolution)" if "ptflops" in number else ""
    return (
        "Other counters look up the class of a module and see only the router of a conditional layer: "
        f"torchinfo about {number['torchinfo']} MACs, thop {number['thop']}{ptflops}. "
        f"Right on these layers: torch's FlopCounterMode (FLOPs, twice our MACs) and {fvcore}."
    )
