"""``load_model``: from a name, a file or a factory to a model that carries its recipe."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from condconv_surgery.errors import InputError
from condconv_surgery.models.artifact.container import is_artifact
from condconv_surgery.models.artifact.delta import Base
from condconv_surgery.models.artifact.meta_init import build_on_meta
from condconv_surgery.models.artifact.save_load import load
from condconv_surgery.models.artifact.strict_fill import fill_foreign, modern_names
from condconv_surgery.models.build_model import build
from condconv_surgery.models.checkpoints.adapt_outer_layers import adapt
from condconv_surgery.models.checkpoints.allowlist import trusted
from condconv_surgery.models.checkpoints.computed_weights import plain_weights
from condconv_surgery.models.checkpoints.outer_layers import shapes_of
from condconv_surgery.models.checkpoints.read_checkpoint import read_named_checkpoint
from condconv_surgery.models.checkpoints.recognise_architecture import families_of, recognise, recognise_module
from condconv_surgery.models.checkpoints.recognise_body import recognise_body
from condconv_surgery.models.checkpoints.state_names import fitting_names
from condconv_surgery.models.checkpoints.tensor_kinds import require_floats, require_kinds_of
from condconv_surgery.models.factory_source import FACTORY, named, package_of, require_trusted
from condconv_surgery.models.hub_source import FOLDER, HUB
from condconv_surgery.models.layouts.layout_registry import PLAIN, Layout, layout_of
from condconv_surgery.models.source_registry import (
    LoadOptions,
    ModelSource,
    builder_for,
    input_spec_for,
    register_source,
    source_for,
    with_classes,
)
from condconv_surgery.models.torchvision_source import build_published, input_of, license_of, published_weights
from condconv_surgery.models.transformers_source import SAVED_FOLDER
from condconv_surgery.recipe import Recipe, Source, attach_recipe, recipe_of
from condconv_surgery.runtime.class_names import classes_of
from condconv_surgery.runtime.tensor_hash import hash_weights

_LOG = logging.getLogger("condconv_surgery")

SAME_TENSORS = {
    "torchvision:resnet18": "timm:resnetblur18 has the same tensors, and arch= takes them for it",
    "torchvision:resnet50": "timm:resnetaa50 and timm:resnetblur50 have the same tensors, and arch= takes them for one",
}
"""Of networks that the tensors in a file can't tell from another one: what else they may be of."""

FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".onnx", ".h5", ".pt2", ".pkl")


def load_model(
    source: str | Path,
    *,
    arch: str | None = None,
    weights: str | Path = "default",
    num_classes: int | None = None,
    input_size: int | None = None,
    trust: str | Iterable[str] = (),
) -> nn.Module:
    """The model that ``source`` names, in eval mode on the CPU, carrying its ``Recipe``.

    >>> model = load_model("torchvision:resnet18", weights="none", num_classes=10)
    >>> model.fc.out_features
    10

    source: ``torchvision:NAME``, ``timm:NAME``, ``transformers:FOLDER``, ``hf:OWNER/NAME``, ``condconv:NAME``
        (``mobilenet_v1``), ``package.module:factory``, an artifact (``save``), the folder of one or of a model of
        transformers (``save_pretrained``), a run directory (its ``best.safetensors``), a file with a state dict or a
        pickled module, or what was added by ``register_source``.
    arch: the architecture of a state dict that is not recognised, as ``torchvision:NAME``, ``timm:NAME`` or
        ``package.module:factory``.
    weights: for a name: ``"default"`` (the library's pretrained ones), ``"none"`` (random) or a file.
    num_classes: of the classifier, where it is not the library's own; the weights are then random.
    input_size: side of the square images in pixels, where it is not the library's own.
    trust: packages, ``trust=["mypackage"]``, whose classes and factories a file may name beside those of torch.nn,
        torchvision and timm. A factory that ``source`` or ``arch`` names is trusted.

    Raises ``InputError`` for a name or file that is none of these, ``DamagedFileError`` for a file that is not whole.
    """
    text = file_of_run(f"{source}")
    if not text.strip():
        raise InputError("The model's name is empty.", "It is a name or a file.", "torchvision:resnet18")
    options = LoadOptions(arch, f"{weights}", num_classes, trusted(trust))
    entry = source_for(text)
    model = entry.load(text, options)
    recipe = recipe_of(model)
    if recipe is None:
        built = with_classes(Source(text), num_classes) if entry.build is not None else Source()
        recipe = Recipe(source=built, input=entry.input_spec(model, built))
    if input_size is not None:
        recipe = replace(recipe, input=replace(recipe.input, height=input_size, width=input_size))
    if not recipe.classes:
        recipe = replace(recipe, classes=classes_of(model))
    if not recipe.weights_sha256:
        recipe = replace(recipe, weights_sha256=hash_weights(model))
    attach_recipe(model, recipe)
    return model


def file_of_run(source: str) -> str:
    """``best.safetensors`` of a run directory; anything else as it is."""
    best = Path(source) / "best.safetensors"
    return str(best) if source.strip() and best.is_file() else source


def _is_file(text: str) -> bool:
    return Path(text).exists() or text.endswith(FILE_SUFFIXES) or ("/" in text and ":" not in text)


def _require_no_classes(path: Path, options: LoadOptions) -> None:
    if options.num_classes is not None and options.arch is None:
        raise InputError(
            f"num_classes={options.num_classes} with {path}.",
            "The shape of the weights in a file gives the number of classes.",
            "leave it out: fine-tuning gives a model the classes of its images",
        )


