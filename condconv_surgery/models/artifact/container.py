"""The file format of an artifact: safetensors whose metadata is JSON. Nothing in a file is taken on trust."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.models.artifact.delta import Base, DeltaRecord, decode
from condconv_surgery.models.artifact.json_values import STORED
from condconv_surgery.models.artifact.rounded_experts import RoundedExperts, restore_experts
from condconv_surgery.models.artifact.skeleton import Skeleton
from condconv_surgery.models.checkpoints.file_type import SAFETENSORS, file_kind, instead_of, require_file
from condconv_surgery.recipe import Recipe
from condconv_surgery.runtime.tensor_hash import hash_tensors, is_plain_tensor

R = TypeVar("R")

MAGIC = "condconv-surgery"
_WANTED = "An artifact is one whole .safetensors file that save wrote."


@dataclass(frozen=True)
class Content:
    """What an artifact holds.

    tensors: each once. aliases: from each further name of a tensor to the name it is stored under.
    skeleton: the modules, where the recipe's source alone does not rebuild them. undescribed: the reason why such a
        model has no skeleton. attributes: the large tensors of plain attributes, which the skeleton names.
    delta: of a delta file, whose ``tensors`` are what its base has not.
    """

    path: Path
    recipe: Recipe
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    skeleton: Skeleton | None
    undescribed: str = ""
    attributes: dict[str, Tensor] = field(default_factory=dict)
    delta: DeltaRecord | None = None

    def with_base(self, base: Base) -> Content:
        """The content of a whole file. Raises ``InputError`` for another base than the file's."""
        assert self.delta is not None
        try:
            return replace(self, tensors=decode(self.tensors, self.delta, base), delta=None)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise damaged(self.path, f"its delta does not fit its base ({type(error).__name__}: {error})") from error

    def all_tensors(self) -> dict[str, Tensor]:
        """The tensors under all their names."""
        return {**self.tensors, **{name: self.tensors[first] for name, first in self.aliases.items()}}


def read(path: Path, trust: tuple[str, ...] = ()) -> Content:
    """The whole file. trust: see ``recipe.variant_from_dict``.

    Raises ``InputError`` when ``save`` did not write it, ``DamagedFileError`` when it was altered.
    """
    with _opened(path) as file:
        metadata = _metadata(path, file)
        recipe = Recipe.from_dict(_json(path, metadata, "recipe", dict), trust)
        aliases = _json(path, metadata, "aliases", dict)
        skeleton = _json(path, metadata, "skeleton", list) if "skeleton" in metadata else None
        delta = _delta(path, metadata) if "delta" in metadata else None
        rounded = _rounded(path, metadata) if "rounded" in metadata else None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    known = tensors if delta is None else {*tensors, *delta.equal, *delta.repeated}
    unknown = [first for first in aliases.values() if not isinstance(first, str) or first not in known]
    if unknown:
        raise damaged(path, f"an alias points to {unknown[0]!r}, which is not there")
    if hash_tensors(tensors, headers=False) != metadata.get("tensors_sha256"):
        raise damaged(path, "its tensors are not the ones that were written")
    if rounded is not None:
        try:
            tensors = restore_experts(tensors, rounded)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise damaged(path, f"its rounded experts cannot be read ({type(error).__name__}: {error})") from error
    stored = {name: tensors.pop(name) for name in list(tensors) if skeleton is not None and name.startswith(STORED)}
    return Content(path, recipe, tensors, aliases, skeleton, metadata.get("undescribed", ""), stored, delta)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe alone, without reading a tensor. Raises as ``load`` does."""
    path = Path(path)
    with _opened(path) as file:
        return Recipe.from_dict(_json(path, _metadata(path, file), "recipe", dict))


def read_delta(path: str | Path) -> DeltaRecord | None:
    """How a delta file is made up; ``None`` for a whole file. Raises as ``load`` does."""
    path = Path(path)
    with _opened(path) as file:
        metadata = _metadata(path, file)
        return _delta(path, metadata) if "delta" in metadata else None


def read_rounded(path: str | Path) -> RoundedExperts | None:
    """Which experts a file holds in fewer bits; ``None`` where all are exact. Raises as ``load`` does."""
    path = Path(path)
    with _opened(path) as file:
        metadata = _metadata(path, file)
        return _rounded(path, metadata) if "rounded" in metadata else None


def is_artifact(path: Path) -> bool:
    """Whether the file is a safetensors file with the mark of ``save``."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == MAGIC
    except (SafetensorError, OSError):
        return False


def unique_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the state once, contiguous; and from each further name of a tensor to its first name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        if not is_plain_tensor(tensor):
            kind = "sparse or quantised tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(
                f"The state of {name!r} is a {kind}.",
                "Only dense tensors can be saved without pickle.",
                "a buffer with persistent=False, or torch.save(model.state_dict(), FILE)",
            )
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().contiguous()
    storages = {t.untyped_storage().data_ptr() for t in tensors.values()}
    if len(storages) < sum(t.numel() > 0 for t in tensors.values()):  # safetensors refuses two views of one storage
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, aliases


def damaged(path: Path, what: str) -> DamagedFileError:
    """The error for a file that was altered after it was written."""
    return DamagedFileError(f"{path} is damaged: {what}.", "It was altered after it was written.", "convert again")


def _opened(path: Path) -> Any:
    require_file(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        kind = file_kind(path)
        if kind != SAFETENSORS:
            raise InputError(f"{path} is {kind}.", _WANTED, f'load_model("{path}")') from error
        raise DamagedFileError(
            f"{path} cannot be read as safetensors: {error}.",
            _WANTED,
            instead_of(path, "copy it again, or convert the original again"),
        ) from error


def _metadata(path: Path, file: Any) -> dict[str, str]:
    metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") != MAGIC:
        raise InputError(
            f"{path} is a safetensors file, but not one that condconv wrote.",
            "An artifact has its recipe in the metadata.",
            f'load_model("{path}")',
        )
    return metadata


def _delta(path: Path, metadata: dict[str, str]) -> DeltaRecord:
    return _record(path, metadata, "delta", DeltaRecord.from_dict)


def _rounded(path: Path, metadata: dict[str, str]) -> RoundedExperts:
    return _record(path, metadata, "rounded", RoundedExperts.from_dict)


def _record(path: Path, metadata: dict[str, str], key: str, from_dict: Callable[[dict[str, Any]], R]) -> R:
    try:
        return from_dict(_json(path, metadata, key, dict))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise damaged(path, f"its {key} is not the JSON that save writes ({type(error).__name__})") from error


def _json(path: Path, metadata: dict[str, str], key: str, kind: type) -> Any:
    try:
        value = json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise damaged(path, f"its {key} is not JSON ({type(error).__name__})") from error
    if not isinstance(value, kind):
        raise damaged(path, f"its {key} is not the JSON that save writes")
    return value
