"""ONNX, through torch's own exporter, and ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.runtimes.onnx_scan import convolve_in_a_scan, loop_over_images
from condconv_surgery.deploy.runtimes.runtime_protocol import Request, Runtime, cannot_export, quietly
from condconv_surgery.ops.implementations.loop import OPERATOR as LOOP

OPSET = 18
"""Of the file. ONNX Runtime since 1.14 reads it."""


class Onnx(Runtime):
    """A graph for ONNX Runtime. Its input is ``images``."""

    name, suffix, extra = "onnx", ".onnx", "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    preferred: ClassVar[tuple[str, ...]] = ("scale", "kernel", "loop", "matmul", "sum", "taps", "grouped")
    loops = True

    def write(self, model: nn.Module, request: Request, path: Path) -> dict[str, int]:
        program = onnx_program(model, request)
        program.save(str(path), external_data=False)
        return {"opset": OPSET, "ir": int(program.model.ir_version)}

    def load(self, path: Path, threads: int | None = None) -> Callable[[Tensor], list[Tensor]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of initialisers that its own optimiser leaves unused
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: [torch.from_numpy(value) for value in session.run(None, {name: x.numpy()})]


def onnx_program(model: nn.Module, request: Request) -> Any:
    """A ``torch.onnx.ONNXProgram`` without traces of this machine. Raises ``SurgeryError`` where torch cannot."""
    try:
        with quietly():
            program = torch.onnx.export(
                model,
                (request.images,),
                dynamo=True,
                dynamic_shapes=request.dynamic_shapes(),
                input_names=["images"],
                opset_version=OPSET,
                custom_translation_table={LOOP: convolve_in_a_scan},
                verbose=False,
            )
    except Exception as error:  # whatever torch.export raises for a user's forward
        raise cannot_export(error, "ONNX", request.dynamic_size) from error
    assert program is not None
    _strip(program.model.graph)
    if request.in_a_loop:
        loop_over_images(program.model)
    program.model.metadata_props.update({name: json.dumps(value) for name, value in request.metadata.items()})
    return program


def _strip(graph: Any) -> None:
    """Remove what torch notes of each node: stack traces with paths of this machine, as large as a small network.

    Also what the exporter's own optimiser left without a use.
    """
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for name, value in list(graph.initializers.items()):
        value.metadata_props.clear()
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    for value in graph.inputs:
        value.metadata_props.clear()
