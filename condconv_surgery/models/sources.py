"""From a name, a file or a factory to a model that carries its recipe."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torchvision
from torch import Tensor, nn

from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.models.artifact import save_load as artifact
from condconv_surgery.models.artifact.meta_init import build_hollow
from condconv_surgery.models.artifact.strict_fill import fill_foreign, modern_names
from condconv_surgery.models.build_model import build, put_conditional, require_timm
from condconv_surgery.models.checkpoints.allowlist import trusted
from condconv_surgery.models.checkpoints.read_checkpoint import read_checkpoint, read_tensors
from condconv_surgery.models.checkpoints.recognise_architecture import recognise, recognise_module
from condconv_surgery.models.layouts.odconv_layout import (
    from_odconv_layout,
    is_odconv_layout,
    odconv_layers,
    without_attention,
)
from condconv_surgery.models.layouts.timm_layout import (
    condconv_names,
    from_timm_layout,
    is_timm_layout,
    plain_counterpart,
    put_routed_blocks,
)
from condconv_surgery.models.published_weights import build_published, default_weights, input_of, published_weights
from condconv_surgery.recipe import InputSpec, Recipe, Source, attach_recipe, recipe_of
from condconv_surgery.runtime.tensor_hash import hash_weights

FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".onnx", ".h5", ".pt2", ".pkl")


def load_model(
    spec: str,
    *,
    arch: str | None = None,
    weights: str = "default",
    num_classes: int | None = None,
    input_size: int | None = None,
    trust: str | tuple[str, ...] = (),
) -> nn.Module:
    """The model that ``spec`` names, in eval mode on the CPU, carrying its ``Recipe``.

    spec: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``, an artifact, or a file with a state dict.
    arch: the architecture of a state dict that is not recognised, in any of the first three forms.
    weights: for a name: ``default`` (the library's pretrained ones), ``none`` (random) or a file.
    num_classes, input_size: of the model and its pictures, where they are not the library's own.
    trust: packages that a file may name as the home of factories and classes; a factory that ``spec`` or ``arch`` names
        is trusted.

    Raises ``InputError`` and ``DamagedFileError``, each in words.
    """
    if not spec.strip():
        raise InputError("No model was named: the text is empty.", "MODEL is a name or a file.", "torchvision:resnet18")
    if _looks_like_file(spec):
        model = _from_file(Path(spec), arch, num_classes, trusted(trust))
    else:
        if arch is not None:
            raise InputError(f"--arch {arch} with {spec}.", "--arch says what a file of weights is.", "leave it out")
        model = _from_name(spec, weights, num_classes)
    recipe = recipe_of(model) or Recipe()
    if input_size is not None:
        recipe = replace(recipe, input=replace(recipe.input, height=input_size, width=input_size))
    if not recipe.weights_sha256:
        recipe = replace(recipe, weights_sha256=hash_weights(model))
    attach_recipe(model, recipe)
    return model


def _looks_like_file(spec: str) -> bool:
    return Path(spec).exists() or spec.endswith(FILE_SUFFIXES) or ("/" in spec and ":" not in spec)


def _from_file(path: Path, arch: str | None, num_classes: int | None, trust: tuple[str, ...]) -> nn.Module:
    if num_classes is not None and arch is None:
        raise InputError(
            f"--num-classes {num_classes} with {path}.",
            "The weights in a file say themselves how many classes they tell apart.",
            "leave it out: condconv finetune gives a model the classes of its pictures",
        )
    if artifact.is_artifact(path):
        if arch is not None:
            raise InputError(f"--arch {arch} with {path}.", "What condconv wrote says what it is.", "leave it out")
        return artifact.load(path, trust=trust)
    content = read_checkpoint(path, trust)
    if isinstance(content, nn.Module) and arch is None:
        return _with_recipe(content.eval(), recognise_module(content) or Source())
    state = modern_names(dict(content.state_dict()) if isinstance(content, nn.Module) else content)
    named = None if arch is None else _with_classes(_named(arch), num_classes)
    if is_timm_layout(state):
        return _from_timm_layout(state, f"{path}", named, trust)
    known = published_weights(path) if named is None else None
    if known is not None:
        model = build_published(*known, state)
        attach_recipe(model, Recipe(source=Source(f"torchvision:{known[0]}"), input=input_of(known[1])))
        return model
    source = named or recognise(_shapes(without_attention(state)))
    model = _build_named(source, trust)
    if is_odconv_layout(state):
        state = _as_ours(model, state, path)
    fill_foreign(model, state, f"{path}", source)
    return _with_recipe(model, source)


def _from_timm_layout(state: dict[str, Tensor], path: str, named: Source | None, trust: tuple[str, ...]) -> nn.Module:
    """The plain network with our layers where the file has timm's CondConv, filled."""
    source = named or recognise(_shapes(state), timm_names=condconv_names())
    plain = plain_counterpart(source)
    model = _build_named(plain, trust)
    put_routed_blocks(model, state)
    fill_foreign(model, from_timm_layout(model, state), path, plain)
    attach_recipe(model, Recipe(source=plain, input=_input_spec(build_hollow(source), source)))
    return model


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _as_ours(model: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Put our layers where the file has ODConv's, and its tensors under our names."""
    try:
        for row in odconv_layers(state):
            put_conditional(model, row)
    except AttributeError as error:
        raise InputError(
            f"{path} has ODConv layers that the model has not: {error}.", "All must fit.", "another --arch"
        ) from error
    return from_odconv_layout(model, state)


def _from_name(spec: str, weights: str, num_classes: int | None) -> nn.Module:
    source = _with_classes(_named(spec), num_classes)
    pretrained = weights == "default" and num_classes is None
    model = _pretrained(source) if pretrained else _build_named(source, ())
    if weights not in ("none", "default"):
        fill_foreign(model, modern_names(read_tensors(Path(weights))), weights, source)
    return _with_recipe(model, source)


def _with_recipe(model: nn.Module, source: Source) -> nn.Module:
    attach_recipe(model, Recipe(source=source, input=_input_spec(model, source)))
    return model


def _named(spec: str) -> Source:
    """A source by its name; a bare ``resnet18`` or a typo is answered with the nearest."""
    library, colon, name = spec.partition(":")
    if colon and library and name:
        return Source(spec)
    known = torchvision.models.list_models()
    if spec in known:
        raise InputError(f"{spec!r} does not say whose.", "A name has its library before it.", f"torchvision:{spec}")
    raise unknown_name(
        "model", spec, known, "torchvision:NAME, timm:NAME, a file (.pt, .safetensors) or package.module:factory"
    )


def _build_named(source: Source, trust: tuple[str, ...]) -> nn.Module:
    """Build what the user named: naming a factory is trusting its package."""
    return build(source, (*trust, source.name.partition(":")[0].partition(".")[0]))


def _with_classes(source: Source, num_classes: int | None) -> Source:
    if num_classes is None:
        return source
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}.", "It must be at least 1.", "--num-classes 10")
    return replace(source, options={**source.options, "num_classes": num_classes})


def _pretrained(source: Source) -> nn.Module:
    """The model with the library's own weights; random ones when it has none, and from a user's factory as they are."""
    library, _, name = source.name.partition(":")
    try:
        with redirect_stdout(sys.stderr):  # what is being fetched is no result
            if library == "torchvision" and name in torchvision.models.list_models():
                weights = default_weights(name)
                if weights is not None:
                    return build_published(name, weights)
            if library == "timm" and name in require_timm().list_pretrained():
                model: nn.Module = require_timm().create_model(name, pretrained=True)
                return model.eval()
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The pretrained weights of {source.name} could not be fetched: {reason}",
            "They come from the library's server, or from a file.",
            "--weights FILE, or --weights none for random ones",
        ) from error
    return _build_named(source, ())


def _input_spec(model: nn.Module, source: Source) -> InputSpec:
    library, _, name = source.name.partition(":")
    if library == "torchvision":
        return input_of(default_weights(name))
    if library == "timm":
        return _timm_input(model)
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return InputSpec(channels=stem.in_channels) if stem is not None else InputSpec()


def _timm_input(model: nn.Module) -> InputSpec:
    config = require_timm().data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    return InputSpec(
        channels,
        height,
        width,
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"],
        config["crop_pct"],
    )
