"""The variants of conditional convolution: the options that fix the architecture of a layer. No torch.

A variant is a frozen dataclass here, or in any other module, and a router (``layers.router.router_for``)::

    @variant("mine")
    @dataclass(frozen=True)
    class Mine(Variant):
        sharpness: float = 1.0
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from condconv_surgery.errors import InputError, nearest, unknown_name


@dataclass(frozen=True)
class Variant:
    """What every conditional convolution has: a number of experts. ``kind`` is its registered name.

    routing: ``"layer"``: each layer has its own router; ``"block"``: one router, on the input of a block, serves all
        conditional convolutions of the block (as in CondConv's EfficientNet).
    """

    kind: ClassVar[str] = ""

    experts: int = 4
    routing: Literal["layer", "block"] = field(default="layer", kw_only=True)

    def __post_init__(self) -> None:
        _require_whole("experts", self.experts, low=1)
        _require_one_of("routing", self.routing, ("layer", "block"))

    def to_dict(self) -> dict[str, Any]:
        """Name and options, and for a variant from outside of this package the module that registers it."""
        home = type(self).__module__
        outside = {} if home.startswith("condconv_surgery.") else {"module": home}
        return {"kind": self.kind, **outside, **asdict(self)}


class UnknownVariantError(InputError):
    """A variant is registered by a module outside of this package, which is neither imported nor trusted."""


VARIANTS: dict[str, type[Variant]] = {}

V = TypeVar("V", bound=Variant)


def variant(kind: str) -> Callable[[type[V]], type[V]]:
    """Register a frozen dataclass under the name that the command line and artifacts use.

    Raises ``InputError`` for a name that another class has.
    """

    def register(cls: type[V]) -> type[V]:
        other = VARIANTS.get(kind, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):  # equal: a reloaded module
            raise InputError(
                f"The variant {kind!r} is registered twice: {cls.__qualname__} of {cls.__module__} is not "
                f"{other.__qualname__} of {other.__module__}.",
                "Each variant has a name of its own.",
                f'@variant("{cls.__module__.rpartition(".")[2]}_{kind}")',
            )
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
    temperature: initial value of the layer's temperature; training may anneal it.
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
    heads: ``"paper"`` omits the heads that the authors omit (filters of a depthwise layer, positions of a 1x1 kernel,
        experts when there is one); ``"all"`` omits only the head of the experts when there is one.
    gates: of the experts: ``"softmax"`` of a head like the others, as the authors have it; ``"sigmoid"`` of a linear
        map of the pooled input, as in CondConv.
    spatial: ``False`` omits the head of positions everywhere. With one expert the kernel is then the same for all
        images, and a runtime for constant weights can serve it (``deploy.forms.graph_forms``).
    """

    reduction: int = 16
    min_hidden: int = 16
    temperature: float = 1.0
    norm: Literal["batch", "none"] = "batch"
    activation: Literal["relu", "none"] = "relu"
    heads: Literal["paper", "all"] = "paper"
    gates: Literal["softmax", "sigmoid"] = "softmax"
    spatial: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routing == "block":
            raise InputError(
                'ODConv cannot share a router within a block (routing="block").',
                "Its attention over channels, filters and positions has the shape of one layer; the gates of CondConv "
                "and DynamicConv do not depend on it.",
                'routing="layer", or CondConv or DynamicConv',
            )
        _require_whole("reduction", self.reduction, low=1)
        _require_whole("min_hidden", self.min_hidden, low=1)
        _require_positive("temperature", self.temperature)
        _require_one_of("norm", self.norm, ("batch", "none"))
        _require_one_of("activation", self.activation, ("relu", "none"))
        _require_one_of("heads", self.heads, ("paper", "all"))
        _require_one_of("gates", self.gates, ("softmax", "sigmoid"))
        if not isinstance(self.spatial, bool):
            raise InputError(f"spatial is {self.spatial!r}.", "It must be true or false.", "spatial=False")


def make_variant(kind: str, *, trust: tuple[str, ...] = (), **options: Any) -> Variant:
    """The variant called ``kind``; options that are ``None`` keep their defaults.

    kind: a registered name, or ``package.module:name`` for one that the module registers when it is imported, which
        happens only if its top-level package is in ``trust``.

    >>> make_variant("condconv", experts=8, reduction=None)
    CondConv(experts=8, routing='layer')
    """
    module, _, kind = kind.rpartition(":")
    if module and kind not in VARIANTS:
        _import_registering(module, kind, trust)
    if kind not in VARIANTS:
        close = nearest(kind, VARIANTS, 1) or list(VARIANTS)
        raise unknown_name("variant", kind, VARIANTS, fix=f'variant="{close[0]}", or package.module:name')
    cls = VARIANTS[kind]
    chosen = {name: value for name, value in options.items() if value is not None}
    allowed = [field.name for field in fields(cls)]
    for name in chosen:
        if name not in allowed:
            having = [k for k, c in VARIANTS.items() if name in {f.name for f in fields(c)}]
            raise InputError(
                f"{kind} has no option {name!r}.",
                f"It has: {', '.join(allowed)}.",
                f"leave {name}= out" + (f", or take a variant that has it: {', '.join(having)}" if having else ""),
            )
    return cls(**chosen)


def variant_from_dict(data: dict[str, Any], trust: tuple[str, ...] = ()) -> Variant:
    """The inverse of ``Variant.to_dict``. trust: packages whose modules may be imported to register their variants.

    Raises ``UnknownVariantError`` for a variant of a module that is neither imported nor trusted.
    """
    options = dict(data)
    module, kind = options.pop("module", ""), options.pop("kind")
    return make_variant(f"{module}:{kind}" if module else kind, trust=trust, **options)


def _import_registering(module: str, kind: str, trust: tuple[str, ...]) -> None:
    """Import the module that registers the variant ``kind``."""
    package = module.partition(".")[0]
    if package not in trust:
        raise UnknownVariantError(
            f"The variant {kind!r} is registered by {module}, a module outside of this package.",
            "It must be imported before, or its package must be trusted.",
            f'import {module}, or trust=["{package}"]',
        )
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UnknownVariantError(
            f"{module}, which registers the variant {kind!r}, cannot be imported: {error}.",
            "It must be importable from here.",
            "PYTHONPATH=. before the command, or install its package",
        ) from error


def _require_whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(f"{name} is {value!r}.", f"It must be a whole number of at least {low}.", f"{name}=4")


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InputError(f"{name} is {value!r}.", "It must be a positive number.", f"{name}=1.0")


def _require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}.", f"It must be one of: {', '.join(allowed)}.", f"{name}={allowed[0]!r}")
