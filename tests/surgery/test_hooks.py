"""Hooks on a layer that is converted: they move, their handles remove them, a refused conversion gives them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import condconv_surgery as cs
from condconv_surgery.errors import InputError, ProofError
from condconv_surgery.layers import conditional_layers


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def twice_output(layer: nn.Module) -> RemovableHandle:
    return layer.register_forward_hook(lambda module, inputs, output: output * 2)


def twice_output_with_keywords(layer: nn.Module) -> RemovableHandle:
    def hook(module: nn.Module, inputs: Any, keywords: Any, output: Tensor) -> Tensor:
        return output * 2

    return layer.register_forward_hook(hook, with_kwargs=True, always_call=True)


def twice_input(layer: nn.Module) -> RemovableHandle:
    return layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def twice_gradient(layer: nn.Module) -> RemovableHandle:
    return layer.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))


def twice_gradient_before(layer: nn.Module) -> RemovableHandle:
    return layer.register_full_backward_pre_hook(lambda module, out: (out[0] * 2,))


HOOKS = [twice_output, twice_output_with_keywords, twice_input, twice_gradient, twice_gradient_before]


def results(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs, and the gradient at the input."""
    given = x.clone().requires_grad_()
    y = model.eval()(given)
    return y.detach(), torch.autograd.grad(y.sum(), given)[0]


def require_equal(model: nn.Module, expected: tuple[Tensor, Tensor], x: Tensor) -> None:
    for found, wanted in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prove", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("register", HOOKS)
def test_a_handle_from_before_removes_the_hook(
    register: Callable[[nn.Module], RemovableHandle], inplace: bool, prove: bool, x: Tensor
) -> None:
    model = net()
    without = results(model, x)
    handle = register(model[1])
    with_hook = results(model, x)
    assert any(not torch.allclose(a, b) for a, b in zip(without, with_hook, strict=True))
    converted = cs.convert(model, cs.CondConv(), example=x, inplace=inplace, prove=prove).model
    assert set(conditional_layers(converted)) == {"1", "3"}
    require_equal(model, with_hook, x)
    require_equal(converted, with_hook, x)
    handle.remove()
    require_equal(model, without, x)
    require_equal(converted, without if inplace else with_hook, x)  # a copy has hooks of its own


@pytest.mark.parametrize("inplace", [False, True])
def test_a_refused_conversion_gives_hooks_back(inplace: bool, x: Tensor) -> None:
    class Notices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.alias = self.second

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) * (1.0 if type(self.alias) is nn.Conv2d else 3.0)

    model = Notices()
    without = results(model, x)
    handle = twice_output(model.second)
    with_hook = results(model, x)
    with pytest.raises(ProofError, match="differs from the original"):
        cs.convert(model, cs.CondConv(), example=x, inplace=inplace)
    require_equal(model, with_hook, x)
    handle.remove()
    require_equal(model, without, x)


def test_the_original_of_a_check_in_float64_has_its_hooks(x: Tensor) -> None:
    class Amplifies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.second(self.first(x)) * 1e4).sin()

    torch.manual_seed(0)
    model = Amplifies()
    handle = twice_output(model.second)
    conversion = cs.convert(model, cs.CondConv(experts=3), example=x, inplace=True)
    assert conversion.difference_float64.eval.relative < 1e-9
    assert len(conversion.model.second._forward_hooks) == 1
    handle.remove()
    assert not conversion.model.second._forward_hooks


STATE = {
    "before": lambda layer: layer.register_state_dict_pre_hook(lambda module, prefix, keep: None),
    "after": lambda layer: layer.register_state_dict_post_hook(lambda module, state, prefix, meta: None),
    "before loading": lambda layer: layer.register_load_state_dict_pre_hook(lambda *arguments: None),
    "after loading": lambda layer: layer.register_load_state_dict_post_hook(lambda module, keys: None),
}


@pytest.mark.parametrize("register", STATE.values(), ids=STATE)
def test_a_layer_with_hooks_on_its_state_dict_stays(register: Callable[[nn.Module], object], x: Tensor) -> None:
    model = net()
    register(model[1])
    conversion = cs.convert(model, cs.CondConv(), example=x)
    assert set(conditional_layers(conversion.model)) == {"3"}
    reason = {skip.name: skip.reason for skip in conversion.plan.skipped}["1"]
    assert reason.startswith("hooks on its state dict (register_state_dict_pre_hook and the like)")


class Keeper(nn.Module):
    """A hook keeps feature maps in a dict of the model, whose forward takes them; fx traces a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[torch.device, Tensor] = {}
        self.a = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))
        self.a[0].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        SEEN.append((type(output), str(output.device)))
        self.kept[output.device] = output

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        self.a(x)
        return self.kept.pop(x.device)


SEEN: list[tuple[type, str]] = []


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_see_real_tensors_and_nothing_of_a_pass_is_left(inplace: bool, x: Tensor) -> None:
    SEEN.clear()
    model = Keeper().eval()
    expected = model(x)
    plan = cs.plan(model, cs.CondConv(experts=4), example=x, inplace=inplace)
    assert "1 layer to convert" in str(plan)  # traced for the text
    assert model.kept == {}
    converted = plan.apply().model
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-5)
    assert set(SEEN) == {(Tensor, "cpu")}


class Reporting(nn.Module):
    """A block that gives what it computes to a method of its parent."""

    def __init__(self, report: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.report = report

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        self.report(y)
        return y


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.stem, self.block = nn.Conv2d(3, 4, 1), Reporting(self.keep)

    def keep(self, y: Tensor) -> None:
        self.kept.append(y)

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        return self.block(self.stem(x)) + self.kept[0]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_block_that_writes_to_its_parent_keeps_its_routers(inplace: bool, x: Tensor) -> None:
    model = Parent().eval()
    expected = model(x).detach()
    model.kept.clear()
    with pytest.raises(InputError, match="block writes to what its parents hold"):
        cs.convert(model, cs.CondConv(experts=4, routing="block"), example=x, inplace=inplace)
    assert model.kept == []
    torch.testing.assert_close(model(x), expected)
