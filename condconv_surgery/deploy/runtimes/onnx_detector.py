"""ONNX for torchvision's detectors, through torch's exporter by ``torch.jit.trace``.

``torch.export`` cannot trace their choice of boxes. torchvision's own code supports this exporter: "exportable to ONNX
for a fixed batch size with inputs images of fixed size".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.detectors import MAX_LOST, DetectorGraph, lost_share
from condconv_surgery.deploy.file_proof import FileProof, largest_gap
from condconv_surgery.deploy.runtimes.onnx_file import OPSET, Onnx
from condconv_surgery.deploy.runtimes.runtime_protocol import Request, cannot_export, quietly
from condconv_surgery.errors import ProofError


class OnnxDetector(Onnx):
    """A graph for one image, values 0 to 1, of one size. Its outputs have the names of the detections' tensors."""

    preferred = ("scale", "matmul", "sum", "taps")  # heads over regions have batches of their own
    fixed_batch = fixed_size = True

    def write(self, model: nn.Module, request: Request, path: Path) -> dict[str, int]:
        import onnx

        graph = DetectorGraph(model).eval()
        try:
            with quietly(), torch.no_grad():
                outputs = graph(request.images)
                maps = [f"map_{i}" for i in range(len(outputs) - len(graph.names))]
                torch.onnx.export(
                    graph,
                    (request.images,),
                    str(path),
                    dynamo=False,
                    opset_version=OPSET,
                    input_names=["images"],
                    output_names=[*graph.names, *maps],
                )
        except Exception as error:  # whatever an exporter raises
            raise cannot_export(error, "ONNX") from error
        written = onnx.load(path)
        onnx.helper.set_model_props(written, {name: json.dumps(value) for name, value in request.metadata.items()})
        onnx.save(written, path)
        return {"opset": OPSET, "ir": int(written.ir_version)}

    @torch.no_grad()
    def prove(self, model: nn.Module, path: Path, inputs: Sequence[Tensor]) -> FileProof:
        """The difference of the maps, which are outputs up to here; the detections are compared as sets."""
        graph = DetectorGraph(model)
        expected = [graph(x) for x in inputs]
        count = len(graph.names)
        maps = [outputs[count:] for outputs in self.run(path, inputs)]
        proof = FileProof(largest_gap(maps, [outputs[count:] for outputs in expected]))
        if not proof.holds:
            return proof
        _remove_outputs(path, count)
        for x, outputs, actual in zip(inputs, expected, self.run(path, inputs), strict=True):
            lost = lost_share(graph.names, outputs[:count], actual)
            if lost > MAX_LOST:
                raise ProofError(
                    f"Of the detections in an image {list(x.shape)}, {lost:.0%} are not those of the model.",
                    f"At most {MAX_LOST:.0%} may differ, by ties. Nothing was written.",
                    "another size=, or the backbone alone, model.backbone",
                )
        return proof


def _remove_outputs(path: Path, keep: int) -> None:
    """Leave the first ``keep`` outputs of the graph in the file."""
    import onnx

    written = onnx.load(path)
    del written.graph.output[keep:]
    onnx.save(written, path)
