"""Ultralytics networks, built from the package's own descriptions: each head converts, fuses and computes the same."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.errors import InputError
from condconv_surgery.layers import conditional_layers
from condconv_surgery.surgery.proof.output_tensors import output_tensors
from tests.conftest import Run

ultralytics = pytest.importorskip("ultralytics")

from ultralytics import YOLO  # noqa: E402
from ultralytics.cfg import get_cfg  # noqa: E402

from condconv_surgery.integrations.ultralytics import (  # noqa: E402
    ConditionalYOLO,
    convert_yolo,
    with_network,
    yolo_networks,
)

IMAGES = torch.rand(2, 3, 64, 64)


def outputs(network: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return torch.cat([tensor.flatten() for tensor in output_tensors(network.eval()(images))])


def used(name: str) -> Any:
    """A network with running statistics of its own, not 0 and 1."""
    torch.manual_seed(0)
    yolo = YOLO(f"{name}.yaml")
    yolo.model.train()
    with torch.no_grad():
        yolo.model(torch.rand(4, 3, 64, 64))
    yolo.model.eval()
    return yolo


def separate(network: nn.Module) -> None:
    """Different experts, and gates that do not sum to 1: what a fuser that is only right at the start gets wrong."""
    with torch.no_grad():
        for layer in conditional_layers(network).values():
            layer.weight.mul_(1 + 0.2 * torch.randn_like(layer.weight))
        for name, parameter in network.named_parameters():
            if ".router." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", ["yolov8n", "yolov10n", "yolo26n", "yolo11n-seg", "yolo11n-cls", "yolo11n-pose"])
def test_a_network_with_each_head_converts_and_fuses_exactly(name: str) -> None:
    yolo = used(name)
    converted = convert_yolo(yolo, cs.CondConv(experts=2), example=IMAGES)
    assert type(converted.model) is not type(yolo.model)
    assert isinstance(converted.model, type(yolo.model))
    torch.testing.assert_close(outputs(converted.model), outputs(yolo.model), rtol=1e-4, atol=1e-4)
    separate(converted.model)
    fused = deepcopy(converted.model)
    assert not fused.is_fused()
    fused.fuse(verbose=False)
    assert fused.is_fused()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.model.modules())
    torch.testing.assert_close(predictions(fused), predictions(converted.model), rtol=1e-4, atol=1e-3)


def predictions(network: nn.Module) -> Tensor:
    """Without what YOLOv10 and YOLO26 compute for training only, which fusing takes away."""
    with torch.no_grad():
        output = network.eval()(IMAGES)
    return output[0] if isinstance(output, (tuple, list)) else output


def test_routing_by_block_fuses_exactly() -> None:
    yolo = used("yolov8n")
    network = cs.convert(yolo.model, cs.CondConv(2, routing="block"), example=IMAGES, include=["model.[1-8].*"]).model
    converted = with_network(yolo, network)
    separate(converted.model)
    before = predictions(converted.model)
    converted.model.fuse(verbose=False)
    torch.testing.assert_close(predictions(converted.model), before, rtol=1e-4, atol=1e-3)


def test_the_integral_over_bins_stays_plain() -> None:
    plan = cs.plan(YOLO("yolo11n.yaml").model, cs.CondConv(2), example=IMAGES)
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    assert reasons["model.23.dfl.conv"].startswith("its weight is the constant 0, 1, ..., 15")
    assert any("condconv_surgery.integrations.ultralytics" in note for note in plan.notes)


def test_layers_of_blocks_that_fuse_to_one_kernel_stay_plain() -> None:
    yolo = used("yolov10n")
    network = cs.convert(yolo.model, cs.CondConv(2), example=IMAGES).model
    with pytest.raises(InputError, match=r"adds its branches up to one kernel[\s\S]*exclude="):
        with_network(yolo, network)


def test_the_artifact_of_a_conditional_network_loads(tmp_path: Path) -> None:
    """Its class is ours, and its packages are named together: each advice alone named the other one."""
    yolo = convert_yolo(used("yolov8n"), cs.CondConv(experts=2), example=IMAGES, include=["model.[1-4].*"])
    expected = outputs(yolo.model)
    cs.save(yolo.model, tmp_path / "yolo.safetensors")
    torch.testing.assert_close(outputs(ConditionalYOLO(tmp_path / "yolo.safetensors").model), expected)
    yolo.save(tmp_path / "yolo.pt")
    trust: list[str] = []
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            cs.load_model(tmp_path / "yolo.pt", trust=trust)
        trust = json.loads(caught.value.fix.partition("=")[2].partition("]")[0] + "]")
    assert sorted(trust) == ["condconv_surgery", "ultralytics"]
    loaded = cs.load_model(tmp_path / "yolo.pt", trust=trust).float()
    torch.testing.assert_close(outputs(loaded), expected, rtol=1e-2, atol=0.5)


def test_weights_that_half_precision_cannot_hold_are_named(tmp_path: Path) -> None:
    yolo = convert_yolo(used("yolov8n"), cs.CondConv(experts=2), example=IMAGES, include=["model.2.cv1.conv"])
    messages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yolo_networks.LOGGER, "warning", messages.append)
        yolo.save(tmp_path / "fine.pt")
        assert not messages
        with torch.no_grad():
            yolo.model.model[2].cv1.conv.router.linear.weight[0, 0] = 1e6
        yolo.save(tmp_path / "large.pt")
    assert "model.2.cv1.conv.router.linear.weight" in messages[0]


def test_the_example_of_a_network_in_half_precision() -> None:
    network = used("yolov8n").model.half()
    with pytest.raises(InputError, match=r"does not run[\s\S]*model\.float\(\) before"):
        cs.convert(network, cs.CondConv(experts=2), example=IMAGES)


def test_a_plain_network_is_no_conditional_yolo(tmp_path: Path) -> None:
    YOLO("yolov8n.yaml").save(tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"0 conditional layers[\s\S]*convert_yolo"):
        ConditionalYOLO(str(tmp_path / "plain.pt"))


def test_the_command_line_takes_averaged_weights(
    condconv: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    yolo = used("yolov8n")
    file, artifact = tmp_path / "yolo.pt", tmp_path / "yolo.safetensors"
    network = deepcopy(yolo.model).half()
    del network.task  # as a trainer writes it
    network.args = get_cfg(overrides={"imgsz": 64})
    torch.save({"model": None, "ema": network, "epoch": 3, "train_args": {"imgsz": 64}}, file)
    code, _, errors = condconv(
        "convert", file, "--trust", "ultralytics", "--input-size", 64, "--experts", 2, "-o", artifact
    )
    assert code == 0, errors
    assert "took the weights under 'ema' (averaged)" in errors + caplog.text
    assert "(DFL)" in errors
    loaded = ConditionalYOLO(artifact)
    torch.testing.assert_close(outputs(loaded.model), outputs(network.float()), rtol=1e-4, atol=1e-3)
    assert loaded.task == "detect"
    assert loaded.overrides["imgsz"] == 64
    loaded.save(tmp_path / "yolo.condconv.pt")
    assert len(conditional_layers(YOLO(tmp_path / "yolo.condconv.pt").model)) == 62
