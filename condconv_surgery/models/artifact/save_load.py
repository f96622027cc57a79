"""A converted model as one self-describing safetensors file.

The metadata holds the recipe (the source of the skeleton, the conditional layers and their variants, the replaced
heads), the names that share one tensor and, where no source rebuilds the model, its modules as JSON (see ``skeleton``).
``load`` builds the skeleton, replaces its layers by uninitialised conditional ones and fills every tensor, strictly.
There is no pickle, and nothing is imported that the user or this package did not name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from condconv_surgery.errors import DamagedFileError, InputError, nearest
from condconv_surgery.layers import ConditionalConv2d, ConditionalLinear, routed_blocks
from condconv_surgery.layers.find_layers import named_layers, require_exact_experts, require_stored_experts
from condconv_surgery.layers.routed_block import shared_router_of
from condconv_surgery.models.artifact.as_built import is_as_built, note_not_as_built
from condconv_surgery.models.artifact.atomic_write import replacing, require_values
from condconv_surgery.models.artifact.container import (
    MAGIC,
    Content,
    damaged,
    read,
    unique_tensors,
)
from condconv_surgery.models.artifact.delta import Base, DeltaRecord, encode
from condconv_surgery.models.artifact.json_values import UndescribableError
from condconv_surgery.models.artifact.rounded_experts import RoundedExperts, rounded_tensors
from condconv_surgery.models.artifact.skeleton import describe, rebuild, transient_tensors
from condconv_surgery.models.build_model import build, put_conditional, replace_heads
from condconv_surgery.models.checkpoints.allowlist import ScriptClassError, trusted
from condconv_surgery.models.checkpoints.pickled_modules import check_module
from condconv_surgery.models.checkpoints.recognise_architecture import recognise_module, same_modules
from condconv_surgery.models.factory_source import FACTORY
from condconv_surgery.models.source_registry import builder_for
from condconv_surgery.models.transformers_source import PREFIX, transformers_source_of
from condconv_surgery.recipe import ConvertedLayer, Recipe, Source, attach_recipe, recipe_of
from condconv_surgery.runtime.class_names import classes_of
from condconv_surgery.runtime.own_state import own_state
from condconv_surgery.runtime.tensor_hash import hash_tensors
from condconv_surgery.runtime.wrappers import unwrapped
from condconv_surgery.surgery import BlockError, lift_convolutions, route_block

UNCHECKED_WIDTH = 1024
"""Widths of a recipe up to this need no check: building them takes little memory."""


def save(
    model: nn.Module, path: str | Path, *, alone: bool = True, base: Base | None = None, precision: str = "exact"
) -> DeltaRecord | RoundedExperts | None:
    """``delta_base.save`` with a base that is loaded."""
    model, path = unwrapped(model), Path(path)
    require_exact_experts(model, 'A file of rounded experts is written from exact ones: save(precision="int8").')
    require_stored_experts(model)
    state = own_state(model)
    require_values(state)
    tensors, aliases = unique_tensors(state)
    recipe = _current_recipe(model)
    metadata = {"format": MAGIC, "recipe": json.dumps(recipe.to_dict()), "aliases": json.dumps(aliases)}
    stored: dict[str, Tensor] = {}
    metadata |= _description(model, recipe, stored)
    if alone and "undescribed" in metadata:
        raise InputError(
            f"{path} alone could not rebuild the model: {metadata['undescribed']}.",
            "A model as a function of yours builds it needs no description, only its weights.",
            'load_model("package.module:factory", weights="FILE"), or alone=False and load(path, model=MyNet())',
        )
    if "skeleton" in metadata:
        tensors |= stored | {name: tensor.detach().clone() for name, tensor in transient_tensors(model).items()}
    record: DeltaRecord | RoundedExperts | None = None
    if base is not None:
        tensors, record = encode(tensors, base, rounded=precision == "bfloat16")
        metadata["delta"] = json.dumps(record.to_dict())
    elif precision != "exact":
        names = [f"{name}.weight" for names, _ in named_layers(model, ConditionalConv2d) for name in names]
        tensors, record = rounded_tensors(tensors, names, precision)
        metadata["rounded"] = json.dumps(record.to_dict())
    metadata["tensors_sha256"] = hash_tensors(tensors, headers=False)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)
    return record


def why_not_alone(model: nn.Module) -> str:
    """Why another process could not rebuild ``model`` from the file of ``save``; empty where it can."""
    model = unwrapped(model)
    metadata = _description(model, _current_recipe(model), {})
    of_script = re.search(r'"(__main__\.[\w.]+)"', metadata.get("skeleton", ""))
    return f"{of_script[1]} is of this script" if of_script else metadata.get("undescribed", "")


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    trust: str | tuple[str, ...] = (),
    base: Callable[[str], Base] | None = None,
) -> nn.Module:
    """``delta_base.load``. base: gets the name that a delta file has of its base."""
    path = Path(path)
    packages = trusted(trust)
    content = read(path, packages)
    if content.delta is not None:
        content = content.with_base(_base_of(content.delta, path, base))
    recipe = content.recipe
    skeleton = _skeleton(content, packages) if model is None else model
    if isinstance(skeleton, fx.GraphModule) and recipe.layers:
        lift_convolutions(skeleton)  # as convert did: the file has the names that lifting gave
    try:
        if content.skeleton is None or model is not None:
            replace_heads(skeleton, recipe.heads)
        for row in recipe.layers:
            put_conditional(skeleton, row)
        for shared in recipe.routers:
            route_block(skeleton, shared)
    except (AttributeError, IndexError, TypeError, RuntimeError, BlockError) as error:
        raise DamagedFileError(
            f"{path} does not fit its own source {recipe.source.name or 'model'!r}: {error}.",
            "The recipe's layers must exist in the model that its source builds.",
            "install the versions that wrote it: " + ", ".join(f"{k}=={v}" for k, v in recipe.versions.items()),
        ) from error
    _fill(skeleton, content, transients=content.skeleton is not None)
    attach_recipe(skeleton, recipe)
    skeleton.eval()  # returns None where a model's own train() does
    return skeleton


def _base_of(delta: DeltaRecord, path: Path, base: Callable[[str], Base] | None) -> Base:
    reason = "it is not loaded here"
    if base is not None:
        try:
            return base(delta.base)
        except InputError as error:
            reason = error.given
    raise InputError(
        f"{path} holds the differences from {delta.base}, which is needed: {reason}",
        f"Its weights have the SHA-256 {delta.base_sha256[:12]}...",
        f'condconv_surgery.load("{path}", base="FILE")',
    )


def _current_recipe(model: nn.Module) -> Recipe:
    recipe = recipe_of(model) or Recipe()
    if not recipe.source.name or recipe.source.name.startswith(PREFIX):  # a folder: the file names class and values
        recipe = replace(recipe, source=recognise_module(model) or transformers_source_of(model) or recipe.source)
    versions = {name: version(name) for name in ("torch", "torchvision", "condconv-surgery")}
    layers = tuple(
        ConvertedLayer(names, layer.variant, isinstance(layer, ConditionalLinear), layer.ungated_bias is not None)
        for names, layer in named_layers(model, ConditionalConv2d)
    )
    routers = tuple(shared_router_of(name, block) for name, block in routed_blocks(model).items())
    return replace(recipe, layers=layers, routers=routers, classes=classes_of(model), versions=versions)


def _description(model: nn.Module, recipe: Recipe, stored: dict[str, Tensor]) -> dict[str, str]:
    """Metadata: the skeleton of a model that its source does not rebuild, or the reason why it cannot be described.

    stored: gets the large tensors of plain attributes.
    """
    name = recipe.source.name
    folded = any(layer.ungated_bias for layer in recipe.layers)  # its norms are gone
    if name and not folded and _source_builds(model, recipe):
        return {}
    try:
        return {"skeleton": json.dumps(describe(model, stored=stored))}
    except UndescribableError as error:
        changed = f", and it is no longer what {name} builds" if _is_factory(recipe.source) and not folded else ""
        return {"undescribed": f"{error.what}{changed}"}


def _source_builds(model: nn.Module, recipe: Recipe) -> bool:
    if _is_factory(recipe.source):
        return is_as_built(model, recipe.heads)
    return same_modules(model, recipe.source, recipe.heads)


def _is_factory(source: Source) -> bool:
    return bool(source.name) and builder_for(source.name) is FACTORY


def _skeleton(content: Content, trust: tuple[str, ...]) -> nn.Module:
    path, source = content.path, content.recipe.source
    _check_widths(content)
    elements = sum(tensor.numel() for tensor in content.tensors.values())
    if content.skeleton is not None:
        try:
            model = rebuild(content.skeleton, trust, elements, content.attributes)
        except ScriptClassError as error:
            raise _of_a_script(path, error.name) from error
        return check_module(note_not_as_built(model), path)
    if not source.name or content.undescribed:
        raise InputError(
            f"{path} does not say how its model is built: {content.undescribed or 'it has no source'}.",
            "Give the unconverted model, with any weights.",
            f'condconv_surgery.load("{path}", model=MyNet())',
        )
    return build(source, trust)


def _of_a_script(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} names {name}, a class of the script or notebook that saved it.",
        "Give the unconverted model, with any weights. (A command needs its class in a module when it is converted.)",
        f'condconv_surgery.load("{path}", model={name.rpartition(".")[2]}())',
    )


def _check_widths(content: Content) -> None:
    """Raise for a recipe with more classes, experts or hidden units than any tensor has: it would only take memory."""
    recipe, layers = content.recipe, content.recipe.layers
    largest = max((side for tensor in content.tensors.values() for side in tensor.shape), default=0)
    widths = [*recipe.heads.values(), *(row.variant.experts for row in layers)]
    widths += [getattr(row.variant, "min_hidden", 0) for row in layers]
    widths += [shared.channels for shared in recipe.routers]
    widths += [width for name, width in recipe.source.options.items() if name == "num_classes" and type(width) is int]
    false = [width for width in widths if width > max(largest, UNCHECKED_WIDTH)]
    if false:
        raise damaged(content.path, f"its recipe has a width of {false[0]}, the largest of its tensors {largest}")


@torch.no_grad()
def _fill(model: nn.Module, content: Content, transients: bool) -> None:
    """Copy every tensor of the file into the model. Names and shapes must be equal; the model takes its dtypes."""
    path, tensors = content.path, content.all_tensors()
    targets = own_state(model, keep_vars=True)
    if transients:
        targets |= transient_tensors(model)
    missing, unexpected = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if missing or unexpected:
        what = f"it lacks {missing[0]!r}" if missing else f"it has {unexpected[0]!r}, which the model lacks"
        close = nearest((missing or unexpected)[0], unexpected if missing else missing, 1)
        counts = f"({len(missing)} missing, {len(unexpected)} unexpected)"
        raise damaged(path, f"{what} {counts}" + "".join(f"; nearest: {name!r}" for name in close))
    for name, tensor in tensors.items():
        target = targets[name]
        if target.shape != tensor.shape:
            raise damaged(path, f"{name!r} has shape {tuple(tensor.shape)}, the model {tuple(target.shape)}")
        if target.is_floating_point() != tensor.is_floating_point():
            raise damaged(path, f"{name!r} has dtype {tensor.dtype}, the model {target.dtype}")
        if target.dtype != tensor.dtype:
            target.data = target.data.to(tensor.dtype)
        target.copy_(tensor)
