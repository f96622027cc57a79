"""The recipe in an artifact: where the model came from and how it was converted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from condconv_surgery.errors import DamagedFileError, InputError
from condconv_surgery.recipe.variants import UnknownVariantError, Variant, variant_from_dict

FORMAT = 1
"""Version of the recipe's JSON. Reading a larger one raises."""


@dataclass(frozen=True)
class Source:
    """How to build the unconverted skeleton.

    name: ``torchvision:resnet18``, ``timm:resnet18``, ``package.module:factory``, or ``""`` when only the user knows.
    options: keyword arguments of the factory (``num_classes``, ``aux_logits``, ...).
    """

    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputSpec:
    """The image that a model takes: channels; height and width in pixels; mean and std of values in [0, 1].

    For a grey image, three values of ``mean`` and ``std`` are replaced by their average.
    """

    channels: int = 3
    height: int = 224
    width: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    crop_fraction: float = 0.875

    def __post_init__(self) -> None:
        if min(self.channels, self.height, self.width) < 1:
            raise InputError(
                f"The input is {self.channels}x{self.height}x{self.width}.",
                "Every side must be at least 1.",
                "input_size=224",
            )
        if self.channels == 1:
            for name in ("mean", "std"):
                values = getattr(self, name)
                object.__setattr__(self, name, (sum(values) / len(values),))


@dataclass(frozen=True)
class ConvertedLayer:
    """One converted layer: every name it has in the module tree, and its variant.

    linear: it replaced an ``nn.Linear``. ungated_bias: it has one (``cs.fold``).
    """

    names: tuple[str, ...]
    variant: Variant
    linear: bool = False
    ungated_bias: bool = False


@dataclass(frozen=True)
class SharedRouter:
    """One router for several layers.

    block: the module that holds it, by its first name. channels: of the block's input, which it sees.
    layers: the first names of the layers inside the block that it routes for.
    """

    block: str
    channels: int
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.block or self.channels < 1 or not all(name.startswith(f"{self.block}.") for name in self.layers):
            raise InputError(
                f"A router of the block {self.block!r} with {self.channels} channels, for {', '.join(self.layers)}.",
                "A block inside the model routes for layers inside itself, from at least 1 channel.",
            )


@dataclass(frozen=True)
class Recipe:
    """Everything needed to rebuild a model around its tensors.

    routers: those that serve several layers of a block.
    heads: output widths of final layers that were replaced after building the source, by layer name.
    classes: class names, in the order of the logits; empty when unknown.
    weights_sha256: hash of the original weights (see ``runtime.tensor_hash.hash_weights``).
    license: of the original weights, where a library published them with one; empty when unknown.
    versions: of the libraries that wrote it.
    """

    source: Source = field(default_factory=Source)
    input: InputSpec = field(default_factory=InputSpec)
    layers: tuple[ConvertedLayer, ...] = ()
    routers: tuple[SharedRouter, ...] = ()
    heads: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    weights_sha256: str = ""
    license: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["format"] = FORMAT
        data["layers"] = [
            {
                "names": list(layer.names),
                "variant": layer.variant.to_dict(),
                "linear": layer.linear,
                "ungated_bias": layer.ungated_bias,
            }
            for layer in self.layers
        ]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], trust: tuple[str, ...] = ()) -> Recipe:
        """The inverse of ``to_dict``. trust: see ``variant_from_dict``. Raises ``DamagedFileError`` otherwise."""
        try:
            version = data["format"]
            if not isinstance(version, int) or version > FORMAT:
                raise DamagedFileError(
                    f"The recipe has format {version!r}.",
                    f"This version of condconv-surgery reads formats up to {FORMAT}.",
                    "pip install --upgrade condconv-surgery",
                )
            return cls(
                source=Source(str(data["source"]["name"]), dict(data["source"]["options"])),
                input=InputSpec(
                    **{**data["input"], "mean": tuple(data["input"]["mean"]), "std": tuple(data["input"]["std"])}
                ),
                layers=tuple(
                    ConvertedLayer(
                        tuple(row["names"]),
                        variant_from_dict(row["variant"], trust),
                        bool(row["linear"]),
                        bool(row.get("ungated_bias", False)),  # younger than the format
                    )
                    for row in data["layers"]
                ),
                routers=tuple(
                    SharedRouter(str(row["block"]), int(row["channels"]), tuple(row["layers"]))
                    for row in data.get("routers", [])  # younger than the format
                ),
                heads={str(name): int(width) for name, width in data["heads"].items()},
                classes=tuple(str(name) for name in data["classes"]),
                weights_sha256=str(data["weights_sha256"]),
                license=str(data.get("license", "")),  # younger than the format
                versions={str(k): str(v) for k, v in data["versions"].items()},
            )
        except UnknownVariantError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedFileError(
                f"The recipe cannot be read: {type(error).__name__}: {error}.",
                "A recipe is the JSON that save writes.",
                "convert the original model again",
            ) from error


_ATTRIBUTE = "condconv_recipe"


def attach_recipe(model: object, recipe: Recipe) -> None:
    """Store ``recipe`` on ``model`` as a plain attribute, which is copied and pickled with it."""
    setattr(model, _ATTRIBUTE, recipe)


def recipe_of(model: object) -> Recipe | None:
    """The recipe stored on ``model``, if any."""
    recipe = getattr(model, _ATTRIBUTE, None)
    return recipe if isinstance(recipe, Recipe) else None