def _load_artifact(text: str, options: LoadOptions) -> nn.Module:
    _require_no_classes(Path(text), options)
    if options.arch is not None:
        raise InputError(
            f'arch="{options.arch}" with {text}.', "An artifact names its own architecture.", "leave it out"
        )
    return load(text, trust=options.trust, base=base_of_name)


def base_of_name(name: str) -> Base:
    """The base of a delta file by the name in it. Code that it would need is not imported because of it."""
    if source_for(name) is FACTORY:
        require_trusted(Source(name), ())
    return Base(name, dict(load_model(name).state_dict()))


def _load_checkpoint(text: str, options: LoadOptions) -> nn.Module:
    """A pickled module as it is; a state dict in the model that ``arch``, the file's hash or its shapes say."""
    path = Path(text)
    _require_no_classes(path, options)
    content, stated = read_named_checkpoint(path, options.trust)
    stated = stated.partition(".")[0]  # of timm: without the tag of its weights
    if isinstance(content, nn.Module) and options.arch is None:
        content.eval()  # returns None where a model's own train() does
        source = recognise_module(content) or Source()
        attach_recipe(content, Recipe(source=source, input=input_spec_for(content, source)))
        return content
    own = modern_names(dict(content.state_dict()) if isinstance(content, nn.Module) else content)
    if options.arch is None:
        require_floats(own, text)
        own = plain_weights(own, (), text)
    state = fitting_names(own)
    arch = None if options.arch is None else with_classes(named(options.arch), options.num_classes)
    layout = layout_of(state)
    if layout is PLAIN and layout_of(own) is not PLAIN:  # its mark was a prefix of all names
        state, layout = own, layout_of(own)
    published = published_weights(path) if arch is None and layout is PLAIN else None
    if published is not None:
        model = build_published(*published, state)
        source = Source(f"torchvision:{published[0]}")
        attach_recipe(model, Recipe(source=source, input=input_of(published[1]), license=license_of(published[1])))
        return model
    source = arch or _stated(stated, layout, state, text) or _recognised(layout, state, own)
    if arch is None and source.name in SAME_TENSORS and source.name != f"torchvision:{stated}":
        _LOG.warning("%s: taken for %s; %s", text, source.name, SAME_TENSORS[source.name])
    if arch is None and "num_classes" in source.options:
        _LOG.warning("%s: %d classes, as in the file", text, source.options["num_classes"])
    plain = layout.plain_source(source)
    model = build(plain, (*options.trust, package_of(plain)))  # naming a factory is trusting its package
    heads: dict[str, int] = {}
    if layout is PLAIN:
        builder_for(plain.name).as_trained(model, plain, own, text)
        own = plain_weights(own, model.state_dict().keys(), text)
        state = fitting_names(own, model)
        if options.num_classes is None:
            state, heads = adapt(model, state, own, text)
    read = layout.read(model, state)
    require_kinds_of(model, read, text)
    try:
        fill_foreign(model, read, text, plain)
    except InputError as error:
        raise _with_better_arch(error, layout, own) from error
    writer = model if plain == source else build_on_meta(source)  # the input is that of the network in the file
    attach_recipe(model, Recipe(source=plain, input=input_spec_for(writer, source), heads=heads))
    return model


def _stated(name: str, layout: Layout, state: dict[str, Tensor], what: str) -> Source | None:
    """The timm model that a file names, where it has these tensors; several have those of ``tf_efficientnet_b0``.

    A name that torchvision has too is recognised without it.
    """
    if not name or layout is not PLAIN:
        return None
    of_timm, of_torchvision = (
        any(name in names for names in families_of(library).values()) for library in ("timm", "torchvision")
    )
    if not of_timm or of_torchvision:
        return None
    try:
        source = recognise(shapes_of(state), [name])
    except InputError:
        return None
    _LOG.warning("%s: taken for %s, which it names as arch", what, source.name)
    return source


def _recognised(layout: Layout, state: dict[str, Tensor], own: dict[str, Tensor]) -> Source:
    """The architecture of the weights; of plain ones also with another stem or head, torchvision's before timm's."""
    if layout is not PLAIN:
        return layout.recognise(state)
    try:
        return recognise(shapes_of(state), with_timm=False)
    except InputError:
        source = recognise_body(own, "torchvision", beside=False)
    if source is None:
        try:
            return recognise(shapes_of(state))
        except InputError:
            source = recognise_body(own, "torchvision") or recognise_body(own, "timm")
            if source is None:
                raise
    return source


def _with_better_arch(error: InputError, layout: Layout, own: dict[str, Tensor]) -> InputError:
    """The error for weights that do not fit the architecture given, with the one that they fit, if any."""
    if error.fix.startswith("num_classes="):
        return error
    try:
        source = _recognised(layout, fitting_names(own), own)
    except InputError as unknown:
        return InputError(error.given, f"{error.allowed} {unknown.allowed}", error.fix)
    return InputError(error.given, error.allowed, f'arch="{source.name}"')


register_source(ModelSource("checkpoint", _is_file, _load_checkpoint))
register_source(SAVED_FOLDER)
register_source(FOLDER)
register_source(HUB)
register_source(ModelSource("artifact", lambda text: _is_file(text) and is_artifact(Path(text)), _load_artifact))
