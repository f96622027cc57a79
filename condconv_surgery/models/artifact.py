"""A converted model as one self-describing safetensors file.

The metadata holds the recipe (where the skeleton comes from, which layers are conditional and of which variant, which
heads were exchanged) and the names that share one tensor. ``load`` builds the skeleton, puts empty conditional
layers in their places and fills every tensor, strictly. There is no pickle, and nothing is imported that the user
or this package did not name.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from condconv_surgery.errors import DamagedFileError, InputError, nearest
from condconv_surgery.layers import ConditionalConv2d, ConditionalLinear, conditional_like
from condconv_surgery.models.building import build
from condconv_surgery.models.files import replacing
from condconv_surgery.models.recognition import recognise_module
from condconv_surgery.recipe import ConvertedLayer, Recipe, attach_recipe, recipe_of

__all__ = ["attach_recipe", "is_artifact", "load", "read_recipe", "recipe_of", "save"]

MAGIC = "condconv-surgery"


def save(model: nn.Module, path: str | Path) -> None:
    """Write ``model``, converted or not, so that ``load(path)`` gives it back with bit-identical outputs.

    The recipe is the one that the model carries, brought up to date from the model itself. A model without a
    known source is recognised if torchvision or timm can build it; any other needs ``load(path, model=skeleton)``.
    Raises ``InputError`` when the file cannot be written; an existing file is then unchanged.
    """
    path = Path(path)
    tensors, aliases = _unique_tensors(model)
    metadata = {
        "format": MAGIC,
        "recipe": json.dumps(_current_recipe(model).to_dict()),
        "aliases": json.dumps(aliases),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def load(path: str | Path, *, model: nn.Module | None = None, trust: tuple[str, ...] = ()) -> nn.Module:
    """The model that ``save`` wrote, in eval mode, on the CPU, carrying its recipe.

    model: the unconverted skeleton, for a model whose source only its author knows; it is changed and returned.
    trust: packages that a recipe may name as the home of its factory, beyond torchvision and timm.

    Raises ``InputError`` for a file of another kind and ``DamagedFileError`` for one that is truncated, altered or
    newer.
    """
    path = Path(path)
    recipe, aliases, tensors = _read(path)
    skeleton = _skeleton(path, recipe, trust) if model is None else model
    try:
        for name, width in recipe.heads.items():
            skeleton.set_submodule(name, _resized(skeleton.get_submodule(name), width))
        for row in recipe.layers:
            _put_conditional(skeleton, row)
    except AttributeError as error:
        raise DamagedFileError(
            f"{path} does not fit its own source {recipe.source.name or 'model'!r}: {error}.",
            "The recipe's layers must exist in the model that its source builds.",
            "install the versions that wrote it: " + ", ".join(f"{k}=={v}" for k, v in recipe.versions.items()),
        ) from error
    _fill(skeleton, {**tensors, **{name: tensors[first] for name, first in aliases.items()}}, path)
    attach_recipe(skeleton, recipe)
    return skeleton.eval()


def is_artifact(path: Path) -> bool:
    """The file is a safetensors file that says it is ours."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == MAGIC
    except (SafetensorError, OSError):
        return False


def read_recipe(path: str | Path) -> Recipe:
    """The recipe alone, without reading a tensor. Raises as ``load`` does."""
    with _opened(Path(path)) as file:
        return _parse_metadata(Path(path), file.metadata())[0]


def _current_recipe(model: nn.Module) -> Recipe:
    recipe = recipe_of(model) or Recipe()
    if not recipe.source.name:
        recipe = replace(recipe, source=recognise_module(model) or recipe.source)
    versions = {name: version(name) for name in ("torch", "torchvision", "condconv-surgery")}
    return replace(recipe, layers=_converted_layers(model), versions=versions)


