"""The answer of a report or comparison in one sentence: what was gained, at what cost, on which data, how certain."""

from __future__ import annotations

from collections.abc import Sequence

from condconv_surgery.reporting.images.paired_models import differences_to_first
from condconv_surgery.reporting.images.predictions import Predictions
from condconv_surgery.reporting.measure.measurements import Measurements
from condconv_surgery.reporting.render.number_format import human, percent, span
from condconv_surgery.reporting.render.short_names import unique_short_names
from condconv_surgery.reporting.study.paired_difference import Difference
from condconv_surgery.reporting.study.study_results import points


def report_answer(model: Measurements) -> str:
    """Did routing help? For an unconverted network: its accuracy."""
    return _of_converted(model) if model.profile.converted else _of_unconverted(model)


def comparison_answer(models: Sequence[Measurements]) -> str:
    """Is another model better than the first? Of several, the one whose top-1 differs most from the first upwards."""
    names = unique_short_names([model.title for model in models])
    compared = [(m, d) for m, d in zip(models, differences_to_first(models), strict=True) if d is not None]
    first = models[0]
    if not compared or first.predictions is None:
        return _of_recorded(models)
    best, found = max(compared, key=lambda pair: pair[1].mean)
    name, other, several = names[best.title], names[first.title], len(compared) > 1
    where = f"on the same {found.images} images of {first.predictions.where}"
    where += _known_training(first.predictions, other) + _known_training(best.predictions, name)
    size = f"{points(found)} points of top-1 (95% interval) {where}; {_change(first, best)}"
    if found.low > 0:
        return f"{name} is better than {other}{', most of all' if several else ''}: {size}."
    if found.high < 0:
        return f"{f'All are worse than {other}, least {name}' if several else f'{name} is worse than {other}'}: {size}."
    which = f"any model is better than {other}; best is {name}" if several else f"{name} and {other} differ"
    return f"No evidence that {which}: {size}."


def caveats(models: Sequence[Measurements]) -> list[str]:
    """What limits a comparison, a sentence each: other inputs or images, scores of other data, training images."""
    notes = []
    measured = [model.predictions for model in models if model.predictions is not None]
    names = unique_short_names([model.title for model in models])
    if len({model.profile.input for model in models}) > 1:
        each = ", ".join(f"{names[model.title]} on {model.profile.input}" for model in models)
        notes.append(f"MACs, latency and top-1 are those of each model on its own input: {each}.")
    if measured and any(own.images != measured[0].images for own in measured):
        notes.append("The models were measured on different images, so their differences are not known.")
    recorded = {names[m.title]: m.recorded for m in models if m.recorded and not m.measured}
    if recorded:
        each = "; ".join(f"{name} on {score.where}" for name, score in recorded.items())
        notes.append(f"* as its own run recorded: {each}. To measure all on the same images, give images.")
    for caveat in dict.fromkeys(own.caveats for own in measured if own.caveats):
        notes.append(caveat)
    return notes


def _of_converted(model: Measurements) -> str:
    routing, cost = model.routing, _cost(model)
    if routing is None or routing.gain is None or model.predictions is None:
        known = f"; {_top1(model)}" if model.accuracy is not None else ""
        return f"Conversion costs {cost}{known}. Without images, whether routing helps is not known."
    where = f"on {routing.images} images of {model.predictions.where}{_trained_on(model.predictions)}"
    if not routing.changed:
        return (
            f"Routing does nothing: with mean gates the network is right and wrong on the same images, {where}; "
            f"it costs {cost}."
        )
    size = f"{points(routing.gain)} points of top-1 against mean gates (95% interval) {where}; it costs {cost}"
    return f"{_evidence(routing.gain, 'Routing helps', 'Routing harms', 'No evidence that routing helps')}: {size}."


def _evidence(found: Difference, better: str, worse: str, neither: str) -> str:
    return better if found.low > 0 else worse if found.high < 0 else neither


def _of_unconverted(model: Measurements) -> str:
    size = f"The network is not converted: {human(model.profile.parameters)} parameters, "
    size += f"{human(model.profile.macs.total)} MACs per image"
    return (
        f"{size}; {_top1(model)}." if model.accuracy is not None else f"{size}; accuracy is not known without images."
    )


def _top1(model: Measurements) -> str:
    """``top-1 93.3% (90.3 to 95.4, 95% interval) on 359 images of digits``."""
    assert model.accuracy is not None
    interval = model.accuracy_interval
    certainty = f" ({span(interval)}, 95% interval)" if interval else ""
    if model.predictions and model.measured:
        own = model.predictions
        where = f"{len(own.images)} images of {own.where}{_trained_on(own)}"
    else:
        where = f"{model.recorded.where}, as its run recorded" if model.recorded else ""
    return f"top-1 {model.accuracy:.1%}{certainty} on {where}"


def _trained_on(predictions: Predictions) -> str:
    known = _known_training(predictions, "it")
    return known or ("" if predictions.held_out else ", which it may have been trained on")


def _known_training(predictions: Predictions | None, name: str) -> str:
    """How many of the images trained the model ``name``, where its run says so."""
    return f", {predictions.trained} of which trained {name}" if predictions and predictions.trained else ""


def _cost(model: Measurements) -> str:
    profile = model.profile
    parts = [
        f"{percent(profile.parameters_before, profile.parameters)} parameters",
        f"{percent(profile.macs_before, profile.macs.total)} MACs",
    ]
    if model.latency is not None:
        doubt = f" ({model.latency.doubt})" if model.latency.doubt else ""
        parts.append(f"{model.latency.ratio:.2f} times the latency{doubt}")
    return " and ".join([", ".join(parts[:-1]), parts[-1]])


def _change(first: Measurements, other: Measurements) -> str:
    parameters = percent(first.profile.parameters, other.profile.parameters)
    return f"{parameters} parameters, {percent(first.profile.macs.total, other.profile.macs.total)} MACs"


def _of_recorded(models: Sequence[Measurements]) -> str:
    """The answer where no two models were measured on the same images."""
    known = [model for model in models if model.accuracy is not None]
    if len(known) < 2:
        return "Only costs are compared: fewer than two accuracies are known. Images would give them."
    places = {model.recorded.where if model.recorded and not model.measured else "" for model in known}
    prints = {model.recorded.fingerprint if model.recorded else "" for model in known}
    if len(places) == 1 == len(prints) and "" not in places | prints:
        return (
            f"Each run recorded its top-1 on the same {places.pop()}; the certainty of a difference needs the images."
        )
    return "The accuracies are not of the same images, so they do not say which model is better."
