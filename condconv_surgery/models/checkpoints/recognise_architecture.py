"""Which architecture a bare state dict belongs to, by comparing names and shapes with what can be built.

Everything is built on the meta device: no memory, no initialisation. Families are told apart by the top-level names of
one member before any other member is built.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torchvision
from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, ConditionalLinear
from condconv_surgery.layers.router import Router
from condconv_surgery.models.artifact.meta_init import build_on_meta
from condconv_surgery.models.artifact.skeleton import describe
from condconv_surgery.models.build_model import exchange_heads
from condconv_surgery.recipe import Source

Shapes = dict[str, tuple[int, ...]]

VARIATIONS: tuple[dict[str, Any], ...] = ({}, {"aux_logits": False}, {"aux_loss": True})
"""Options that change which tensors a torchvision model has."""


def recognise(shapes: Shapes, timm_names: list[str] | None = None) -> Source:
    """The one torchvision model, else timm model, with these tensors; the number of classes is read off the head.

    timm_names: look among these alone, where what the file holds says so already.

    Raises ``InputError`` when none or several fit, with the nearest.
    """
    shapes = _comparable(shapes)
    if timm_names is None:
        matches = _matches(shapes, "torchvision", _torchvision_families()) or _matches(shapes, "timm", _timm_families())
    else:
        matches = _matches(shapes, "timm", {"": timm_names})
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(source.name for source in matches)
        raise InputError(f"The weights fit several architectures: {names}.", "Name one.", f'arch="{matches[0].name}"')
    raise InputError(
        f"The weights ({len(shapes)} tensors, first {next(iter(shapes), 'none')!r}) fit no known architecture.",
        f"Nearest: {', '.join(_nearest(shapes)) or 'none'}.",
        'arch="torchvision:NAME", "timm:NAME" or "package.module:factory"',
    )


def recognise_module(model: nn.Module) -> Source | None:
    """The source of a model made by torchvision or timm, converted or not; ``None`` for any other.

    Equal names and shapes are not enough: the modules must be the same too, or rebuilding by name would give a network
    with, say, another activation.
    """
    shapes = _comparable(original_shapes(model))
    home = type(model).__module__
    config = getattr(model, "pretrained_cfg", None)
    if home.startswith("torchvision.models."):
        matches = _matches(shapes, "torchvision", {home: _torchvision_families().get(home, [])})
    elif home.startswith("timm.") and isinstance(config, dict) and config.get("architecture"):
        matches = _matches(shapes, "timm", {home: [config["architecture"]]})
    else:
        return None
    if len(matches) > 1:
        return None
    return matches[0] if matches and same_modules(model, matches[0]) else None


def same_modules(model: nn.Module, source: Source, heads: dict[str, int] | None = None) -> bool:
    """The model is what ``source`` builds, its conditional layers taken as the plain ones that they replaced.

    heads: final layers exchanged after building, as in a recipe.
    """
    try:
        twin = build_on_meta(source)
        exchange_heads(twin, heads or {})
        ours, theirs = describe(model, without_hooks=True), describe(twin, without_hooks=True)
    except (InputError, AttributeError):
        return False
    for row in (*ours, *theirs):
        for key in ("parameters", "buffers"):  # compared already; dtypes may differ
            del row[key]
        for key in ("pretrained_cfg", "default_cfg"):  # timm's notes on where weights come from
            row["state"].pop(key, None)
    return ours == theirs


def original_shapes(model: nn.Module) -> Shapes:
    """The shapes of the state that the model had before conversion."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(layer, Router):
            shapes = {key: shape for key, shape in shapes.items() if not key.startswith(prefix)}
        if not isinstance(layer, ConditionalConv2d):
            continue
        weight = layer.geometry.weight_shape
        shapes[f"{prefix}weight"] = weight[:2] if isinstance(layer, ConditionalLinear) else weight
        if layer.bias is not None:
            shapes[f"{prefix}bias"] = weight[:1]
    return shapes


def _comparable(shapes: Shapes) -> Shapes:
    """Without the counters that older checkpoints lack."""
    return {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}


