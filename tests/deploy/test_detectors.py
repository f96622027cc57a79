"""torchvision's detectors as ONNX: small ones of each kind, with random weights whose scores and boxes vary."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

import condconv_surgery as cs
from condconv_surgery.deploy.detectors import lost_share
from condconv_surgery.deploy.runtimes.onnx_detector import OnnxDetector
from condconv_surgery.layers import ConditionalConv2d, routers
from condconv_surgery.recipe import CondConv, ODConv, Variant
from tests.conftest import Run
from tests.small_networks import scramble

for package in ("onnx", "onnxruntime"):
    pytest.importorskip(package)

slow = pytest.mark.slow

SIDE, WIDTH = 64, 32
SIZES: dict[str, Any] = {"min_size": SIDE, "max_size": SIDE}


def backbone() -> Any:
    """Three convolutions: [B, 3, H, W] -> [B, WIDTH, H/8, W/8]."""
    channels = (3, 8, 16, WIDTH)
    layers = [nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU()) for i, o in pairwise(channels)]
    net: Any = nn.Sequential(*layers)
    net.out_channels = WIDTH
    return net


def rcnn(build: Any, **options: Any) -> nn.Module:
    anchors = AnchorGenerator(((8, 16, 32),), ((0.5, 1.0, 2.0),))
    pool, head = MultiScaleRoIAlign(["0"], 7, 2), TwoMLPHead(WIDTH * 49, 32)
    few = {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10}
    parts = {"box_roi_pool": pool, "box_head": head, "box_predictor": FastRCNNPredictor(32, 3)}
    model: nn.Module = build(backbone(), rpn_anchor_generator=anchors, **SIZES, **few, **parts, **options)
    return model


def mask_rcnn() -> nn.Module:
    heads = {"mask_head": MaskRCNNHeads(WIDTH, (8,), 1), "mask_predictor": MaskRCNNPredictor(8, 8, 3)}
    return rcnn(MaskRCNN, mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2), **heads)


def keypoint_rcnn() -> nn.Module:
    heads = {"keypoint_head": KeypointRCNNHeads(WIDTH, (8,)), "keypoint_predictor": KeypointRCNNPredictor(8, 5)}
    return rcnn(KeypointRCNN, keypoint_roi_pool=MultiScaleRoIAlign(["0"], 14, 2), **heads)


def retinanet() -> nn.Module:
    anchors = AnchorGenerator(((8, 16, 32),), ((0.5, 1.0, 2.0),))
    return RetinaNet(backbone(), 3, anchor_generator=anchors, topk_candidates=50, **SIZES)


def fcos() -> nn.Module:
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    return FCOS(backbone(), 3, anchor_generator=anchors, topk_candidates=50, score_thresh=0.05, **SIZES)


def ssd() -> nn.Module:
    net = backbone()
    del net.out_channels  # SSD takes a list of maps, and runs the backbone to learn their channels
    return SSD(net, DefaultBoxGenerator([[2]]), (SIDE, SIDE), 3, topk_candidates=50)


DETECTORS = {
    "faster": lambda: rcnn(FasterRCNN),
    "mask": mask_rcnn,
    "keypoint": keypoint_rcnn,
    "retinanet": retinanet,
    "fcos": fcos,
    "ssd": ssd,
}


def converted(name: str, variant: Variant) -> nn.Module:
    torch.manual_seed(0)
    example = ([torch.rand(3, SIDE, SIDE)],)
    plain = DETECTORS[name]().eval()
    model = cs.convert(plain, variant, example=example, prove=False, inplace=True).model.eval()
    scramble(model)
    with_unit_outputs(model, *example)
    return model


@torch.no_grad()
def with_unit_outputs(model: nn.Module, images: list[Tensor]) -> None:
    """Outputs of every layer get the deviation 1, so that scores are neither equal nor all 1."""

    def normalise(module: Any, inputs: Any, output: Tensor) -> Tensor:
        deviation = output.std()
        module.weight.div_(deviation)
        return output / deviation

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, ConditionalConv2d)
    of_routers = {id(part) for router in routers(model).values() for part in router.modules()}
    layers = [module for module in model.modules() if isinstance(module, kinds) and id(module) not in of_routers]
    for layer in layers:
        if layer.bias is not None:
            layer.bias.zero_()
    handles = [layer.register_forward_hook(normalise) for layer in layers]
    model(images)
    for handle in handles:
        handle.remove()


def detect(path: Path, images: Tensor) -> dict[str, Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))


@pytest.mark.parametrize(
    ("name", "variant", "form"),
    [
        pytest.param("faster", CondConv(2), "auto", marks=slow),  # a part of the next
        ("mask", CondConv(2), "auto"),
        pytest.param("keypoint", CondConv(2), "auto", marks=slow),
        pytest.param("retinanet", ODConv(2), "auto", marks=slow),
        pytest.param("fcos", CondConv(2), "sum", marks=slow),
        ("ssd", ODConv(1), "auto"),
    ],
)
@torch.no_grad()
def test_a_detector_in_onnx_runtime(name: str, variant: Variant, form: str, tmp_path: Path) -> None:
    model, path = converted(name, variant), tmp_path / "m.onnx"
    result = cs.export(model, path, form=form, size=SIDE)
    assert result.forms
    assert result.shapes == ((1, 3, SIDE, SIDE),) * 3
    images = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    (expected,), actual = model(images), detect(path, images)
    assert list(actual) == list(expected), "the maps of the proof are no outputs"
    assert len(expected["boxes"]) >= 5
    assert lost_share(list(expected), list(expected.values()), list(actual.values())) == 0
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert path.stat().st_size < 1.05 * weights + 700_000, "a graph of 3,000 nodes, and the weights once"
    assert b".py" not in path.read_bytes(), "no stack traces, which have paths"


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return converted("ssd", CondConv(2))


def test_what_a_file_of_a_detector_cannot_be(detector: nn.Module, tmp_path: Path) -> None:
    """Said at once: torch traces for minutes before it fails."""
    for model, options, words in (
        (detector, {"to": "pt2"}, r'how many boxes(.|\n)*model.backbone for every runtime(.|\n)*Try: to="onnx"'),
        (detector, {"batch": 2}, r"one image(.|\n)*Try: batch=1"),
        (detector, {"dynamic_size": True}, "Try: dynamic_size=False"),
        (detector, {"form": "kernel"}, r'"kernel" is not for this runtime'),
        (detector, {"quantize": "int8", "data": "images"}, "for classifiers"),
        (nn.Sequential(detector), {}, r"holds a detector(.|\n)*Try: cs.export\(model.get_submodule\(\"0\"\)"),
    ):
        path = tmp_path / f"m.{options.get('to', 'onnx')}"
        with pytest.raises(cs.InputError, match=words):
            cs.export(model, path, size=SIDE, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_command(detector: nn.Module, condconv: Run, tmp_path: Path) -> None:
    artifact = tmp_path / "detector.safetensors"
    cs.save(detector, artifact)
    arguments = ("export", artifact, "--trust", "tests", "--input-size", f"{SIDE}")
    code, _, err = condconv(*arguments, "--to", "pt2", "-o", tmp_path / "m.pt2")
    assert code == 2, err
    assert "Try: --to onnx" in err
    code, out, err = condconv(*arguments, "--to", "onnx", "-o", tmp_path / "m.onnx", "--json")
    assert code == 0, err
    assert json.loads(out)["compared"] == [[1, 3, SIDE, SIDE]] * 3
    onnx = pytest.importorskip("onnx")
    written = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert (written["mean"], written["std"]) == ([0] * 3, [1] * 3), "the detector itself normalises"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.10 reads its archives so
def test_the_backbone(detector: nn.Module, tmp_path: Path) -> None:
    cs.save(detector, tmp_path / "detector.safetensors")
    loaded: Any = cs.load(tmp_path / "detector.safetensors")
    result = cs.export(loaded.backbone, tmp_path / "m.pt2", to="pt2", size=SIDE)
    assert result.forms
    assert result.difference < 1e-5


def test_a_file_that_is_not_the_detector(detector: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps are those of the model, every second detection is not."""
    run = OnnxDetector.run

    def with_other_labels(self: OnnxDetector, path: Path, inputs: Any) -> list[list[Tensor]]:
        found = run(self, path, inputs)
        for outputs in found if len(found[0]) == 3 else []:
            outputs[2][::2] += 1
        return found

    monkeypatch.setattr(OnnxDetector, "run", with_other_labels)
    with pytest.raises(cs.ProofError, match=r"Of the detections in an image \[1, 3, 64, 64\], [45]\d% are not"):
        cs.export(detector, tmp_path / "m.onnx", size=SIDE)
    assert list(tmp_path.iterdir()) == []


def test_detections_are_compared_as_sets() -> None:
    names = ["boxes", "scores", "labels", "masks"]
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 60, 60], [0, 0, 10, 10]])
    masks = torch.rand(3, 1, 8, 8)
    found = [boxes, torch.tensor([0.9, 0.5, 0.5]), torch.tensor([1, 2, 2]), masks]
    other = [tensor.flip(0) for tensor in found]
    assert lost_share(names, found, other) == 0
    assert lost_share(names, found, [tensor[:2] for tensor in found]) == pytest.approx(1 / 3)
    assert lost_share(names, [tensor[:2] for tensor in found], found) == pytest.approx(1 / 3)
    assert lost_share(names, found, [tensor[:0] for tensor in found]) == 1
    assert lost_share(names, [tensor[:0] for tensor in found], [tensor[:0] for tensor in found]) == 0
    for i, change in ((0, 0.1), (1, 0.01), (2, 1), (3, 0.01)):
        moved = [tensor.clone() for tensor in found]
        moved[i][1] += change
        assert lost_share(names, found, moved) == pytest.approx(1 / 3)
    assert lost_share(names, found, [boxes * float("nan"), *found[1:]]) == 1
