"""Ultralytics networks, built from the package's own descriptions: each head converts and computes the same."""

from __future__ import annotations

import pytest
import torch

import condconv_surgery as cs
from condconv_surgery.layers import conditional_layers

ultralytics = pytest.importorskip("ultralytics")


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n-seg", "yolo11n-cls", "yolo11n-pose"])
def test_a_network_with_each_head_converts_exactly(name: str) -> None:
    network = ultralytics.YOLO(f"{name}.yaml", verbose=False).model.float().eval()
    x = torch.rand(2, 3, 64, 64)
    conversion = cs.convert(network, cs.CondConv(experts=2), example=x)
    assert len(conditional_layers(conversion.model)) == len(conversion.plan.to_convert) > 30
    assert [skip.name for skip in conversion.plan.skipped] == ["model.0.conv"]
    assert conversion.difference is not None
    assert conversion.difference.eval.relative < 1e-6
