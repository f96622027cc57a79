"""Find the architecture of a bare state dict: compare its names and shapes with those of the models that can be built.

Models are built on the meta device: no memory, no initialisation. Of each family one member is built first; the others
only when its top-level names match.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torchvision
from torch import nn

from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d, ConditionalLinear, plain_like
from condconv_surgery.layers.conv2d_subclasses import geometry_of
from condconv_surgery.layers.find_layers import named_layers
from condconv_surgery.layers.router_base import Router
from condconv_surgery.models.artifact.meta_init import build_on_meta
from condconv_surgery.models.artifact.skeleton import describe
from condconv_surgery.models.build_model import replace_heads
from condconv_surgery.models.condconv_source import WIDTHS
from condconv_surgery.models.transformers_source import OF_ORIGIN, PREFIX, transformers_source_of
from condconv_surgery.recipe import Source

Shapes = dict[str, tuple[int, ...]]

VARIATIONS: tuple[dict[str, Any], ...] = ({}, {"aux_logits": False}, {"aux_loss": True})
"""Options that change which tensors a torchvision model has."""


def recognise(shapes: Shapes, timm_names: list[str] | None = None, *, with_timm: bool = True) -> Source:
    """The one torchvision, else own, else timm model with these tensors; the head's shape gives the number of classes.

    timm_names: the only candidates, where the layout of the file restricts them. with_timm: building one model of each
    of its families takes seconds, once in a process.

    Raises ``InputError`` when none or several match, with the nearest.
    """
    shapes = _comparable(shapes)
    if timm_names is None:
        matches = (
            _matches(shapes, "torchvision", families_of("torchvision"))
            or _matches(shapes, "condconv", {"": list(WIDTHS)})
            or (_matches(shapes, "timm", families_of("timm")) if with_timm else [])
        )
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
        'arch="package.module:factory", a function that builds the network of the file',
    )


def recognise_module(model: nn.Module) -> Source | None:
    """The source of a model made by torchvision, timm or transformers, converted or not; ``None`` for any other.

    Equal names and shapes are not enough: the modules must be equal too, or the model rebuilt by name might have
    another activation.
    """
    named = transformers_source_of(model)
    if named is not None:
        return named if same_modules(model, named) else None
    shapes = _comparable(original_shapes(model))
    home = type(model).__module__
    config = getattr(model, "pretrained_cfg", None)
    if home.startswith("torchvision.models."):
        matches = _matches(shapes, "torchvision", {home: families_of("torchvision").get(home, [])})
    elif home.startswith("timm.") and isinstance(config, dict) and config.get("architecture"):
        matches = _matches(shapes, "timm", {home: [config["architecture"]]})
    else:
        return None
    if len(matches) > 1:
        return None
    return matches[0] if matches and same_modules(model, matches[0]) else None


def same_modules(model: nn.Module, source: Source, heads: dict[str, int] | None = None) -> bool:
    """Whether ``source`` builds this model, each conditional layer counted as the plain one that it replaced.

    heads: final layers replaced after building, as in a recipe.
    """
    try:
        twin = build_on_meta(source)
        replace_heads(twin, heads or {})
        _put_plain(twin, model)
        ours, theirs = describe(model, without_hooks=True), describe(twin, without_hooks=True)
    except (InputError, AttributeError):
        return False
    for row in (*ours, *theirs):
        for key in ("parameters", "buffers"):  # names and shapes are compared elsewhere; dtypes may differ
            del row[key]
        for key in ("pretrained_cfg", "default_cfg"):  # timm's record of the origin of the weights
            row["state"].pop(key, None)
        if source.name.startswith(PREFIX):
            row["state"] = _with_lists({key: value for key, value in row["state"].items() if key not in OF_ORIGIN})
    return ours == theirs


def _put_plain(twin: nn.Module, model: nn.Module) -> None:
    """Where ``model`` has a conditional layer, a plain one in ``twin`` in place of a subclass of the same geometry."""
    for names, layer in named_layers(model, ConditionalConv2d):
        own = twin.get_submodule(names[0])
        if isinstance(own, nn.Conv2d) and type(own) is not nn.Conv2d and geometry_of(own) == layer.geometry:
            plain = plain_like(layer)
            for name in names:
                twin.set_submodule(name, plain)


def _with_lists(value: Any) -> Any:
    """A description with lists in place of tuples: a configuration that was JSON has lists."""
    if isinstance(value, list):
        return [_with_lists(item) for item in value]
    if not isinstance(value, dict):
        return value
    return _with_lists(value["tuple"]) if value.keys() == {"tuple"} else {k: _with_lists(v) for k, v in value.items()}


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
    """Without the counters of batch norms, which older checkpoints lack."""
    return {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}


def _matches(shapes: Shapes, library: str, families: dict[str, list[str]]) -> list[Source]:
    tops = _top_names(shapes)
    matches = []
    for names in filter(None, families.values()):
        if not any(
            _same_family(_top_names(candidate), tops, library) for candidate in _variation_shapes(library, names[0])
        ):
            continue
        for name in names:
            source = _matching_source(shapes, library, name)
            if source is not None:
                matches.append(source)
    return matches


def _same_family(first: frozenset[str], tops: frozenset[str], library: str) -> bool:
    """Whether a family whose first member has the top-level names ``first`` may have a member with ``tops``.

    In torchvision a member may lack modules of another: ``raft_small`` has no ``mask_predictor``.
    """
    return first == tops or (library == "torchvision" and bool(tops) and (first > tops or first < tops))


def _matching_source(shapes: Shapes, library: str, name: str) -> Source | None:
    """The source of ``name`` with the options under which it has exactly these tensors, ``None`` when there is none."""
    for source, candidate in variations(library, name):
        if candidate.keys() != shapes.keys():
            continue
        different = [key for key in shapes if shapes[key] != candidate[key]]
        if not different:
            return source
        classes = {shapes[key][0] for key in different if shapes[key] and shapes[key][1:] == candidate[key][1:]}
        if len(classes) == 1:
            resized = replace(source, options={**source.options, "num_classes": classes.pop()})
            if _shapes_of(resized) == shapes:
                return resized
    return None


def variations(library: str, name: str) -> Iterator[tuple[Source, Shapes]]:
    """The model of that name with each of the options that change its tensors: its source and its shapes."""
    for options, shapes in zip(_allowed_variations(library, name), _variation_shapes(library, name), strict=True):
        yield Source(f"{library}:{name}", options), shapes


def families_of(library: str) -> dict[str, list[str]]:
    """Names of models of torchvision or timm, by the module that defines their builders; none without timm."""
    return _torchvision_families() if library == "torchvision" else _timm_families()


def _variation_shapes(library: str, name: str) -> Iterator[Shapes]:
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
    except Exception:  # a factory that rejects the option, or needs data to build: no match
        return {}
    return _comparable({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _top_names(shapes: Iterable[str]) -> frozenset[str]:
    """Top-level names without auxiliary heads, which only some members of a family have."""
    return frozenset(top for name in shapes if not (top := name.partition(".")[0]).lower().startswith("aux"))


@functools.cache
def _torchvision_families() -> dict[str, list[str]]:
    """Names by the module that defines their builder, without the quantised models."""
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
    """The torchvision models with the most equal tensors (name and shape), at least a tenth of them.

    Only the two families whose first member has the most common names are built.
    """
    families = families_of("torchvision").values()

    def common_names(names: list[str]) -> float:
        others = next(_variation_shapes("torchvision", names[0])).keys()
        return len(shapes.keys() & others) / max(len(shapes.keys() | others), 1)

    def equal_tensors(name: str) -> float:
        candidate = next(_variation_shapes("torchvision", name))
        same = sum(shapes.get(key) == shape for key, shape in candidate.items())
        return same / max(len(candidate), len(shapes), 1)

    closest = [names for names in sorted(families, key=common_names, reverse=True)[:2] if common_names(names) > 0]
    scores = {name: equal_tensors(name) for names in closest for name in names}
    best = sorted(scores, key=lambda name: -scores[name])[:count]
    return [f"torchvision:{name}" for name in best if scores[name] > 0.1]
