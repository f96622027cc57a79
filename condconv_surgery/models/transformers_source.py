"""``transformers:FOLDER``: vision models of Hugging Face, from a folder of ``save_pretrained`` or from its cache.

Nothing is downloaded, unpickled or run that is not part of the package transformers itself. An artifact names the class
of the model and holds its configuration: ``Source("transformers:ResNetForImageClassification", {"config": {...}})``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from condconv_surgery.errors import InputError, listed, one_line, unknown_name
from condconv_surgery.models.image_processor import input_of_processor
from condconv_surgery.models.source_registry import LoadOptions, ModelSource, named_source
from condconv_surgery.recipe import InputSpec, Source
from condconv_surgery.runtime.modes import input_spec_of

PREFIX = "transformers:"

OF_ORIGIN = ("config", "name_or_path", "_weight_conversions", "_use_kernels")
"""Attributes of a model that say how it was made: its twin is built from the same configuration."""

_NOT_OF_THE_MODEL = frozenset(
    ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map", "quantization_config")
)
"""Keys of a configuration that say where it came from, or name code to fetch."""


def require_transformers() -> Any:
    """The package transformers, or an error that says how to install it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            "transformers is not installed.",
            "transformers: models need the extra.",
            'pip install "condconv-surgery[transformers]"',
        ) from error


def transformers_source_of(model: nn.Module) -> Source | None:
    """The class and the present configuration of a model of transformers; ``None`` for any other."""
    config: Any = getattr(model, "config", None)
    if not type(model).__module__.startswith("transformers.models.") or not hasattr(config, "to_json_string"):
        return None
    values = json.loads(config.to_json_string(use_diff=False))
    return Source(f"{PREFIX}{type(model).__name__}", {"config": _of_the_model(values)})


def name_labels(model: nn.Module, classes: Sequence[str]) -> None:
    """Write the classes into the configuration of a model of transformers, in place; any other is left alone."""
    if transformers_source_of(model) is not None and hasattr(model, "num_labels"):
        config: Any = model.config
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
        model.num_labels = len(classes)  # type: ignore[assignment]


def is_saved_folder(text: str) -> bool:
    """A folder that ``save_pretrained`` of transformers wrote."""
    try:
        return "architectures" in json.loads((Path(text) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _of_the_model(value: Any) -> Any:
    """A configuration without the keys that are not the model's, nested ones too."""
    if isinstance(value, list):
        return [_of_the_model(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {
        key: _of_the_model(item)
        for key, item in value.items()
        if key not in _NOT_OF_THE_MODEL and not key.strip("_").startswith(("attn_implementation", "experts_implement"))
    }
    return {**kept, "use_pretrained_backbone": False} if "use_pretrained_backbone" in kept else kept


def _build(source: Source) -> nn.Module:
    """The model with random weights: of a class with its configuration, as artifacts name it, or of a folder."""
    name = source.name.removeprefix(PREFIX)
    if "config" in source.options or _is_class(name):
        cls = _class_of(name)
        values = _of_the_model(source.options.get("config", {}))
        config = cls.config_class.from_dict(values)
    else:
        cls, config = _class_and_config(name)
    if "num_classes" in source.options:
        config.num_labels = source.options["num_classes"]
    for part in _parts(config):
        if hasattr(part, "use_pretrained_backbone"):
            part.use_pretrained_backbone = False
    with _offline():
        try:
            model: nn.Module = cls(config)
        except Exception as error:  # a configuration can come from a file, and each class fails in its own way
            raise InputError(
                f"{source.name} cannot be built from its configuration: {one_line(error)}",
                "A configuration of this class is needed, as save_pretrained writes it.",
                "the version of transformers that wrote it",
            ) from error
    return model


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, require_transformers().PreTrainedConfig):
            yield from _parts(value)


def _is_class(name: str) -> bool:
    return name.isidentifier() and not Path(name).is_dir() and hasattr(require_transformers(), name)


def _class_of(name: str) -> Any:
    """The class of models of transformers of that name. Raises ``InputError`` for anything else in the package."""
    transformers = require_transformers()
    cls: Any = getattr(transformers, name, None) if name.isidentifier() else None
    if not (
        isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and getattr(cls, "config_class", None)
    ):
        known = [known for known in dir(transformers) if known.endswith(("ForImageClassification", "Backbone"))]
        raise unknown_name("class of transformers", name, known, f"{PREFIX}FOLDER, one of save_pretrained")
    return cls


def _class_and_config(name: str) -> tuple[Any, Any]:
    """Of a folder, or a model in the cache. Raises ``InputError`` where there is none, or it names no known class."""
    transformers = require_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:  # ValueError: a kind of model that needs code of its own
        raise InputError(
            f"{PREFIX}{name} cannot be read: {one_line(error)}",
            "It is a folder of save_pretrained, or a model that was downloaded before; nothing is downloaded here.",
            f"hf download {name}, or the path of a folder with config.json",
        ) from error
    if not config.architectures:
        raise InputError(
            f"{PREFIX}{name} does not say of which class its model is.",
            "config.json names it under architectures, as save_pretrained writes it.",
            "model.save_pretrained(FOLDER) with the model itself",
        )
    return _class_of(config.architectures[0]), config


def _pretrained(name: str) -> nn.Module | None:
    """The model of a folder or of the cache, with its weights."""
    if _is_class(name):
        return None  # it has no weights
    cls, config = _class_and_config(name)
    with _offline():
        try:
            model, loaded = cls.from_pretrained(
                name,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"{PREFIX}{name} has no weights that can be read: {one_line(error)}",
                "They are in model.safetensors, or its shards. Pickled weights (.bin) are not read.",
                "model.save_pretrained(FOLDER) with a newer transformers, which writes safetensors",
            ) from error
    _require_all(name, loaded)
    loaded_model: nn.Module = model
    loaded_model.eval()
    return loaded_model


def _require_all(name: str, loaded: dict[str, Any]) -> None:
    """Raise ``InputError`` when tensors are missing, or those of a converted network are there."""
    unexpected, mismatched = sorted(loaded["unexpected_keys"]), sorted(str(row[0]) for row in loaded["mismatched_keys"])
    missing = sorted(key for key in loaded["missing_keys"] if not key.endswith("num_batches_tracked"))
    if any(".router." in key for key in unexpected):
        raise InputError(
            f"{PREFIX}{name} holds the weights of a converted network, which its config.json does not describe.",
            "save_pretrained keeps tensors and configuration, not the recipe of the conversion.",
            'condconv_surgery.save(model, "FILE") where it was trained; or convert the original again in the same way, '
            f'then .model.load_state_dict(safetensors.torch.load_file("{name}/model.safetensors"))',
        )
    if missing or mismatched:
        raise InputError(
            f"The weights of {PREFIX}{name} are not all there: {listed(missing or mismatched)}.",
            f"{len(missing)} missing, {len(mismatched)} of another shape; all must fit.",
            'weights="none" for random ones',
        )


@contextmanager
def _offline() -> Iterator[None]:
    """Inside the block, huggingface_hub answers every request with an error: a configuration can name a backbone."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _input_spec(model: nn.Module, source: Source) -> InputSpec:
    return input_of_processor(source.name.removeprefix(PREFIX), input_spec_of(model))


TRANSFORMERS = named_source("transformers", _build, pretrained=_pretrained, input_spec=_input_spec)


def _load_folder(text: str, options: LoadOptions) -> nn.Module:
    return TRANSFORMERS.load(f"{PREFIX}{text}", options)


SAVED_FOLDER = ModelSource("folder of transformers", is_saved_folder, _load_folder)
"""A folder of ``save_pretrained`` without the prefix."""