def _converted_layers(model: nn.Module) -> tuple[ConvertedLayer, ...]:
    found: dict[int, tuple[list[str], ConditionalConv2d[Any]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ConditionalConv2d):
            found.setdefault(id(module), ([], module))[0].append(name)
    return tuple(
        ConvertedLayer(tuple(names), layer.variant, isinstance(layer, ConditionalLinear))
        for names, layer in found.values()
    )


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the state once, contiguous, and for each further name of one the first."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"The state of {name!r} is a {type(tensor).__name__}.", "Only tensors can be saved without pickle."
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().contiguous()
    kept = {t.untyped_storage().data_ptr() for t in tensors.values()}
    if len(kept) < sum(t.numel() > 0 for t in tensors.values()):  # two views of one storage: safetensors refuses them
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, aliases


def _read(path: Path) -> tuple[Recipe, dict[str, str], dict[str, Tensor]]:
    with _opened(path) as file:
        recipe, aliases = _parse_metadata(path, file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    unknown = [first for first in aliases.values() if first not in tensors]
    if unknown:
        raise _damaged(path, f"an alias points to {unknown[0]!r}, which is not there")
    return recipe, aliases, tensors


def _opened(path: Path) -> Any:
    if not path.exists():
        raise InputError(f"{path} does not exist.", "A model file is needed.", "ls " + str(path.parent or "."))
    if path.is_dir():
        raise InputError(f"{path} is a folder.", "A model file is needed.", f"{path}/best.safetensors")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(
            f"{path} cannot be read as safetensors: {error}.",
            "An artifact is one whole .safetensors file that condconv wrote.",
            "copy it again, or convert the original again",
        ) from error


def _parse_metadata(path: Path, metadata: dict[str, str] | None) -> tuple[Recipe, dict[str, str]]:
    if not metadata or metadata.get("format") != MAGIC:
        raise InputError(
            f"{path} is a safetensors file, but not one that condconv wrote.",
            "An artifact carries its recipe in the metadata.",
            f"condconv convert {path}",
        )
    try:
        recipe = json.loads(metadata["recipe"])
        aliases = json.loads(metadata["aliases"])
    except (KeyError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its recipe is not JSON ({type(error).__name__})") from error
    if not isinstance(recipe, dict) or not isinstance(aliases, dict):
        raise _damaged(path, "its recipe is not a JSON object")
    return Recipe.from_dict(recipe), {str(name): str(first) for name, first in aliases.items()}


def _damaged(path: Path, what: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is damaged: {what}.", "It was altered after it was written.", "convert again")


def _skeleton(path: Path, recipe: Recipe, trust: tuple[str, ...]) -> nn.Module:
    if not recipe.source.name:
        raise InputError(
            f"{path} does not say how its model is built: it was saved from a class that only its author has.",
            "Give the unconverted model, with any weights.",
            f'condconv_surgery.load("{path}", model=MyNet())',
        )
    return build(recipe.source, trust)


def _put_conditional(skeleton: nn.Module, row: ConvertedLayer) -> None:
    plain = skeleton.get_submodule(row.names[0])
    if not isinstance(plain, nn.Linear if row.linear else nn.Conv2d):
        raise AttributeError(f"{row.names[0]} is a {type(plain).__name__}")
    layer = conditional_like(plain, row.variant)
    for name in row.names:
        skeleton.set_submodule(name, layer, strict=True)


def _resized(head: nn.Module, width: int) -> nn.Module:
    weight_bias = getattr(head, "bias", None) is not None
    if isinstance(head, nn.Linear):
        return nn.Linear(head.in_features, width, weight_bias, dtype=head.weight.dtype)
    if isinstance(head, nn.Conv2d):
        return nn.Conv2d(
            head.in_channels,
            width,
            head.kernel_size,  # type: ignore[arg-type]
            head.stride,  # type: ignore[arg-type]
            head.padding,  # type: ignore[arg-type]
            head.dilation,  # type: ignore[arg-type]
            bias=weight_bias,
            dtype=head.weight.dtype,
        )
    raise AttributeError(f"the head to exchange is a {type(head).__name__}")


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy every tensor into its place, strictly: the same names, the same shapes; dtypes as in the file."""
    wanted = model.state_dict(keep_vars=True)
    missing, unexpected = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        what = f"it lacks {missing[0]!r}" if missing else f"it has {unexpected[0]!r}, which the model has not"
        close = nearest((missing or unexpected)[0], unexpected if missing else missing, 1)
        raise _damaged(
            path,
            f"{what} ({len(missing)} missing, {len(unexpected)} unexpected)"
            + "".join(f"; nearest: {name!r}" for name in close),
        )
    for name, tensor in tensors.items():
        place = wanted[name]
        if place.shape != tensor.shape:
            raise _damaged(path, f"{name!r} has shape {tuple(tensor.shape)}, the model {tuple(place.shape)}")
        if place.dtype != tensor.dtype:
            place.data = place.data.to(tensor.dtype)
        place.copy_(tensor)
