"""The files of other implementations, written: tensors under their names, in their shapes, as safetensors."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.layers import conditional_layers
from condconv_surgery.models.artifact.atomic_write import replacing, require_values
from condconv_surgery.models.layouts.layout_registry import LAYOUTS


def write_layout(model: nn.Module, layout: str, path: str | Path) -> dict[str, Tensor]:
    """Write the state dict of ``model`` in a layout of ``LAYOUTS``; returns it.

    Raises ``InputError`` for an unknown layout, a model that the layout cannot hold or that has no values (on meta), or
    a path that cannot be written; an existing file is then unchanged.
    """
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, list(LAYOUTS), 'layout="timm"')
    if not conditional_layers(model):
        raise InputError(
            "The model has no conditional layer.",
            "Without one its own state dict is the file.",
            "convert(model, CondConv(experts=4))",
        )
    require_values(model.state_dict())
    state = LAYOUTS[layout].write(model)
    with replacing(Path(path)) as temporary:
        own = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}  # none share memory
        save_file(own, temporary, {"format": "pt"})
    return state
