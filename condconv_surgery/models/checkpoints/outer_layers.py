"""The stem and the head of a classifier, by the names and shapes of its tensors.

They are what people change in a known architecture: the channels of the image, the number of classes, the whole head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

MAX_HEAD_LAYERS = 3
"""Linear layers of the largest head (VGG's). Box heads of detectors have more."""

FEWEST_TENSORS = 8
"""Of a body. AlexNet's has 10."""


@dataclass(frozen=True)
class OuterLayers:
    """stem: the name of its weight. head: the name of the last layer. group: what the names of the head begin with."""

    stem: str
    head: str
    group: str

    @property
    def stem_bias(self) -> str:
        """The name of its bias, which it need not have."""
        return f"{self.stem.removesuffix('weight')}bias"


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """Shapes by name, without the counters of batch norms, which older files lack."""
    return {name: tuple(t.shape) for name, t in state.items() if not name.endswith("num_batches_tracked")}


def outer_layers(shapes: Shapes) -> OuterLayers | None:
    """Those of a network that ends in a classifier: linear layers, or one 1x1 convolution. ``None`` for any other."""
    weights = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) in (2, 4)]
    stem = next((name for name in weights if len(shapes[name]) == 4), None)
    if stem is None or not _is_linear(shapes[weights[-1]]):
        return None
    head = weights[-1].removesuffix(".weight")
    group = head.partition(".")[0] + "."
    inside = [name for name in weights if name.startswith(group)]
    if len(inside) > MAX_HEAD_LAYERS or not all(_is_linear(shapes[name]) for name in inside) or stem in inside:
        return None
    return OuterLayers(stem, head, group)


def body_fits(network: Shapes, own: Shapes) -> bool:
    """Whether ``own`` has all tensors of ``network`` outside of its head; its stem may take other channels.

    Tensors of modules at the top that ``network`` does not have may stand beside them.
    """
    outer = outer_layers(network)
    if outer is None:
        return False
    body = {name: shape for name, shape in network.items() if not name.startswith(outer.group)}
    known, tops = {*body, outer.stem_bias}, {name.partition(".")[0] for name in body}
    if len(body) < FEWEST_TENSORS or any(name.partition(".")[0] in tops and name not in known for name in own):
        return False
    return all(
        own.get(name) == shape or (name == outer.stem and _same_but_channels(shape, own.get(name)))
        for name, shape in body.items()
    )


def _is_linear(shape: tuple[int, ...]) -> bool:
    return prod(shape[2:]) == 1


def _same_but_channels(one: tuple[int, ...], other: tuple[int, ...] | None) -> bool:
    return other is not None and len(other) == 4 and (one[0], *one[2:]) == (other[0], *other[2:])
