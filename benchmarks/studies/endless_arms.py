"""The arms of ``endless_study``: how the network is converted, and how it trains on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from condconv_surgery.recipe import CondConv, ODConv, Variant
from condconv_surgery.recipe.training_sections import LayerOptions


@dataclass(frozen=True)
class Arm:
    """variant: ``None`` for the static network. conversion: options of ``convert``. classifier: the variant of the
    classifier, where it is another than that of the convolutions. length: steps, as a multiple of those of other arms.
    rate_of: the arm whose learning rate it takes, without a search of its own.
    """

    variant: Variant | None = None
    conversion: dict[str, Any] = field(default_factory=dict)
    classifier: Variant | None = None
    weight_decay: float = 0.02
    layers: LayerOptions = LayerOptions()  # noqa: RUF009  # frozen
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
