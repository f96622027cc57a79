"""Texts of arms."""

from __future__ import annotations

import pytest

from condconv_surgery.errors import InputError
from condconv_surgery.recipe import CondConv, ODConv, TrainingOptions, Upcycling
from condconv_surgery.recipe.study_arms import Arm, parse_arm, parse_arms
from condconv_surgery.recipe.study_options import StudyOptions, rates_around
from condconv_surgery.studies.arm_models import arm_options


def test_an_arm_has_a_variant_and_options_of_all_kinds() -> None:
    text = (
        "odconv:8,reduction=4,include=layer3.*,include=re:layer4\\.(0,1),start=softmax,spread=2,"
        "layers.router_lr=2,optimizer.lr=0.01,classifier=true"
    )
    arm = parse_arm(text)
    assert arm.variant == ODConv(8, reduction=4)
    assert arm.selection.include == ("layer3.*", "re:layer4\\.(0,1)")
    assert arm.selection.classifier
    assert arm.upcycling == Upcycling("softmax", spread=2)
    assert arm.training == {"layers": {"router_lr": 2}, "optimizer": {"lr": 0.01}}
    assert arm.name == text


def test_short_arms() -> None:
    assert parse_arm("static") == Arm("static")
    assert parse_arm("condconv") == Arm("condconv", CondConv(4))
    assert parse_arm("condconv:4,name=wide").name == "wide"
    assert parse_arm("condconv:4,diversity=0.2").upcycling == Upcycling("noise", diversity=0.2)
    assert parse_arm("condconv:4,include=a/b*").slug == "condconv-4-include-a-b"


def test_the_static_arm_is_the_baseline_and_added_where_there_is_none() -> None:
    arms = parse_arms(["condconv:4", "odconv:1"])
    assert [arm.name for arm in arms] == ["static", "condconv:4", "odconv:1"]
    study = StudyOptions(parse_arms(["condconv:4", "static,optimizer.lr=1"]))
    assert study.baseline.name == "static,optimizer.lr=1"
    assert [arm.name for arm in StudyOptions().arms] == ["static", "condconv:4", "odconv:1"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["condcon:4"], "Unknown arm 'condcon'"),
        (["condconv:four"], "has 'four' experts"),
        (["condconv:0"], "experts is 0"),
        (["condconv:4,stat=noise"], "Unknown option of the arm condconv:4,stat=noise 'stat'"),
        (["condconv:4,reduction=4"], "Unknown option"),
        (["condconv:4,seed=3"], "Unknown option"),
        (["condconv:4,start=warm"], "start is 'warm'"),
        (["condconv:4,layers.routerlr=2"], "Unknown option in .layers. 'routerlr'"),
        (["static:4"], "a static network has no :4"),
        (["static,include=layer4"], "a static network has no include="),
        (["condconv:4,augment.flip=0"], "has its own augment.flip"),
        (["condconv:4,data.batch_size=3"], "has its own data.batch_size"),
        (["condconv:4,schedule.epochs=3"], "has its own schedule.epochs"),
        (["condconv:4", "condconv:4"], "Two arms are called condconv:4"),
        (["condconv:4,name=a/b", "condconv:8,name=A-b"], "Two arms are called a/b"),
        (["static"], "only one arm"),
    ],
)
def test_wrong_arms(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_arms(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seeds": 0}, "seeds is 0"), ({"rates": 1.5}, "rates is 1.5"), ({"budget": "money"}, "budget is 'money'")],
)
def test_wrong_studies(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StudyOptions(**options)  # type: ignore[arg-type]


def test_a_static_arm_lacks_the_options_of_conditional_layers() -> None:
    shared = TrainingOptions().updated(
        {"layers": {"warm_routers": 1, "router_lr": 2.0, "freeze": ["a"]}, "schedule": {"temperature": 30.0}}
    )
    static = arm_options(parse_arm("static,optimizer.lr=0.5"), shared)
    assert (static.layers.warm_routers, static.layers.router_lr, static.schedule.temperature) == (0, 1.0, None)
    assert (static.layers.freeze, static.optimizer.lr) == (("a",), 0.5)
    converted = arm_options(parse_arm("condconv:2,layers.router_lr=3"), shared)
    assert (converted.layers.warm_routers, converted.layers.router_lr) == (1, 3.0)


def test_rates_are_around_the_middle() -> None:
    assert rates_around(0.01, 1) == [0.01]
    assert rates_around(0.01, 3) == [0.0033, 0.01, 0.03]
    assert len(rates_around(0.01, 4)) == 4
    assert 0.01 in rates_around(0.01, 4)
