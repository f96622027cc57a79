"""A pass inside ``preserving_state`` leaves tensors as they were, those under several names too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from condconv_surgery.runtime.meta_device import META, meta_state
from condconv_surgery.runtime.snapshot import held_tensors, preserving_state


class OneNormTwoNames(nn.Module):
    """One ``BatchNorm2d`` registered twice and called at both names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(self.norm(x))
        return y


def two_norms_one_buffer() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].running_mean = model[0].running_mean
    return model


def two_views_of_one_memory() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    memory = torch.zeros(6)
    model[0].running_mean, model[1].running_mean = memory[:3], memory[3:]
    return model


class AssignsAlias(OneNormTwoNames):
    """Registers a new tensor for the buffer at one of its two names."""

    def forward(self, x: Tensor) -> Tensor:
        self.again.running_mean = self.norm.running_mean * 0.9 + x.mean((0, 2, 3))
        return super().forward(x)


MODELS = [OneNormTwoNames, two_norms_one_buffer, two_views_of_one_memory, AssignsAlias]


def state_of(model: nn.Module) -> list[tuple[str, int, int, Tensor]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(tensor), tensor.data_ptr(), tensor.detach().clone()) for name, tensor in tensors]


def assert_equal(before: list[tuple[str, int, int, Tensor]], after: list[tuple[str, int, int, Tensor]]) -> None:
    assert [row[:3] for row in before] == [row[:3] for row in after]
    for (name, _, _, values), (_, _, _, other) in zip(before, after, strict=True):
        assert torch.equal(values, other), name


@pytest.mark.parametrize("make", MODELS)
def test_aliased_buffers_come_back_unchanged(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    model(torch.randn(4, 3, 5, 5) + 1)  # statistics that are not the first ones
    before = state_of(model)
    with preserving_state(model), torch.no_grad():
        model(torch.randn(4, 3, 5, 5) + 2)
    assert_equal(before, state_of(model))


@pytest.mark.parametrize("make", MODELS)
def test_aliased_buffers_come_back_from_the_meta_device(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    before = state_of(model)
    with preserving_state(model), meta_state(model), torch.no_grad():
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert model(torch.empty(4, 3, 5, 5, device=META)).is_meta
    assert_equal(before, state_of(model))


def test_held_tensors_are_those_of_attributes_and_containers() -> None:
    model = OneNormTwoNames()
    loss = model.norm.weight.sum()
    model.losses = [{"last": loss}]
    held = held_tensors(model)
    assert any(tensor is loss for tensor in held)
    assert any(tensor is model.norm.running_mean for tensor in held)
