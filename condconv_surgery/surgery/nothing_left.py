"""The error where a selection leaves no layer to convert, with the smallest change of the selection that leaves one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers.conv2d_subclasses import full_name, is_understood
from condconv_surgery.recipe import Selection, as_argument
from condconv_surgery.surgery.observe.conv_sites import ConvSite
from condconv_surgery.surgery.proof.assumed_subclasses import attributes_to_lose, is_equivalent

MERGE = "model = model.merge_and_unload(), then convert"
"""Of layers inside PEFT adapters."""

Reasons = Callable[[Selection], Mapping[str, str]]
"""From a selection to the reason why each layer, by name, is skipped; empty for one that is converted."""


def nothing_left(
    candidates: Sequence[ConvSite],
    matched: Sequence[ConvSite],
    classifier: ConvSite | None,
    selection: Selection,
    source: str,
    reasons: Reasons,
) -> InputError:
    """The error for a ``selection`` that skips all of ``candidates``.

    matched: those that ``include`` matches. classifier: the last ``nn.Linear``, where it could be converted.
    source: what the error calls the model.
    """
    if not matched:
        cause = f"{as_argument('include', selection.include)} matched 0 of {len(candidates)} convolutions in {source}."
    else:
        own = reasons(selection)
        texts = sorted({own[site.name] for site in matched})
        which = f"all {len(matched)} convolutions of {source} are"
        if len(matched) == 1:
            which = f"the only convolution of {source}{' that include matches' if len(candidates) > 1 else ''} is"
        cause = f"{which} skipped: {'; '.join(texts)}."
    last = "another model" + (", or classifier=True" if classifier else "")
    inside = [MERGE] if any(site.adapter for site in matched) else []
    examples = (candidates[0], candidates[len(candidates) // 2], candidates[-1])
    return InputError(
        f"No layer left to convert: {cause}",
        f"They are named like: {', '.join(dict.fromkeys(site.name for site in examples))}",
        next(chain(inside, _advice(candidates, selection, reasons)), last),
    )


def _advice(candidates: Sequence[ConvSite], selection: Selection, reasons: Reasons) -> Iterator[str]:
    """Changes of the selection after which a layer is converted: one at a time, then more and more of them together."""
    changes = {
        name: change for name, change in _changes(candidates, selection).items() if change(selection) != selection
    }
    for advice, change in changes.items():
        if not all(reasons(change(selection)).values()):
            yield advice
    kept = [name for name, reason in reasons(replace(selection, include=())).items() if not reason]
    if selection.include and kept:
        yield as_argument("include", [f"{kept[-1].split('.')[0]}*"])
    together: list[str] = []
    wider = selection
    for advice, change in changes.items():
        together, wider = [*together, advice], change(wider)
        if not all(reasons(wider).values()):
            yield ", ".join(together)
    wider = replace(wider, include=())
    for name, reason in reasons(wider).items():
        if not reason and selection.include:
            yield ", ".join([*together, as_argument("include", [name])])


def _changes(candidates: Sequence[ConvSite], selection: Selection) -> dict[str, Callable[[Selection], Selection]]:
    classes = sorted(
        {
            full_name(type(site.module))
            for site in candidates
            if isinstance(site.module, nn.Conv2d)
            and not is_understood(type(site.module))
            and not attributes_to_lose(site.module)
            and is_equivalent(site.module, site.input)
        }
    )
    subclasses = tuple(dict.fromkeys((*selection.subclasses, *classes)))
    asserted = {as_argument("subclasses", subclasses): lambda s: replace(s, subclasses=subclasses)} if classes else {}
    return asserted | {
        "skip_stem=False": lambda s: replace(s, skip_stem=False),
        "skip_pooled=False": lambda s: replace(s, skip_pooled=False),
        "min_channels=0": lambda s: replace(s, min_channels=0),
        "leave exclude= out": lambda s: replace(s, exclude=()),
    }
