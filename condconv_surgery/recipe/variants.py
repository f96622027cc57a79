"""The kinds of conditional convolution, each as the few numbers that fix its architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from condconv_surgery.errors import InputError, unknown_name


@dataclass(frozen=True)
class Variant:
    """What every conditional convolution has: a number of experts. ``kind`` is its registered name.

    routing: ``"layer"``: each layer has a router of its own; ``"block"``: one router, on the input of a block, serves
        all conditional convolutions of the block (as in CondConv's EfficientNet).
    """

    kind: ClassVar[str] = ""

    experts: int = 4
    routing: Literal["layer", "block"] = field(default="layer", kw_only=True)

    def __post_init__(self) -> None:
        _require_whole("experts", self.experts, low=1)
        _require_one_of("routing", self.routing, ("layer", "block"))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


VARIANTS: dict[str, type[Variant]] = {}

V = TypeVar("V", bound=Variant)


def variant(kind: str) -> Callable[[type[V]], type[V]]:
    """Register a configuration class under the name that the command line and artifacts use."""

    def register(cls: type[V]) -> type[V]:
        cls.kind = kind
        VARIANTS[kind] = cls
        return cls

    return register


@variant("condconv")
@dataclass(frozen=True)
class CondConv(Variant):
    """Sigmoid gates from one linear map of the pooled input (Yang et al., NeurIPS 2019)."""


@variant("dynamicconv")
@dataclass(frozen=True)
class DynamicConv(Variant):
    """Softmax gates from a two-layer perceptron (Chen et al., CVPR 2020).

    reduction: the hidden width is ``in_channels // reduction`` (the paper's 4).
    temperature: the first value of the layer's temperature; training may anneal it.
    """

    reduction: int = 4
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_whole("reduction", self.reduction, low=1)
        _require_positive("temperature", self.temperature)


@variant("odconv")
@dataclass(frozen=True)
class ODConv(Variant):
    """Attention over kernel positions, input channels, filters and experts (Li et al., ICLR 2022).

    reduction, min_hidden: the hidden width is ``max(in_channels // reduction, min_hidden)``.
    temperature: divides the logits of all four attentions.
    norm, activation: between the hidden map and the heads; ``"batch"`` and ``"relu"`` are the authors'.
    heads: ``"paper"`` leaves out the heads that the authors leave out (filters of a depthwise layer,
        positions of a 1x1 kernel, experts when there is one); ``"all"`` keeps all but the last.
    """

    reduction: int = 16
    min_hidden: int = 16
    temperature: float = 1.0
    norm: Literal["batch", "none"] = "batch"
    activation: Literal["relu", "none"] = "relu"
    heads: Literal["paper", "all"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routing == "block":
            raise InputError(
                "ODConv cannot share a router within a block (routing='block').",
                "Its attention over channels, filters and positions has the shape of one layer; CondConv's and "
                "DynamicConv's gates have not.",
                "--routing layer, or --variant condconv|dynamicconv",
            )
        _require_whole("reduction", self.reduction, low=1)
        _require_whole("min_hidden", self.min_hidden, low=1)
        _require_positive("temperature", self.temperature)
        _require_one_of("norm", self.norm, ("batch", "none"))
        _require_one_of("activation", self.activation, ("relu", "none"))
        _require_one_of("heads", self.heads, ("paper", "all"))


def make_variant(kind: str, **options: Any) -> Variant:
    """The variant called ``kind``; options that are ``None`` keep their defaults.

    >>> make_variant("condconv", experts=8, reduction=None)
    CondConv(experts=8, routing='layer')
    """
    if kind not in VARIANTS:
        raise unknown_name("kind of convolution", kind, VARIANTS, fix=f"--variant {'|'.join(VARIANTS)}")
    cls = VARIANTS[kind]
    given = {name: value for name, value in options.items() if value is not None}
    allowed = [field.name for field in fields(cls)]
    for name in given:
        if name not in allowed:
            having = [k for k, c in VARIANTS.items() if name in {f.name for f in fields(c)}]
            raise InputError(
                f"{kind} has no option {name!r}.",
                f"It has: {', '.join(allowed)}.",
                f"leave it out, or --variant {having[0]}" if having else "leave it out",
            )
    return cls(**given)


def variant_from_dict(data: dict[str, Any]) -> Variant:
    """The inverse of ``Variant.to_dict``."""
    return make_variant(**data)


def _require_whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(
            f"{name} is {value!r}.", f"It must be a whole number of at least {low}.", f"--{name.replace('_', '-')} 4"
        )


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InputError(f"{name} is {value!r}.", "It must be a positive number.", f"{name}=1.0")


def _require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}.", f"It must be one of: {', '.join(allowed)}.", f"{name}={allowed[0]!r}")
