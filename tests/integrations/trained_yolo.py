"""A small Ultralytics network, trained for seconds on eight generated images, so that its mAP is not 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from shapes_data import write_shapes  # noqa: E402

SIDE = 96
STEPS = 80
SMALL = {"imgsz": SIDE, "batch": 8, "workers": 0, "plots": False, "verbose": False, "exist_ok": True, "device": "cpu"}
"""Options of ``train`` and ``val``."""


def train_detector(folder: Path) -> tuple[Path, Path]:
    """The checkpoint of a plain YOLOv8 at an eighth of its width, and the ``data=`` on which it was trained."""
    from ultralytics import YOLO
    from ultralytics.cfg import get_cfg

    data = write_shapes(folder / "shapes", side=SIDE)
    torch.manual_seed(0)
    yolo = YOLO(description_of("yolov8n", folder / "yolov8n.yaml"))
    arguments = yolo.model.args
    yolo.model.args = get_cfg(overrides=dict(arguments))
    _overfit(yolo.model, _batch(folder / "shapes"))
    yolo.model.args, yolo.model.criterion = arguments, None
    yolo.model.names = {0: "square", 1: "disc"}
    yolo.save(folder / "plain.pt")
    return folder / "plain.pt", data


def description_of(name: str, file: Path, classes: int = 2) -> Path:
    """The description of a network of the package, at an eighth of its width, as a file."""
    from ultralytics.nn.tasks import yaml_model_load
    from ultralytics.utils import YAML

    YAML.save(file, {**yaml_model_load(f"{name}.yaml"), "nc": classes, "scales": {"n": [0.33, 0.125, 1024]}})
    return file


def _batch(folder: Path) -> dict[str, torch.Tensor]:
    images = [np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]
    rows = [[float(v) for v in path.read_text().split()] for path in sorted((folder / "labels").glob("*.txt"))]
    labels = torch.tensor(rows)  # [N, 5]: class, centre and size of the one box of each image
    return {
        "img": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255,
        "cls": labels[:, :1],
        "bboxes": labels[:, 1:],
        "batch_idx": torch.arange(len(images)).float(),
    }


def _overfit(network: Any, batch: dict[str, torch.Tensor]) -> None:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.1  # few steps: running statistics follow faster than with Ultralytics' 0.03
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    network.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        network.loss(batch)[0].sum().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
    for norm in norms:
        norm.momentum = 0.03
    network.eval()
