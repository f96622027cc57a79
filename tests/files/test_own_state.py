"""A model whose own ``state_dict`` lacks, copies or renames tensors is saved, loaded and resumed with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.runtime.own_state import own_state
from condconv_surgery.training.state.run_state import model_part, restore_model
from tests.small_networks import small_net

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.conv, self.one, self.other = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.other.weight = self.one.weight  # tied
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 3)
        self.register_buffer("table", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.other(self.one(torch.relu(self.conv(self.frozen(x))))))
        return self.fc(x.mean((2, 3)) + self.table)


class LeavesOut(Net):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith("frozen.")}


class Clones(Net):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {k: v.clone() for k, v in super().state_dict(*args, **kwargs).items()}


class Renames(Net):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"net.{k}": v.clone() for k, v in super().state_dict(*args, **kwargs).items()}


class Hooked(Net):
    """As a library does that saves its adapters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.clear())


class WithExtraState(Net):
    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.zeros(2)

    def get_extra_state(self) -> Tensor:
        return self.steps


KINDS = [Net, LeavesOut, Clones, Renames, WithExtraState]


def converted(kind: type[Net]) -> nn.Module:
    torch.manual_seed(0)
    return cs.convert(kind(), cs.CondConv(experts=2), example=EXAMPLE).model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", [False, True], ids=["alone", "model="])
def test_every_tensor_is_in_the_file(kind: type[Net], code: bool, tmp_path: Path) -> None:
    model = converted(kind)
    cs.save(model, tmp_path / "m.safetensors")
    skeleton = kind() if code else None
    if skeleton is not None:
        skeleton.table.copy_(model.table)
    loaded = cs.load(tmp_path / "m.safetensors", model=skeleton, trust="tests")
    assert torch.equal(loaded(EXAMPLE), model(EXAMPLE))
    assert torch.equal(loaded.frozen.weight, model.frozen.weight)
    assert loaded.other.weight is loaded.one.weight


@pytest.mark.parametrize("kind", [*KINDS, Hooked])
def test_a_run_resumes_with_every_tensor(kind: type[Net]) -> None:
    model, fresh = kind(), kind()
    fresh.table.copy_(model.table)
    restore_model(fresh, {name.removeprefix("model."): tensor for name, tensor in model_part(model).items()})
    assert torch.equal(fresh.eval()(EXAMPLE), model.eval()(EXAMPLE))


@pytest.mark.parametrize("make", [Net, WithExtraState, small_net, lambda: nn.LSTM(3, 4)])
def test_it_is_the_state_dict_of_a_class_that_overrides_nothing(make: Any) -> None:
    model = make()
    ours, theirs = own_state(model), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], tensor) and not ours[name].requires_grad for name, tensor in theirs.items())
    assert own_state(model, keep_vars=True).items() >= dict(model.named_parameters(remove_duplicate=False)).items()


def test_what_prepares_a_module_for_its_state_runs_first() -> None:
    """As FSDP does: it replaces parameters."""
    model, new = Net(), nn.Parameter(torch.zeros(3))
    model.fc.register_state_dict_pre_hook(lambda module, prefix, keep: module.register_parameter("bias", new))
    assert torch.equal(own_state(model)["fc.bias"], new)