def _matches(shapes: Shapes, library: str, families: dict[str, list[str]]) -> list[Source]:
    tops = _tops(shapes)
    matches = []
    for names in filter(None, families.values()):
        if not any(_akin(_tops(candidate), tops, library) for candidate in _variations(library, names[0])):
            continue
        for name in names:
            source = _fits(shapes, library, name)
            if source is not None:
                matches.append(source)
    return matches


def _akin(first: frozenset[str], tops: frozenset[str], library: str) -> bool:
    """The family of a model with the top-level names ``first`` may have one with ``tops``.

    In torchvision a member may have less than another: ``raft_small`` has no ``mask_predictor``.
    """
    return first == tops or (library == "torchvision" and bool(tops) and (first > tops or first < tops))


def _fits(shapes: Shapes, library: str, name: str) -> Source | None:
    """The source with the options under which ``name`` has exactly these tensors."""
    for options, candidate in zip(_allowed_variations(library, name), _variations(library, name), strict=True):
        if candidate.keys() != shapes.keys():
            continue
        different = [key for key in shapes if shapes[key] != candidate[key]]
        if not different:
            return Source(f"{library}:{name}", options)
        classes = {shapes[key][0] for key in different if shapes[key] and shapes[key][1:] == candidate[key][1:]}
        if len(classes) == 1:
            resized = Source(f"{library}:{name}", {**options, "num_classes": classes.pop()})
            if _shapes_of(resized) == shapes:
                return resized
    return None


def _variations(library: str, name: str) -> Iterator[Shapes]:
    for options in _allowed_variations(library, name):
        yield _cached_shapes(library, name, tuple(options.items()))


def _allowed_variations(library: str, name: str) -> list[dict[str, Any]]:
    if library != "torchvision":
        return [{}]
    builder = torchvision.models.get_model_builder(name)
    taken = set(inspect.signature(builder).parameters)
    if name in ("googlenet", "inception_v3"):
        taken.add("aux_logits")
    return [options for options in VARIATIONS if set(options) <= taken]


@functools.lru_cache(maxsize=2048)
def _cached_shapes(library: str, name: str, options: tuple[tuple[str, Any], ...]) -> Shapes:
    return _shapes_of(Source(f"{library}:{name}", dict(options)))


def _shapes_of(source: Source) -> Shapes:
    try:
        model = build_on_meta(source)
    except Exception:  # a factory that does not take the option, or cannot be built without data: it does not fit
        return {}
    return _comparable({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _tops(shapes: Iterable[str]) -> frozenset[str]:
    """Top-level names; auxiliary heads come and go within a family."""
    return frozenset(top for name in shapes if not (top := name.partition(".")[0]).lower().startswith("aux"))


@functools.cache
def _torchvision_families() -> dict[str, list[str]]:
    """Names by the module of the class they build, float models only."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in torchvision.models.list_models():
        if not name.startswith("quantized_"):
            families[torchvision.models.get_model_builder(name).__module__].append(name)
    return dict(families)


@functools.cache
def _timm_families() -> dict[str, list[str]]:
    try:
        import timm
    except ImportError:
        return {}
    families: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        entry = timm.model_entrypoint(name)
        families[entry.__module__].append(name)
    return dict(families)


def _nearest(shapes: Shapes, count: int = 3) -> list[str]:
    """The torchvision models that share most tensors (name and shape) with ``shapes``; nothing under a tenth.

    Only the families with most top-level names in common are built whole.
    """
    families = _torchvision_families().values()
    tops = _tops(shapes)

    def kinship(names: list[str]) -> float:
        others = _tops(next(_variations("torchvision", names[0])))
        return len(tops & others) / max(len(tops | others), 1)

    def likeness(name: str) -> float:
        candidate = next(_variations("torchvision", name))
        same = sum(shapes.get(key) == shape for key, shape in candidate.items())
        return same / max(len(candidate), len(shapes), 1)

    closest = [names for names in sorted(families, key=kinship, reverse=True)[:2] if kinship(names) > 0]
    scores = {name: likeness(name) for names in closest for name in names}
    best = sorted(scores, key=lambda name: -scores[name])[:count]
    return [f"torchvision:{name}" for name in best if scores[name] > 0.1]
