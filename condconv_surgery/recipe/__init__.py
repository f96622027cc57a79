"""Every decision as a frozen dataclass, checked when made, JSON in and out. Imports no torch."""

from condconv_surgery.recipe.conversion_options import STARTS, LayerFilter, Selection, Upcycling
from condconv_surgery.recipe.model_recipe import (
    FORMAT,
    ConvertedLayer,
    InputSpec,
    Recipe,
    SharedRouter,
    Source,
    attach_recipe,
    recipe_of,
)
from condconv_surgery.recipe.name_patterns import as_argument, matches, patterns_of, require_matches
from condconv_surgery.recipe.study_arms import Arm, parse_arm
from condconv_surgery.recipe.study_record import ArmCost, ArmRecord, ScoredRun, SearchRun, StudyRecord
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.recipe.variants import (
    VARIANTS,
    CondConv,
    DynamicConv,
    ODConv,
    UnknownVariantError,
    Variant,
    make_variant,
    variant,
    variant_from_dict,
)

__all__ = [
    "FORMAT",
    "STARTS",
    "VARIANTS",
    "Arm",
    "ArmCost",
    "ArmRecord",
    "CondConv",
    "ConvertedLayer",
    "DynamicConv",
    "InputSpec",
    "LayerFilter",
    "ODConv",
    "Recipe",
    "ScoredRun",
    "SearchRun",
    "Selection",
    "SharedRouter",
    "Source",
    "StudyRecord",
    "TrainingOptions",
    "UnknownVariantError",
    "Upcycling",
    "Variant",
    "as_argument",
    "attach_recipe",
    "make_variant",
    "matches",
    "parse_arm",
    "patterns_of",
    "recipe_of",
    "require_matches",
    "variant",
    "variant_from_dict",
]
