"""Subclasses of nn.Conv2d that are converted at the user's word: what is matched, what is checked, what stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError, ProofError
from condconv_surgery.layers import conditional_layers, plain_like
from condconv_surgery.recipe import Selection
from tests.conftest import Run


class Renamed(nn.Conv2d):
    """A forward of its own that computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Transposes(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(2, 3))


class OnlyInTraining(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 0.5 if self.training else y


class Pair(nn.Conv2d):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + skip)


class Masked(Renamed):
    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.register_buffer("mask", torch.ones(1))


class Scaled(Renamed):
    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.scale = nn.Parameter(torch.ones(1))


class Normed(Renamed):
    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.norm = nn.Identity()


class Tagged(Renamed):
    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.eps = 1e-5


class WithoutNorm(Renamed):
    """As in detectron2, whose convolutions may have a norm and an activation."""

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.norm = None


def net(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU(), nn.Conv2d(4, 4, 1))


def claims(cls: type[nn.Module]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def factory() -> nn.Sequential:
    torch.manual_seed(0)
    return net(Renamed(4, 4, 3))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cls", [Renamed, WithoutNorm])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_class_that_computes_the_same_is_converted(cls: type[nn.Conv2d], inplace: bool, x: Tensor) -> None:
    torch.manual_seed(0)
    model = net(cls(4, 4, 3)).eval()
    layer, before = model[1], model(x)
    conversion = cs.convert(model, cs.CondConv(), example=x, subclasses=[claims(cls)], inplace=inplace)
    assert set(conditional_layers(conversion.model)) == {"1", "3"}
    assert conversion.difference.eval.relative < 1e-5
    assert not any("not checked" in note for note in conversion.plan.notes)
    assert not layer._forward_hooks
    torch.testing.assert_close(conversion.model.eval()(x), before)
    assert type(plain_like(conversion.model[1])) is nn.Conv2d


def test_one_name_is_one_class_as_one_pattern_is_one_pattern(x: Tensor) -> None:
    assert Selection(subclasses=claims(Renamed)).subclasses == (claims(Renamed),)  # type: ignore[arg-type]
    plan = cs.convert(net(Renamed(4, 4, 3)), cs.CondConv(), example=x, subclasses=claims(Renamed)).plan
    assert [site.name for site in plan.to_convert] == ["1", "3"]


def test_the_reason_to_skip_ends_in_what_to_type(x: Tensor) -> None:
    plan = cs.convert(net(Renamed(4, 4, 3)), cs.CondConv(), example=x).plan
    reason = {skip.name: skip.reason for skip in plan.skipped}["1"]
    assert reason == (
        f"{claims(Renamed)} does not compute a plain convolution, as far as is known; "
        f'if it does: subclasses=["{claims(Renamed)}"]'
    )


WRONG = {
    "twice as much": (Doubled(4, 4, 3), "the outputs differ by"),
    "transposed": (Transposes(4, 4, (3, 1)), "the outputs differ by"),
    "in training alone": (OnlyInTraining(4, 4, 3), "the outputs differ by"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("layer", "how"), WRONG.values(), ids=WRONG)
def test_a_class_that_computes_something_else_is_refused(layer: nn.Conv2d, how: str, inplace: bool, x: Tensor) -> None:
    model, cls = net(layer), claims(type(layer))
    with pytest.raises(ProofError) as caught:
        cs.convert(model, cs.CondConv(), example=x, subclasses=[cls], inplace=inplace, tolerance=1e9)
    assert f"1 is a {cls}, which does not compute what nn.Conv2d computes" in str(caught.value)
    assert caught.match(how)
    assert caught.value.fix == f'leave subclasses=["{cls}"] out'
    assert model[1] is layer
    assert not layer._forward_hooks
    assert not conditional_layers(model)


def test_a_call_with_more_arguments_is_no_convolution(x: Tensor) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pair = nn.Conv2d(3, 4, 3), Pair(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.pair(y, skip=y)

    with pytest.raises(ProofError, match=r"pair is a .*Pair, which does not compute .*: that fails \(ValueError"):
        cs.convert(Calls(), cs.CondConv(), example=x, subclasses=[claims(Pair)])


@pytest.mark.parametrize(
    ("cls", "held"), [(Masked, "mask"), (Scaled, "scale"), (Normed, "norm"), (Tagged, "eps")], ids=lambda v: str(v)
)
def test_a_layer_that_holds_more_stays(cls: type[nn.Conv2d], held: str, x: Tensor) -> None:
    plan = cs.convert(net(cls(4, 4, 3)), cs.CondConv(), example=x, subclasses=[claims(cls)]).plan
    reason = {skip.name: skip.reason for skip in plan.skipped}["1"]
    assert reason == f"it holds more than weight and bias, which would be lost: {held}"


def test_a_plain_layer_with_a_buffer_of_the_users_stays(x: Tensor) -> None:
    model = net(nn.Conv2d(4, 4, 3))
    model[1].register_buffer("mask", torch.ones(1))
    plan = cs.convert(model, cs.CondConv(), example=x).plan
    assert "which would be lost: mask" in {skip.name: skip.reason for skip in plan.skipped}["1"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "tests.surgery.test_assumed_subclasses.Renames",
            rf'is the class of no convolution[\s\S]*subclasses=\["{claims(Renamed)}"\]',
        ),
        ("Renamed", r'"Renamed"\] is not the name of a class[\s\S]*package.module.Class'),
        ("a..b", "is not the name of a class"),
    ],
)
def test_a_name_that_is_no_class_of_the_model(name: str, words: str, x: Tensor) -> None:
    with pytest.raises(InputError, match=words):
        cs.convert(net(Renamed(4, 4, 3)), cs.CondConv(), example=x, subclasses=[name])


def test_without_a_proof_the_plan_says_that_nobody_checked(x: Tensor) -> None:
    note = f"not checked: that {claims(Doubled)} computes what nn.Conv2d computes (1)"
    converted = cs.convert(net(Doubled(4, 4, 3)), cs.CondConv(), example=x, subclasses=[claims(Doubled)], prove=False)
    planned = cs.plan(net(Doubled(4, 4, 3)), cs.CondConv(), example=x, subclasses=claims(Doubled))
    assert note in converted.plan.notes
    assert note in planned.notes


def test_the_command_line_takes_the_name_and_reads_the_file_again(condconv: Run, tmp_path: Path) -> None:
    model, path = "tests.surgery.test_assumed_subclasses:factory", tmp_path / "m.safetensors"
    options = (model, "--input-size", 16, "--subclass", claims(Renamed), "--json")
    code, out, err = condconv("convert", *options, "--dry-run")
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["to_convert"]] == ["1", "3"]
    code, out, err = condconv("convert", *options, "-o", path)
    assert code == 0, err
    assert json.loads(out)["converted"] == 2
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(cs.load(path, trust=("tests",)).eval()(x), factory().eval()(x), rtol=1e-4, atol=1e-5)
    code, _, err = condconv(
        "convert", *options, "--subclass", "tests.surgery.test_assumed_subclasses.Rename", "-o", path
    )
    assert code == 2
    assert claims(Renamed) in err
