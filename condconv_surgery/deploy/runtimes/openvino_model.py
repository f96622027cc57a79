"""OpenVINO, from the graph of the ONNX file."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.runtimes.onnx_file import onnx_program
from condconv_surgery.deploy.runtimes.runtime_protocol import Request, Runtime, cannot_export


class OpenVino(Runtime):
    """A model in OpenVINO's format: an .xml, and a .bin beside it. Run on its CPU plugin, in float32."""

    name, suffix, extra = "openvino", ".xml", "openvino"
    suffix_beside = ".bin"
    packages = ("openvino", "onnx", "onnxscript")
    preferred = ("kernel", "scale", "matmul", "sum", "taps", "grouped")
    loops = True

    def write(self, model: nn.Module, request: Request, path: Path) -> dict[str, int]:
        import openvino

        graph = path.with_suffix(".onnx")
        onnx_program(model, request).save(str(graph), external_data=False)
        try:
            converted = openvino.convert_model(graph)
        except Exception as error:  # what its frontend raises is no class of its own
            raise cannot_export(error, "OpenVINO", request.dynamic_size) from error
        for name, value in request.metadata.items():
            converted.set_rt_info(json.dumps(value), ["condconv", name])
        try:
            openvino.save_model(converted, path, compress_to_fp16=False)
        except RuntimeError as error:  # of its streams; it has removed what it wrote, so the disk has space again
            raise OSError(errno.ENOSPC, f"OpenVINO could not write it: {error}") from error
        graph.unlink()
        return {}

    def load(self, path: Path, threads: int | None = None) -> Callable[[Tensor], list[Tensor]]:
        import openvino

        properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        compiled = openvino.Core().compile_model(path, "CPU", properties)
        return lambda x: [torch.from_numpy(value.copy()) for value in compiled(x.numpy()).values()]
