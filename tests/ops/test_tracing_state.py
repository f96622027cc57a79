"""Where torch lacks a private function, a call counts as intercepted and a module as hooked: the ordinary path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from condconv_surgery.ops.tracing_state import is_exporting, is_intercepted, linear_parts, norm_parts

PRIVATE = [
    (torch._C, "_get_tracing_state"),
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C, "_len_torch_function_stack"),
    (torch._C, "_are_functorch_transforms_active"),
    (forward_ad, "_current_level"),
]


def test_a_plain_call_is_not_intercepted() -> None:
    assert not is_intercepted()
    assert linear_parts(nn.Linear(2, 3)) is not None
    assert norm_parts(nn.BatchNorm1d(3).eval()) is not None


@pytest.mark.parametrize(("owner", "name"), PRIVATE, ids=lambda value: value if isinstance(value, str) else "")
def test_a_torch_without_a_private_function_takes_the_ordinary_path(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(owner, name)
    assert is_intercepted()


class SaysExporting(nn.Module):
    """Zeros, or ones while it is exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x) if is_exporting() else torch.zeros_like(x)


@pytest.mark.parametrize("strict", [False, True])
def test_compiling_is_not_exporting(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2)
    assert not torch.compile(SaysExporting(), backend="eager", fullgraph=True)(x).any()
    assert torch.export.export(SaysExporting(), (x,), strict=strict).module()(x).all()
    assert not is_exporting()
    monkeypatch.delattr(torch.compiler, "_is_exporting_flag")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert is_exporting()


@pytest.mark.parametrize("missing", ["_get_function_stack_at", "DeviceContext"])
def test_a_torch_that_cannot_name_its_modes(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("cpu"):
        assert not is_intercepted()  # it changes only calls that make tensors
        monkeypatch.delattr(torch._C if missing.startswith("_") else torch.utils._device, missing)
        assert is_intercepted()


def test_a_torch_without_global_hooks_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, norm = nn.Linear(2, 3), nn.BatchNorm1d(3).eval()
    monkeypatch.delattr(nn.modules.module, "_has_any_global_hook")
    assert linear_parts(linear) is None
    assert norm_parts(norm) is None
