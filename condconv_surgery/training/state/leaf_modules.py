"""Check that a run goes on with the layers that it began with, not only with tensors of the same shapes, and trains the
same parameters."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from condconv_surgery.errors import InputError, listed
from condconv_surgery.training.state.run_files import new_run

SHOWN = 3


def leaf_modules(model: nn.Module) -> dict[str, str]:
    """The modules without children, as they print themselves: ``{"features.0.2": "ReLU6(inplace=True)"}``.

    Without ``nn.Identity``, which a graph may leave out, and without addresses of objects. What a forward calls as a
    function is not seen.
    """
    return {
        name: re.sub(r" at 0x[0-9a-f]+", "", f"{type(module).__name__}({module.extra_repr()})")
        for name, module in model.named_modules()
        if next(module.children(), None) is None and not isinstance(module, nn.Identity)
    }


def require_same_modules(before: dict[str, str], now: dict[str, str], name: str, folder: Path) -> None:
    """Raise ``InputError`` when modules are not those that the run in ``folder`` began with.

    before, now: ``leaf_modules``. name: of the model that the run began with.
    """
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        changes = [f"{key} was {before.get(key, 'absent')} and is {now.get(key, 'absent')}" for key in changed[:SHOWN]]
        more = f"; {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise InputError(
            f"The model is not the one that the run began with: {'; '.join(changes)}{more}.",
            "The weights of a run fit the layers that they were trained in.",
            f"{name or 'that model'}, or {new_run(folder)}",
        )


def frozen_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that have no gradient."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def require_same_frozen(before: list[str], now: list[str], folder: Path) -> None:
    """Raise ``InputError`` when others are frozen than in the run in ``folder``: the optimizer's state is not theirs.

    before, now: ``frozen_parameters``.
    """
    changes = [
        f"{listed(sorted(names))}, {verb} frozen"
        for names, verb in ((set(now) - set(before), "now"), (set(before) - set(now), "no longer"))
        if names
    ]
    if changes:
        raise InputError(
            f"The run began to train other parameters: {'; '.join(changes)}.",
            "The state of the optimizer is that of the parameters that the run trains.",
            f"requires_grad_(...) of the model as when the run began, or {new_run(folder)}",
        )
