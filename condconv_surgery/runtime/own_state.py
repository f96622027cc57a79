"""The tensors of a model by the names in its module tree, whatever its own ``state_dict`` leaves out or renames."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def own_state(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """Parameters, persistent buffers and extra states, in the order of ``model.state_dict()``.

    A class may override ``state_dict`` to leave out a frozen part, or to return copies: what is filled through it would
    lack that part. keep_vars: the parameters themselves, not detached.
    """
    state: dict[str, Any] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for prepare in module._state_dict_pre_hooks.values():
            prepare(module, start, keep_vars)  # FSDP shards parameters again, which a forward pass had gathered
        module._save_to_state_dict(state, start, keep_vars)  # extra states and packed weights
        slots: dict[str, Tensor | None] = {**dict(module._parameters), **dict(module._buffers)}
        for name, tensor in slots.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                state[f"{start}{name}"] = tensor if keep_vars else tensor.detach()
    return state
