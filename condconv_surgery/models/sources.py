"""From a name, a file or a factory to a model that carries its recipe."""

from __future__ import annotations

import difflib
import re
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn

from condconv_surgery.errors import InputError, unknown_name
from condconv_surgery.models import artifact
from condconv_surgery.models.building import build, require_timm
from condconv_surgery.models.checkpoints import read_tensors
from condconv_surgery.models.recognition import Shapes, original_shapes, recognise
from condconv_surgery.recipe import InputSpec, Recipe, Source, attach_recipe, recipe_of
from condconv_surgery.surgery import hash_weights

FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".onnx", ".h5", ".pt2", ".pkl")


def load_model(
    spec: str,
    *,
    arch: str | None = None,
    weights: str = "default",
    num_classes: int | None = None,
    input_size: int | None = None,
    trust: tuple[str, ...] = (),
) -> nn.Module:
    """The model that ``spec`` names, in eval mode on the CPU, carrying its ``Recipe``.

    spec: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory``, an artifact, or a file with a state dict.
    arch: the architecture of a state dict that is not recognised, in any of the first three forms.
    weights: for a name: ``default`` (the library's pretrained ones), ``none`` (random) or a file.
    num_classes, input_size: of the model and its pictures, where they are not the library's own.
    trust: packages whose factories may be imported; a factory that ``spec`` or ``arch`` names is trusted.

    Raises ``InputError`` and ``DamagedFileError``, each in words.
    """
    if _looks_like_file(spec):
        model = _from_file(Path(spec), arch, num_classes, trust)
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
    if artifact.is_artifact(path):
        return artifact.load(path, trust=trust)
    state = _modern_names(read_tensors(path))
    if arch is None:
        source = recognise({name: tuple(tensor.shape) for name, tensor in state.items()})
    else:
        source = _with_classes(_named(arch), num_classes)
    model = _build_named(source, trust)
    _fill(model, state, f"{path}", source)
    attach_recipe(model, Recipe(source=source, input=_input_spec(model, source)))
    return model


def _from_name(spec: str, weights: str, num_classes: int | None) -> nn.Module:
    source = _with_classes(_named(spec), num_classes)
    model = _build_named(source, ())
    if weights not in ("none", "default"):
        _fill(model, _modern_names(read_tensors(Path(weights))), weights, source)
    elif weights == "default" and num_classes is None:
        state = _pretrained(source)
        if state is not None:
            _fill(model, state, source.name, source)
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


def _pretrained(source: Source) -> dict[str, Tensor] | None:
    """The library's own weights; ``None`` when it has none for this name, or for a user's factory."""
    library, _, name = source.name.partition(":")
    try:
        if library == "torchvision":
            enum = torchvision.models.get_model_weights(name)
            default = getattr(enum, "DEFAULT", None)
            if default is None:
                return None
            return cast("dict[str, Tensor]", default.get_state_dict(progress=False, check_hash=True, weights_only=True))
        if library == "timm":
            timm = require_timm()
            if timm.get_pretrained_cfg(name) is None or name not in timm.list_pretrained():
                return None
            return cast("dict[str, Tensor]", timm.create_model(name, pretrained=True).state_dict())
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The pretrained weights of {source.name} could not be fetched: {reason}",
            "They come from the library's server, or from a file.",
            "--weights FILE, or --weights none for random ones",
        ) from error
    return None


def _input_spec(model: nn.Module, source: Source) -> InputSpec:
    library, _, name = source.name.partition(":")
    if library == "torchvision":
        return _torchvision_input(name)
    if library == "timm":
        return _timm_input(model)
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return InputSpec(channels=stem.in_channels) if stem is not None else InputSpec()


def _torchvision_input(name: str) -> InputSpec:
    weights = getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)
    preset: Any = None if weights is None else weights.transforms()
    crop = getattr(preset, "crop_size", None)
    if not crop:  # segmentation and detection resize without cropping
        return InputSpec()
    resize = (getattr(preset, "resize_size", None) or crop)[0]
    return InputSpec(
        height=crop[0],
        width=crop[-1],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        crop_fraction=min(crop[0] / resize, 1.0),
    )


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


_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)


def _modern_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DenseNet's published files still have dots where module names may not have them any more."""
    return {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}


@torch.no_grad()
def _fill(model: nn.Module, state: dict[str, Tensor], what: str, source: Source) -> None:
    """Copy a foreign state dict, strictly but for the counters that old files lack; its dtype is kept."""
    wanted = model.state_dict(keep_vars=True)
    required: Shapes = {k: s for k, s in original_shapes(model).items() if not k.endswith("num_batches_tracked")}
    missing = [name for name in required if name not in state]
    unexpected = [name for name in state if name not in wanted]
    wrong = [name for name in state if name in wanted and state[name].shape != wanted[name].shape]
    if missing or unexpected or wrong:
        raise _misfit(what, source, missing, unexpected, [(n, state[n], wanted[n]) for n in wrong])
    for name, tensor in state.items():
        place = wanted[name]
        if place.dtype != tensor.dtype and tensor.is_floating_point():
            place.data = place.data.to(tensor.dtype)
        place.copy_(tensor)


def _misfit(
    what: str, source: Source, missing: list[str], unexpected: list[str], wrong: list[tuple[str, Tensor, Tensor]]
) -> InputError:
    if wrong:
        name, given, place = wrong[0]
        detail = f"{name!r} has shape {tuple(given.shape)}, the model {tuple(place.shape)}"
        fix = f"--num-classes {given.shape[0]}" if given.shape[1:] == place.shape[1:] and len(wrong) <= 4 else "--arch"
    elif missing:
        close = difflib.get_close_matches(missing[0], unexpected, 1)
        detail = f"it lacks {missing[0]!r}" + (f" (it has {close[0]!r})" if close else "")
        fix = "another --arch"
    else:
        detail, fix = f"it has {unexpected[0]!r}, which the model has not", "another --arch"
    return InputError(
        f"The weights in {what} do not fit {source.name}: {detail}.",
        f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape; all must fit.",
        fix,
    )
