"""Train a network of 546 parameters on digits until it gains no more: the start of the demo's comparison.

python examples/digits.py digits --parts
python examples/trained_out.py digits examples/trained_out.safetensors     # some minutes
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import condconv_surgery as cs

OPTIONS = {
    "schedule": {"epochs": 400},
    "optimizer": {"lr": 4e-3, "label_smoothing": 0.0},
    "data": {"image_size": 16, "batch_size": 64, "workers": 0},
    "engine": {"save_every": 10**6},
}


def network(classes: int = 10) -> nn.Sequential:
    """Depthwise-separable, five convolutions."""

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*conv(3, 4, 3, 2), *conv(4, 4, 3, 1, 4), *conv(4, 8, 1), *conv(8, 8, 3, 2, 8), *conv(8, 12, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train and val")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = network()
    with tempfile.TemporaryDirectory() as folder:
        result = cs.finetune(model, OPTIONS, data=given.data, output=Path(folder) / "run")
    cs.save(model, given.output)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, top-1 {result.top1:.4f} on validation images")


if __name__ == "__main__":
    main()
