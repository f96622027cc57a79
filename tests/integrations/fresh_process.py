"""What every trainer's test asks: a step moves the experts, and the file alone gives the same outputs elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import condconv_surgery as cs
from condconv_surgery.layers import conditional_layers
from condconv_surgery.runtime.model_call import arguments_of, call
from condconv_surgery.surgery.proof.output_tensors import output_tensors

ROOT = Path(__file__).parents[2]

LOAD = """
import sys, torch
import condconv_surgery as cs
from condconv_surgery.runtime.model_call import arguments_of, call
from condconv_surgery.surgery.proof.output_tensors import output_tensors
folder, *trust = sys.argv[1:]
model = cs.load(folder + "/model.safetensors", trust=tuple(trust))
example = torch.load(folder + "/example.pt")
with torch.no_grad():
    torch.save(output_tensors(call(model, arguments_of(model, example))), folder + "/outputs.pt")
"""


def train(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], steps: int = 2) -> None:
    """Steps of SGD; the experts of most layers move. (Where a block ends in a scale of zero, not at the first step.)"""
    layers = conditional_layers(model)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    require_moved(before, model)


def require_moved(before: dict[str, Tensor], model: nn.Module) -> None:
    """The experts of most layers differ from ``before``, and are finite."""
    layers = conditional_layers(model)
    assert layers.keys() == before.keys()
    moved = [not torch.equal(layer.weight, before[name]) for name, layer in layers.items()]
    assert sum(moved) > 0.7 * len(moved) > 0
    assert all(bool(layer.weight.isfinite().all()) for layer in layers.values())


def require_equal_elsewhere(model: nn.Module, example: Any, folder: Path, trust: tuple[str, ...] = ()) -> None:
    """``save``; a process that knows nothing but the file and the packages of ``trust`` computes the same, bit by bit.

    example: as for ``convert``; tensors in containers.
    """
    model.eval()
    cs.save(model, folder / "model.safetensors")
    torch.save(example, folder / "example.pt")
    with torch.no_grad():
        expected = output_tensors(call(model, arguments_of(model, example)))
    assert any(tensor.numel() for tensor in expected)
    assert all(bool(tensor.isfinite().all()) for tensor in expected)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}"}
    command = [sys.executable, "-W", "ignore", "-c", LOAD, f"{folder}", *trust]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs = torch.load(folder / "outputs.pt")
    assert len(outputs) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
