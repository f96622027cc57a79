"""Optimizers made before an in-place conversion, frozen weights, and layers inside adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import ConditionalConv2d

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).relu())
        return y


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def held(optimizer: torch.optim.Optimizer) -> list[set[int]]:
    return [{id(parameter) for parameter in group["params"]} for group in optimizer.param_groups]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("routing", ["layer", "block"])
def test_an_optimizer_that_is_handed_over_trains_experts_and_routers(routing: str) -> None:
    net = make_net()
    decayed = [p for p in net.parameters() if p.dim() > 1]
    groups = [{"params": decayed, "lr": 0.1}, {"params": [p for p in net.parameters() if p.dim() == 1], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
    train(net, optimizer)
    kept = net[0].weight
    momentum = optimizer.state[kept]["momentum_buffer"]
    variant = cs.CondConv(2, routing=routing)
    conversion = cs.convert(net, variant, example=X, inplace=True, optimizers=[optimizer])
    assert conversion.plan.notes == ()
    first, second = held(optimizer)
    assert first | second == {id(parameter) for parameter in net.parameters()}
    assert len(first) + len(second) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert second == {id(net[0].bias), id(net[1].a.bias), id(net[4].bias)}
    assert id(net[1].b.weight) in first
    assert set(optimizer.state) <= set(net.parameters())
    assert optimizer.state[kept]["momentum_buffer"] is momentum
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    train(net, optimizer)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


def test_named_parameters_keep_names_in_the_optimizer() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.1)
    cs.convert(net, cs.CondConv(2), example=X, inplace=True, optimizers=optimizer)
    (group,) = optimizer.param_groups
    parameters = dict(net.named_parameters())
    assert sorted(group["param_names"]) == sorted(parameters)
    assert all(parameters[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))


def test_the_next_step_is_that_of_an_optimizer_made_afterwards() -> None:
    one, other = make_net(), make_net()
    before = torch.optim.Adam(one.parameters(), lr=0.1)
    cs.convert(one, cs.CondConv(2), example=X, inplace=True, optimizers=[before])
    cs.convert(other, cs.CondConv(2), example=X, inplace=True)
    for model, optimizer in ((one, before), (other, torch.optim.Adam(other.parameters(), lr=0.1))):
        for _ in range(2):
            train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_an_optimizer_that_is_not_handed_over_is_noted() -> None:
    net = make_net()
    optimizer = torch.optim.Adadelta(net.parameters())
    conversion = cs.convert(net, cs.CondConv(2), example=X, inplace=True)
    (note,) = conversion.plan.notes
    assert note.startswith("an optimizer (Adadelta) holds weights that were replaced")
    assert held(optimizer)[0] != {id(parameter) for parameter in net.parameters()}
    other = make_net()
    optimizer = torch.optim.Adadelta(other.parameters())
    assert cs.convert(other, cs.CondConv(2), example=X).plan.notes == ()  # a copy was converted
    head = torch.optim.Adadelta(other[4].parameters())  # holds nothing that is replaced
    assert cs.convert(other, cs.CondConv(2), example=X, inplace=True, optimizers=[optimizer]).plan.notes == ()
    assert held(head) == [{id(parameter) for parameter in other[4].parameters()}]


def test_a_failed_conversion_leaves_the_optimizer_as_it_was() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = held(optimizer)
    with pytest.raises(cs.ProofError):
        cs.convert(net, cs.CondConv(2), example=X, inplace=True, optimizers=[optimizer], tolerance=0.0, start="noise")
    assert held(optimizer) == before == [{id(parameter) for parameter in net.parameters()}]


def test_optimizers_need_a_conversion_in_place() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"optimizers= without inplace=True(.|\n)*Try: inplace=True"):
        cs.convert(net, cs.CondConv(2), example=X, optimizers=[optimizer])
    with pytest.raises(InputError, match=r"optimizers= holds a list(.|\n)*Try: optimizers=\[optimizer\]"):
        cs.convert(net, cs.CondConv(2), example=X, inplace=True, optimizers=[[optimizer]])


def test_frozen_layers_are_noted_and_stay_frozen() -> None:
    net = make_net()
    net[1].requires_grad_(False)
    conversion = cs.convert(net, cs.ODConv(4), example=X)
    (note,) = conversion.plan.notes
    assert note.startswith("2 of 2 layers to convert are frozen (requires_grad=False), so their 8 experts and routers")
    assert not any(parameter.requires_grad for parameter in conversion.model[1].parameters())
    assert conversion.model[0].weight.requires_grad
    net[1].b.requires_grad_(True)
    (note,) = cs.plan(net, cs.CondConv(4), example=X).notes
    assert note.startswith("1 of 2 layers to convert are frozen (requires_grad=False), so their 4 experts")


def test_no_file_keeps_what_is_frozen_and_a_note_says_so(tmp_path: Path) -> None:
    net = make_net()
    net[0].requires_grad_(False)
    conversion = cs.convert(net, cs.CondConv(2), example=X)
    assert conversion.plan.notes == (
        f"{len(list(net[0].parameters()))} of {len(list(net.parameters()))} parameters are frozen; "
        "a file does not keep requires_grad: freeze them again after load",
    )
    cs.save(conversion.model, tmp_path / "m.safetensors")
    assert all(parameter.requires_grad for parameter in cs.load(tmp_path / "m.safetensors", trust="tests").parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_noted(value: float) -> None:
    net = make_net()
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = value
    conversion = cs.convert(net, cs.CondConv(2), example=X)
    first, *others = conversion.plan.notes
    assert first == "NaN or infinite values, which stay in the converted model, are in 0.weight"
    assert "of the original's outputs in eval mode are NaN or infinite: no proof of these" in others[0]
    assert cs.plan(net, cs.CondConv(2), example=X).notes == (first,)


def test_outputs_that_are_not_finite_are_noted() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    net[1].running_var.fill_(-1)
    (note,) = cs.convert(net, cs.CondConv(2), example=X).plan.notes
    assert note == "100% of the original's outputs in eval mode are NaN or infinite: no proof of these"


class BaseTunerLayer:
    """Stands for PEFT's class of that name."""


BaseTunerLayer.__module__ = "peft.tuners.tuners_utils"


class Lora(nn.Module, BaseTunerLayer):
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(base.in_channels, 2, 1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(2, base.out_channels, 1, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return y


@pytest.mark.parametrize("inplace", [True, False])
def test_hooks_on_weights_are_noted(inplace: bool) -> None:
    net = make_net()
    net[1].a.weight.register_hook(lambda grad: 2 * grad)
    net[1].b.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    (note,) = cs.convert(net, cs.CondConv(4), example=X, inplace=inplace).plan.notes
    assert note.startswith("hooks on the weight of 1.a, 1.b are not on its experts")


def test_layers_inside_an_adapter_are_skipped() -> None:
    net = make_net()
    net[1].b = Lora(net[1].b)
    conversion = cs.convert(net, cs.CondConv(2), example=X)
    assert [site.name for site in conversion.plan.to_convert] == ["1.a"]
    skipped = {skip.name: skip.reason for skip in conversion.plan.skipped}
    inside = {"1.b.base_layer", "1.b.lora_A.default", "1.b.lora_B.default"}
    assert {name for name, reason in skipped.items() if reason.startswith("inside a PEFT adapter (Lora)")} == inside
    assert not any(isinstance(module, ConditionalConv2d) for module in conversion.model[1].b.modules())
    with pytest.raises(InputError, match=r"inside a PEFT adapter(.|\n)*Try: model = model\.merge_and_unload\(\)"):
        cs.plan(net, cs.CondConv(2), example=X, include=["1.b.*"])
