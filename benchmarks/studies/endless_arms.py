"""The arms of ``endless_study``: how the network is converted, and how it trains on.

``ARMS`` are compared; each ``RECIPES`` arm changes one option of another arm, to see what helps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from condconv_surgery.recipe import CondConv, ODConv, TrainingOptions, Variant

TRAINING = TrainingOptions().updated(
    {
        "optimizer": {"weight_decay": 0.02, "label_smoothing": 0.0, "clip_norm": 0.0},
        "schedule": {"warmup": 0.05, "final_lr": 0.0},
    }
)


@dataclass(frozen=True)
class Arm:
    """variant: ``None`` for the static network. conversion: options of ``convert``. classifier: the variant of the
    classifier, where it is another than that of the convolutions. options: of its training, but for the rate, the steps
    and the schedule's shape. teacher: ``start``, the network before conversion, or ``wide``, one of three times its
    width. length: steps, as a multiple of those of other arms. rate_of: the arm whose learning rate it takes, without a
    search of its own.
    """

    variant: Variant | None = None
    conversion: dict[str, Any] = field(default_factory=dict)
    classifier: Variant | None = None
    options: TrainingOptions = TRAINING
    teacher: Literal["", "start", "wide"] = ""
    length: int = 1
    rate_of: str = ""


ARMS = {
    "static": Arm(),
    "condconv:4": Arm(CondConv(experts=4), {"spread": 2.0}),
    "odconv:1": Arm(ODConv(experts=1)),
    "static, twice the steps": Arm(length=2, rate_of="static"),
    "condconv:4, noise": Arm(CondConv(experts=4), {"start": "noise"}),
    "condconv:8": Arm(CondConv(experts=8), {"spread": 2.0}),
    "odconv:4": Arm(ODConv(experts=4), {"spread": 3.0}),
    "odconv:4, sigmoid gates, hidden 64": Arm(ODConv(experts=4, gates="sigmoid", min_hidden=64), {"spread": 2.0}),
    "odconv:1, classifier": Arm(ODConv(experts=1), {"classifier": True}),
    "condconv:4, classifier": Arm(CondConv(experts=4), {"spread": 2.0, "classifier": True}),
    "odconv:2, sigmoid gates, hidden 32, classifier": Arm(
        ODConv(experts=2, gates="sigmoid", min_hidden=32), {"spread": 2.0, "classifier": True}
    ),
    "odconv:4, sigmoid gates, hidden 48, classifier odconv:1": Arm(
        ODConv(experts=4, gates="sigmoid", min_hidden=48), {"spread": 2.0}, ODConv(experts=1)
    ),
    "odconv:6, sigmoid gates, hidden 32, classifier odconv:1": Arm(
        ODConv(experts=6, gates="sigmoid", min_hidden=32), {"spread": 2.0}, ODConv(experts=1)
    ),
}


def _trained(name: str, section: str, *, teacher: Literal["", "start", "wide"] = "", **options: object) -> Arm:
    """An arm of ``ARMS`` with other options in a section of its training."""
    return replace(ARMS[name], options=TRAINING.updated({section: options}), teacher=teacher)


def _converted(name: str, **conversion: object) -> Arm:
    """An arm of ``ARMS`` that is converted otherwise."""
    return replace(ARMS[name], conversion=ARMS[name].conversion | conversion)


LAST_TWO_BLOCKS = ["21", "24", "27", "30"]
POINTWISE, DEPTHWISE = ["6", "12", "18", "24", "30"], ["3", "9", "15", "21", "27"]

TEACHERS: tuple[Literal["start", "wide"], ...] = ("start", "wide")

RECIPES = {
    **{f"{name}, averaged weights": _trained(name, "engine", ema=0.999) for name in ("static", "condconv:4")},
    **{
        f"{name}, distilled from {teacher}": _trained(name, "distill", teacher=teacher, weight=0.5)
        for name in ("static", "condconv:4", "odconv:1")
        for teacher in TEACHERS
    },
    "condconv:4, expert dropout .1": _trained("condconv:4", "layers", expert_dropout=0.1),
    "condconv:4, balance .01": _trained("condconv:4", "layers", balance=0.01),
    "condconv:4, balance .1": _trained("condconv:4", "layers", balance=0.1),
    "condconv:4, sharpness .01": _trained("condconv:4", "layers", sharpness=0.01),
    "condconv:4, decay of routers": _trained("condconv:4", "layers", router_decay=1.0),
    "condconv:4, no decay of experts": _trained("condconv:4", "layers", expert_decay=0.0),
    "condconv:4, routers at .3 of the rate": _trained("condconv:4", "layers", router_lr=0.3),
    "condconv:4, last two blocks": _converted("condconv:4", include=LAST_TWO_BLOCKS),
    "condconv:4, pointwise": _converted("condconv:4", include=POINTWISE),
    "condconv:4, depthwise": _converted("condconv:4", include=DEPTHWISE),
    "odconv:4, temperature from 30": _trained("odconv:4", "schedule", temperature=30.0),
    "odconv:4, temperature from 4": _trained("odconv:4", "schedule", temperature=4.0),
}
