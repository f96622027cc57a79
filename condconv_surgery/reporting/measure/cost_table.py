"""The cost table: one row per layer with parameters, MACs and bytes; their sums; the counting convention."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_COUNTED = (
    "MACs are multiply-accumulates of one image (FLOPs = 2 x MACs) in convolutions, linear layers and matrix products. "
)
_PARTS = (
    "Convolution: what the original computes. Mixing: experts x kernel weights. "
    "Routing: from pooled features to gates. Attention: ODConv's heads for channels, filters and positions. "
)
_NOT_COUNTED = "Not counted: norms, activations, pooling and other elementwise work."

CONVENTION = _COUNTED + _PARTS + _NOT_COUNTED
"""What is counted."""

PLAIN_CONVENTION = _COUNTED + _NOT_COUNTED
"""What is counted in a network without conditional layers."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image in four parts (see ``CONVENTION``)."""

    convolution: int = 0
    mixing: int = 0
    routing: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        return self.convolution + self.mixing + self.routing + self.attention

    def __add__(self, other: Macs) -> Macs:
        return Macs(
            self.convolution + other.convolution,
            self.mixing + other.mixing,
            self.routing + other.routing,
            self.attention + other.attention,
        )


@dataclass(frozen=True)
class Layer:
    """One row: a module that owns parameters or has MACs.

    kind: ``condconv``, ``odconv``, ``dynamicconv``, or the class name of a plain module. experts: 1 for a plain one.
    shape: of one kernel, (O, I/G, kh, kw), or of the weight; ``()`` without one.
    geometry: channels, kernel and stride as text, ``64>128 3x3 /2``.
    parameters, parameters_before: after conversion, and of the plain layer before it.
    macs: of one image, summed over ``calls``. weight_bytes: parameters and buffers.
    activation_bytes, activation_values: size of its outputs for one image, in bytes and in elements.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    geometry: str
    experts: int
    calls: int
    parameters: int
    parameters_before: int
    macs: Macs
    weight_bytes: int
    weight_bytes_before: int
    activation_bytes: int
    activation_values: int
    conditional: bool

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "macs": {**asdict(self.macs), "total": self.macs.total}}


@dataclass(frozen=True)
class Profile:
    """All rows of a model in the order of its modules, and their sums.

    input: shapes of the arguments as text, ``1x3x224x224``.
    """

    layers: tuple[Layer, ...]
    input: str

    @property
    def parameters(self) -> int:
        """Equals ``sum(p.numel() for p in model.parameters())``."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters_before(self) -> int:
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def macs(self) -> Macs:
        return sum((layer.macs for layer in self.layers), Macs())

    @property
    def macs_before(self) -> int:
        return self.macs.convolution

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def weight_bytes_before(self) -> int:
        return sum(layer.weight_bytes_before for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the outputs of all rows, for one image."""
        return sum(layer.activation_bytes for layer in self.layers)

    @property
    def multiplying(self) -> int:
        """Number of layers that have MACs or are conditional; a block's router does not count as a layer."""
        return sum(bool(layer.macs.total or layer.conditional) and layer.kind != "router" for layer in self.layers)

    @property
    def converted(self) -> int:
        return sum(layer.conditional for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        macs = self.macs
        return {
            "input": self.input,
            "convention": CONVENTION if self.converted else PLAIN_CONVENTION,
            "parameters": {"before": self.parameters_before, "after": self.parameters},
            "macs": {"before": self.macs_before, "after": macs.total, **asdict(macs)},
            "flops": {"before": 2 * self.macs_before, "after": 2 * macs.total},
            "weight_bytes": {"before": self.weight_bytes_before, "after": self.weight_bytes},
            "activation_bytes": self.activation_bytes,
            "converted": self.converted,
            "layers": [layer.to_dict() for layer in self.layers],
        }
