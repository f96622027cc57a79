"""The layouts of other implementations' state dicts, one entry each: how to recognise, read and write them.

To add one from any package: ``register_layout(Layout("mine", write=to_mine))``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from condconv_surgery.errors import InputError, listed, unknown_name
from condconv_surgery.layers import conditional_layers
from condconv_surgery.layers.find_layers import folded_layers, require_exact_experts
from condconv_surgery.models.artifact.atomic_write import replacing, require_values
from condconv_surgery.models.checkpoints.recognise_architecture import recognise
from condconv_surgery.models.layouts import odconv_layout, timm_layout
from condconv_surgery.recipe import Source
from condconv_surgery.runtime.wrappers import unwrapped

State = dict[str, Tensor]


def _recognise_plain(state: State) -> Source:
    return recognise({name: tuple(tensor.shape) for name, tensor in state.items()})


@dataclass(frozen=True)
class Layout:
    """How another implementation names and shapes the tensors of a conditional network.

    write: from a model to its state dict in this layout; raises ``InputError`` where the layout cannot hold it.
    matches: whether a state dict is in this layout; never, for a layout that is only written.
    recognise: the network that has such a state dict; raises ``InputError`` when none or several do.
    plain_source: from that network to the one with plain convolutions.
    read: put the conditional layers into that plain model, in place, and return the state dict under our names.
    """

    name: str
    write: Callable[[nn.Module], State] = lambda model: dict(model.state_dict())
    matches: Callable[[State], bool] = lambda state: False
    recognise: Callable[[State], Source] = _recognise_plain
    plain_source: Callable[[Source], Source] = lambda source: source
    read: Callable[[nn.Module, State], State] = lambda model, state: state


PLAIN = Layout("plain")
"""A state dict with nothing conditional in it, as every torch model writes it."""

LAYOUTS: dict[str, Layout] = {}
"""By name. ``timm``: its EfficientNets with CondConv. ``odconv``: the code of the paper's authors."""


def register_layout(layout: Layout) -> None:
    """Add a layout to ``LAYOUTS``: ``write_layout`` writes it and ``load_model`` recognises it."""
    LAYOUTS[layout.name] = layout


def layout_of(state: State) -> Layout:
    """The layout that a state dict is in, else ``PLAIN``."""
    return next((layout for layout in LAYOUTS.values() if layout.matches(state)), PLAIN)


def write_layout(model: nn.Module, layout: str, path: str | Path) -> State:
    """Write the state dict of ``model`` in a layout of ``LAYOUTS``, as safetensors; returns it.

    Raises ``InputError`` for an unknown layout, a model that the layout cannot hold or that has no values (on meta), or
    a path that cannot be written; an existing file is then unchanged.
    """
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, list(LAYOUTS), 'layout="timm"')
    model = unwrapped(model)
    if not conditional_layers(model):
        raise InputError(
            "The model has no conditional layer.",
            "Without one its own state dict is the file.",
            "convert(model, CondConv(experts=4))",
        )
    if folded := folded_layers(model):
        raise InputError(
            f"The model is folded: {listed(folded)} took in the batch norm behind.",
            "A layout of another implementation has its batch norms.",
            "the artifact from before it was folded",
        )
    require_exact_experts(model, "Other implementations hold exact experts.")
    require_values(model.state_dict())
    state = LAYOUTS[layout].write(model)
    with replacing(Path(path)) as temporary:
        own = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}  # none share memory
        save_file(own, temporary, {"format": "pt"})
    return state


register_layout(
    Layout(
        "timm",
        timm_layout.to_timm_layout,
        timm_layout.is_timm_layout,
        timm_layout.recognise_timm,
        timm_layout.plain_counterpart,
        timm_layout.read_timm_layout,
    )
)
register_layout(
    Layout(
        "odconv",
        odconv_layout.to_odconv_layout,
        odconv_layout.is_odconv_layout,
        lambda state: _recognise_plain(odconv_layout.without_attention(state)),
        read=odconv_layout.read_odconv_layout,
    )
)
