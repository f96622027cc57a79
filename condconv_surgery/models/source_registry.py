"""The kinds of text that ``load_model`` accepts, one entry each: files, ``torchvision:NAME``, ``module:factory``.

To add one, say ``mine:NAME``, from any package::

    register_source(named_source("mine", build=lambda source: MyNet(**source.options)))

``build`` gets the ``Source`` that an artifact names, so ``load`` rebuilds the model from the same entry.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from condconv_surgery.errors import InputError, SurgeryError
from condconv_surgery.models.artifact.strict_fill import fill_foreign, modern_names
from condconv_surgery.models.checkpoints.adapt_outer_layers import adapt
from condconv_surgery.models.checkpoints.computed_weights import plain_weights
from condconv_surgery.models.checkpoints.read_checkpoint import read_weights
from condconv_surgery.models.checkpoints.state_names import fitting_names
from condconv_surgery.models.checkpoints.tensor_kinds import require_kinds_of
from condconv_surgery.recipe import InputSpec, Recipe, Source, attach_recipe
from condconv_surgery.runtime.modes import input_spec_of

License = Callable[[Source, nn.Module, bool], str]
"""The license of the weights of a model that was built; whether they are its library's published ones."""

AsTrained = Callable[[nn.Module, Source, Mapping[str, Tensor], str], None]
"""See ``ModelSource.as_trained``."""


def _as_built(model: nn.Module, source: Source, weights: Mapping[str, Tensor], what: str) -> None:
    """No change."""


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of ``load_model`` that a source gets; see there."""

    arch: str | None = None
    weights: str = "default"
    num_classes: int | None = None
    trust: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSource:
    """One source of models.

    matches: whether a text belongs to this source.
    load: from a text to a model in eval mode, with its ``Recipe`` attached where there is one.
    build: the unconverted model with random weights, for ``load`` of an artifact; ``None`` where an artifact cannot
        name this source (a file). Its options can come from a file that somebody else wrote.
    input_spec: the images that a built model takes.
    as_trained: change a built model, in place, to what the weights of a file were trained in, as far as these tell;
        it gets the model, its source, the weights and the file for log lines.
    """

    name: str
    matches: Callable[[str], bool]
    load: Callable[[str, LoadOptions], nn.Module]
    build: Callable[[Source], nn.Module] | None = None
    input_spec: Callable[[nn.Module, Source], InputSpec] = lambda model, source: input_spec_of(model)
    as_trained: AsTrained = _as_built


SOURCES: list[ModelSource] = []


def register_source(source: ModelSource) -> None:
    """Add a source. The one that was registered last is asked first, and replaces an earlier one of the same name."""
    SOURCES[:] = [source, *(other for other in SOURCES if other.name != source.name)]


def source_for(text: str) -> ModelSource:
    """The source that loads ``text``; the last one, a user's factory, matches every text."""
    return next(source for source in SOURCES if source.matches(text))


def builder_for(name: str) -> ModelSource:
    """The source that builds the model which a ``Source`` of this name stands for."""
    return next(source for source in SOURCES if source.build is not None and source.matches(name))


def named_source(
    prefix: str,
    build: Callable[[Source], nn.Module],
    *,
    pretrained: Callable[[str], nn.Module | None] = lambda name: None,
    input_spec: Callable[[nn.Module, Source], InputSpec] = lambda model, source: input_spec_of(model),
    as_trained: AsTrained = _as_built,
    license: License = lambda source, model, published: "",
) -> ModelSource:
    """A source of ``PREFIX:NAME``, loaded with its published weights, random ones or those of a file.

    build: the model with random weights. pretrained: from NAME to the model with its published weights, ``None`` where
    it has none. input_spec, as_trained: see ``ModelSource``. license: of weights that are not those of a file.
    """

    def load(text: str, options: LoadOptions) -> nn.Module:
        if options.arch is not None:
            allowed = "arch= names the architecture of a file of weights."
            raise InputError(f'arch="{options.arch}" with {text}.', allowed, "leave it out")
        source = with_classes(Source(text), options.num_classes)
        wanted = options.weights == "default" and options.num_classes is None
        published = _published(text, pretrained) if wanted else None
        model = checked_model(lambda: build(source), source) if published is None else published
        named = license(source, model, published is not None) if options.weights in ("none", "default") else ""
        heads: dict[str, int] = {}
        if options.weights not in ("none", "default"):
            heads = _fill_from_file(model, source, options)
        attach_recipe(model, Recipe(source=source, input=input_spec_for(model, source), heads=heads, license=named))
        return model

    return ModelSource(prefix, lambda text: text.startswith(f"{prefix}:"), load, build, input_spec, as_trained)


def _fill_from_file(model: nn.Module, source: Source, options: LoadOptions) -> dict[str, int]:
    """Copy the weights of a file into ``model``; returns the width of its head, by name, if that became another one."""
    read = modern_names(read_weights(Path(options.weights), options.trust))
    builder_for(source.name).as_trained(model, source, read, options.weights)
    own = plain_weights(read, model.state_dict().keys(), options.weights)
    state = fitting_names(own, model)
    heads: dict[str, int] = {}
    if options.num_classes is None:
        state, heads = adapt(model, state, own, options.weights)
    require_kinds_of(model, state, options.weights)
    try:
        fill_foreign(model, state, options.weights, source)
    except InputError as error:
        fix = error.fix if error.fix.startswith("num_classes=") else f'load_model("{options.weights}")'
        raise InputError(error.given, error.allowed, fix) from error
    return heads


def input_spec_for(model: nn.Module, source: Source) -> InputSpec:
    """The input of ``source``, with the channels that ``model`` takes: a file may have another stem."""
    spec, channels = builder_for(source.name).input_spec(model, source), input_spec_of(model).channels
    return replace(spec, channels=channels) if channels != spec.channels else spec


def with_classes(source: Source, num_classes: int | None) -> Source:
    """``source`` with another number of classes."""
    if num_classes is None:
        return source
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes}.", "It must be at least 1.", "num_classes=10")
    return replace(source, options={**source.options, "num_classes": num_classes})


def checked_model(make: Callable[[], object], source: Source) -> nn.Module:
    """What ``make`` returns, in eval mode. Raises ``InputError`` when it fails or returns no module."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision and timm warn of their own defaults
            model = make()
    except (OSError, SurgeryError):  # OSError: weights could not be fetched
        raise
    except Exception as error:  # options can come from a file, and each factory fails in its own way
        raise InputError(
            f"{source.name} cannot be built with {source.options}: {error}.", "Its factory raised this error."
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{source.name} returned a {type(model).__name__}.", "A factory must return an nn.Module.")
    model.eval()
    return model


def _published(text: str, pretrained: Callable[[str], nn.Module | None]) -> nn.Module | None:
    try:
        with redirect_stdout(sys.stderr):  # torch.hub prints the address of a download to stdout
            return pretrained(text.partition(":")[2])
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The pretrained weights of {text} could not be fetched: {reason}",
            "They come from the library's server, or from a file.",
            'weights="FILE", or weights="none" for random ones',
        ) from error
