"""An arm of a study, and its text: ``static``, ``condconv:4``, ``odconv:1,include=layer4.*,layers.router_lr=2``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.recipe.conversion_options import Selection, Upcycling
from condconv_surgery.recipe.toml_text import parse_setting
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.recipe.variants import VARIANTS, Variant, make_variant

STATIC = "static"
DEFAULT_ARMS = (STATIC, "condconv:4", "odconv:1")
EXAMPLE = 'arms=["static", "condconv:4"]'

SHARED_SECTIONS = ("data", "augment")
SHARED = ("schedule.epochs", "schedule.early_stop")
"""Training options that all arms have in common: images, augmentation and length."""

LISTS = ("include", "exclude", "blocks", "subclasses")


@dataclass(frozen=True)
class Arm:
    """A way to train the network: unconverted (``variant`` is ``None``), or converted to a variant.

    name: in tables. selection, upcycling: of the conversion; its seed is the run's. training: changed options of the
    run, by section.
    """

    name: str
    variant: Variant | None = None
    selection: Selection = field(default_factory=Selection)
    upcycling: Upcycling = field(default_factory=Upcycling)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^\w.]+", "-", self.name).strip("-.")


def parse_arms(arms: Sequence[str | Arm]) -> tuple[Arm, ...]:
    """The arms of a study, from texts or made before. The first ``static`` one is the baseline; it is added in front
    where there is none.

    Raises ``InputError`` for a text that is not an arm, two arms of one name, and a study without a converted arm.
    """
    parsed = [parse_arm(arm) if isinstance(arm, str) else arm for arm in arms]
    if not any(arm.variant is None for arm in parsed):
        parsed.insert(0, Arm(STATIC))
    slugs = [arm.slug.lower() for arm in parsed]
    twice = next((arm.name for arm in parsed if slugs.count(arm.slug.lower()) > 1), None)
    if twice is not None:
        raise InputError(
            f"Two arms are called {twice}.", "Each needs a name of its own.", f'arms=["{twice}", "{twice},name=other"]'
        )
    if len(parsed) < 2:
        raise InputError("There is only one arm.", "A comparison has at least two.", EXAMPLE)
    return tuple(parsed)


def parse_arm(text: str) -> Arm:
    """``NAME[:EXPERTS][,option=value]...``

    >>> parse_arm("condconv:8,include=layer4.*,layers.router_lr=2").training
    {'layers': {'router_lr': 2}}

    NAME: ``static`` or a variant. Options: of the variant (``reduction=4``), of the conversion (``start=noise``,
    ``include=layer4.*``, repeatable), of training by section, and ``name=...``, the arm's name in tables.
    """
    head, *settings = re.split(r",\s*(?=[\w.]+=)", text.strip())
    kind, _, experts = head.partition(":")
    if kind != STATIC and kind not in VARIANTS:
        raise unknown_name("arm", kind, [STATIC, *VARIANTS], EXAMPLE)
    if experts and not experts.isdecimal():
        raise InputError(f"The arm {text!r} has {experts!r} experts.", "It must be a whole number.", EXAMPLE)
    options: dict[str, Any] = {}
    training: dict[str, dict[str, Any]] = {}
    for section, name, value in map(parse_setting, settings):
        if section:
            training.setdefault(section, {})[name] = value
        elif name in LISTS:
            options[name] = (*options.get(name, ()), *(value if isinstance(value, list) else [str(value)]))
        else:
            options[name] = value
    _require_own(text, training)
    name = str(options.pop("name", text.strip()))
    if kind == STATIC:
        _require_static(text, experts, options)
        return Arm(name, training=training)
    return _converted(name, kind, experts, options, training)


def _converted(name: str, kind: str, experts: str, options: dict[str, Any], training: dict[str, Any]) -> Arm:
    of_variant = [f.name for f in fields(VARIANTS[kind]) if f.name != "experts"]
    groups = {
        "variant": of_variant,
        "selection": [f.name for f in fields(Selection)],
        "upcycling": [f.name for f in fields(Upcycling) if f.name != "seed"],
    }
    chosen: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for option, value in options.items():
        group = next((group for group, names in groups.items() if option in names), None)
        if group is None:
            known = ["name", *(known for names in groups.values() for known in names)]
            raise unknown_name(f"option of the arm {name}", option, known, 'arms=["condconv:4,start=noise"]')
        chosen[group][option] = value
    if "diversity" in chosen["upcycling"]:
        chosen["upcycling"].setdefault("start", "noise")  # the only start that has it
    variant = make_variant(kind, experts=int(experts) if experts else None, **chosen["variant"])
    return Arm(name, variant, Selection(**chosen["selection"]), Upcycling(**chosen["upcycling"]), training)


def _require_static(text: str, experts: str, options: dict[str, Any]) -> None:
    if experts or options:
        given = f":{experts}" if experts else f"{next(iter(options))}=..."
        raise InputError(
            f"The arm {text!r}: a static network has no {given}.",
            "It is not converted. It takes training options, such as optimizer.lr=0.01, and name=.",
            EXAMPLE,
        )


def _require_own(text: str, training: dict[str, dict[str, Any]]) -> None:
    """Raise ``InputError`` for options that are unknown, or that all arms have in common."""
    for section, values in training.items():
        for name, value in values.items():
            if section in SHARED_SECTIONS or f"{section}.{name}" in SHARED:
                raise InputError(
                    f"The arm {text!r} has its own {section}.{name}.",
                    "All arms share images, augmentation and length; otherwise their difference says little.",
                    f"{section}.{name}={value} for the whole study",
                )
    TrainingOptions().updated(dict(training))
