"""The state of a run on disk: one safetensors file whose metadata holds the JSON part. No pickle.

Two states are kept, the last and the one before it: a hash detects a file that a crash or a bad disk has damaged, and
the run is resumed from the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from condconv_surgery.errors import DamagedFileError, TrainingError, listed
from condconv_surgery.models.artifact.atomic_write import replacing
from condconv_surgery.runtime.own_state import own_state
from condconv_surgery.runtime.tensor_hash import hash_tensors
from condconv_surgery.training.distributed.fsdp import full_tensor, sharded_like
from condconv_surgery.training.state.run_files import failing_resumably, new_run

FORMAT = 1
LAST = "state.safetensors"
BEFORE = "state.previous.safetensors"

FACTS = ("progress", "options", "fingerprint", "optimizer", "scaler")
"""What the state of a run says beside its tensors."""

TECHNICAL = "Error while deserializing header: "
"""How messages of safetensors begin."""


@dataclass(frozen=True)
class State:
    """``tensors`` by ``part.name``; ``facts`` are JSON values."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, without its prefix."""
        prefix = f"{name}."
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}


def save_state(folder: Path, state: State) -> None:
    """Write ``state`` as the last one; the last becomes the previous. A kill at any moment leaves one undamaged."""
    tensors = {name: _own(tensor) for name, tensor in state.tensors.items()}
    facts = json.dumps(state.facts)
    metadata = {"format": str(FORMAT), "facts": facts, "sha256": hash_tensors(tensors, prefix=facts)}
    last = folder / LAST
    with failing_resumably(), replacing(last) as temporary:
        save_file(tensors, temporary, metadata)
        if last.exists():
            last.replace(folder / BEFORE)


def load_state(folder: Path) -> tuple[State | None, str]:
    """The newest undamaged state in ``folder`` and a line about a damaged one (``""``: none).

    ``None`` when there is no state yet. Raises ``DamagedFileError`` when all states are damaged.
    """
    damages: list[str] = []
    for path in (folder / LAST, folder / BEFORE):
        if not path.exists():
            continue
        try:
            return _of_run(path, read_state(path)), "; ".join(damages)
        except DamagedFileError as error:
            damages.append(error.given)
    if damages:
        raise DamagedFileError(" ".join(damages), "No undamaged state is left to resume from.", new_run(folder))
    return None, ""


def _of_run(path: Path, state: State) -> State:
    """The state, after a check that it says what every run saves. Raises ``DamagedFileError``."""
    if missing := [name for name in FACTS if name not in state.facts]:
        raise DamagedFileError(
            f"{path} cannot be read: it lacks {listed(missing)}.", "A state is what finetune writes."
        )
    return state


def read_state(path: Path) -> State:
    """The state in one file. Raises ``DamagedFileError``."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if int(metadata["format"]) > FORMAT:
                raise ValueError(f"its format is {metadata['format']}, newer than this version of condconv-surgery")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        facts = metadata["facts"]
        if metadata["sha256"] != hash_tensors(tensors, prefix=facts):
            raise ValueError("its content is not what was written")
        state = State(tensors, json.loads(facts))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f"{path} cannot be read: {str(error).removeprefix(TECHNICAL)}.", "A state is what finetune writes."
        ) from error
    return state


def model_part(model: nn.Module, part: str = "model") -> dict[str, Tensor]:
    """Parameters and persistent buffers, under ``part.``."""
    return {f"{part}.{name}": full_tensor(tensor) for name, tensor in own_state(model).items()}


@torch.no_grad()
def restore_model(model: nn.Module, tensors: dict[str, Tensor], name: str = "", folder: Path = Path()) -> None:
    """Fill ``model`` in place, every tensor and no other. Raises ``TrainingError`` when they do not fit.

    name: of the model that the run in ``folder`` began with.
    """
    target = own_state(model)
    if target.keys() != tensors.keys() or any(target[n].shape != t.shape for n, t in tensors.items()):
        differing = ", ".join(sorted(target.keys() ^ tensors.keys())[:3])
        raise TrainingError(
            f"The saved state is of another model{f' (differs in {differing})' if differing else ''}.",
            f"A run is resumed with the model that it started with{f', {name}' if name else ''}.",
            f"{name or 'that model'}, or {new_run(folder)}",
        )
    for key, tensor in tensors.items():
        target[key].copy_(sharded_like(target[key], tensor))  # keeps device and memory format


def optimizer_part(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors under ``optimizer.INDEX.NAME`` and plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = full_tensor(value)
            else:
                plain[f"{index}.{name}"] = value
    return tensors, plain


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """The inverse of ``optimizer_part``. The groups are those built from the options."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in [*tensors.items(), *plain.items()]:
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        state.setdefault(int(index), {})[name] = sharded_like(parameter, value) if isinstance(value, Tensor) else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _own(tensor: Tensor) -> Tensor:
    """A contiguous CPU copy: safetensors takes no views and no two names for one storage."""
    return tensor.detach().to("cpu", copy=True).contiguous()
