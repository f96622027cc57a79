"""LiteRT (TensorFlow Lite), by ``litert-torch``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.forms.graph_forms import CONSTANT
from condconv_surgery.deploy.runtimes.runtime_protocol import Request, Runtime, cannot_export, quietly


class LiteRt(Runtime):
    """A flatbuffer for one batch and size. XNNPACK, its CPU backend, takes constant kernels only."""

    name, suffix, extra = "litert", ".tflite", "litert"
    packages = ("litert_torch", "ai_edge_litert")
    preferred = CONSTANT
    fixed_batch = fixed_size = True

    def write(self, model: nn.Module, request: Request, path: Path) -> dict[str, int]:
        import litert_torch

        try:
            with quietly():
                litert_torch.convert(model, (request.images,)).export(str(path))
        except Exception as error:  # what its compiler raises is no class of its own
            raise cannot_export(error, "LiteRT") from error
        return {}

    def load(self, path: Path, threads: int | None = None) -> Callable[[Tensor], list[Tensor]]:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path), num_threads=threads or 1)
        interpreter.allocate_tensors()
        (given,) = interpreter.get_input_details()

        def call(x: Tensor) -> list[Tensor]:
            interpreter.set_tensor(given["index"], x.numpy())
            interpreter.invoke()
            outputs = interpreter.get_output_details()
            return [torch.from_numpy(interpreter.get_tensor(row["index"]).copy()) for row in outputs]

        return call
