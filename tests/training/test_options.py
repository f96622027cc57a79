from __future__ import annotations

import pytest

from condconv_surgery.errors import InputError
from condconv_surgery.recipe.option_rules import rules
from condconv_surgery.recipe.toml_text import from_toml, parse_setting, to_toml
from condconv_surgery.recipe.training_options import TrainingOptions
from condconv_surgery.recipe.training_sections import DataOptions, OptimizerOptions


def test_options_survive_toml() -> None:
    options = TrainingOptions().updated(
        {"model": 'a "quoted" \\ name', "data": {"image_size": 64}, "augment": {"crop": [0.5, 1]}, "seed": 3}
    )
    assert from_toml(to_toml(options)) == options


def test_every_option_is_explained_in_the_file() -> None:
    text = to_toml(TrainingOptions())
    for section in TrainingOptions().sections().values():
        for name, rule in rules(type(section)).items():
            assert any(name in line and rule.help in line for line in text.splitlines()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"batch_size": 0}}, r"data\.batch_size is 0\.\n.*at least 1\.?\n.*data\.batch_size=32"),
        ({"data": {"batch_size": 2.5}}, "whole number"),
        ({"optimizer": {"lr": float("nan")}}, r"optimizer\.lr is nan"),
        ({"optimizer": {"lr": 0}}, "above 0"),
        ({"engine": {"precision": "fp8"}}, "one of: fp32, bf16"),
        ({"augment": {"flip": "yes"}}, "must be a number"),
        ({"augment": {"crop": [0.9, 0.1]}}, "minimum and maximum"),
        ({"optimiser": {}}, r"Unknown option or section .*'optimiser'\.\n.*Nearest: optimizer"),
        ({"optimiser.lr": 0.1}, r"Unknown option or section .*'optimiser'\.\n.*Nearest: optimizer"),
        ({"seed.lr": 0.1}, r"seed is \{'lr': 0\.1\}"),
        ({"optimizer": {"learning_rate": 1}}, r"Unknown option in \[optimizer\]"),
        ({"data": 3}, "It is a section"),
        ({"mixup": 0.2}, r"'mixup'\.\n.*It is augment\.mixup\.\n.*augment\.mixup=0\.2"),
        ({"optimizer": {"mixup": 0.2}}, r"'mixup'\.\n.*It is augment\.mixup\.\n.*augment\.mixup=0\.2"),
        ({"mixupp": 0.2}, r"'mixupp'\.\n.*Nearest: augment\.mixup"),
        ({"distill": {"features": "[layer4]"}}, r"list of texts\.\n.*distill\.features=\[\"NAME\"\]"),
        ({"schedule": {"shape": "step"}}, r"shape is step and schedule.milestones is \[\](.|\n)*milestones=\[6, 8\]"),
        ({"schedule": {"milestones": [3]}}, r"shape is cosine and schedule.milestones is \[3\]"),
        (
            {"schedule": {"early_stop": 3}, "layers": {"batch_norm": "recalibrate"}},
            r"early_stop=3 with (.|\n)*last epoch(.|\n)*layers\.batch_norm=\"train\"",
        ),
    ],
)
def test_bad_values_say_what_is_allowed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingOptions().updated(changes)


def test_an_option_may_be_named_as_messages_name_it() -> None:
    """``{"optimizer.lr": 0.02}`` was answered by the advice to set ``layers.router_lr``."""
    options = TrainingOptions().updated({"optimizer.lr": 0.02, "optimizer": {"clip_norm": 2.0}, "data.workers": 0})
    assert (options.optimizer.lr, options.optimizer.clip_norm, options.data.workers) == (0.02, 2.0, 0)
    assert options == TrainingOptions.from_dict(options.to_dict())


def test_whole_numbers_are_numbers() -> None:
    assert OptimizerOptions(lr=1).lr == 1.0
    assert isinstance(OptimizerOptions(lr=1).lr, float)
    with pytest.raises(InputError, match="image_size is True"):
        DataOptions(image_size=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=0.01", ("optimizer", "lr", 0.01)),
        ("augment.crop=[0.5,1]", ("augment", "crop", [0.5, 1])),
        ("engine.precision=bf16", ("engine", "precision", "bf16")),
        ("seed=1", ("", "seed", 1)),
    ],
)
def test_settings(text: str, expected: tuple[str, str, object]) -> None:
    assert parse_setting(text) == expected


def test_bad_settings_and_files() -> None:
    with pytest.raises(InputError, match=r"SECTION\.NAME=VALUE"):
        parse_setting("lr 3")
    with pytest.raises(InputError, match="is not TOML"):
        from_toml("a = = 3", "my.toml")
