"""``torch.export``: a program that runs in torch without this package."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from condconv_surgery.deploy.runtimes.runtime_protocol import Request, Runtime, cannot_export, quietly
from condconv_surgery.errors import ProofError, SurgeryError

RUN = """
import sys
sys.modules["condconv_surgery"] = None  # an import of it fails
import torch
from safetensors.torch import load_file, save_file
try:
    import torchvision  # registers its operators
except ImportError:
    pass
program, inputs, outputs = sys.argv[1:]
module = torch.export.load(program).module()
results = {}
for name, images in load_file(inputs).items():
    leaves = torch.utils._pytree.tree_leaves(module(images))
    results.update({f"{name} {i}": leaf.detach().clone().contiguous() for i, leaf in enumerate(leaves)})
save_file(results, outputs)
"""


class Pt2(Runtime):
    """An exported program, with its metadata in the extra file ``metadata.json``."""

    name, suffix, extra = "pt2", ".pt2", "onnx"
    packages = ()
    preferred = ("scale", "kernel", "matmul", "sum", "taps", "grouped")

    def write(self, model: nn.Module, request: Request, path: Path) -> dict[str, int]:
        try:
            with quietly():
                shapes = request.dynamic_shapes()
                program = torch.export.export(model, (request.images,), dynamic_shapes=shapes, strict=False)
                _strip(program.graph_module)
                # torch's own file writer ends the process when a disk is full
                written = io.BytesIO()
                torch.export.save(program, written, extra_files={"metadata.json": json.dumps(request.metadata)})
        except Exception as error:  # whatever torch.export raises for a user's forward
            raise cannot_export(error, "torch.export", request.dynamic_size) from error
        path.write_bytes(written.getbuffer())
        return {}

    def load(self, path: Path, threads: int | None = None) -> Callable[[Tensor], list[Tensor]]:
        """In this process. ``run``, by which files are proven, starts one without this package."""
        module = torch.export.load(path).module()

        @torch.no_grad()
        def call(x: Tensor) -> list[Tensor]:
            return torch.utils._pytree.tree_leaves(module(x))

        return call

    def run(self, path: Path, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """In a fresh process in which this package cannot be imported."""
        with tempfile.TemporaryDirectory() as folder:
            given, got = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
            save_file({f"{i:04d}": x.contiguous() for i, x in enumerate(inputs)}, given)
            command = [sys.executable, "-W", "ignore", "-c", RUN, str(path), str(given), str(got)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                if lines and "Guard failed" in lines[-1]:  # torch's own: the forward decides by the size
                    raise ProofError(
                        f"The exported program does not take every size: {lines[-1]}",
                        "One graph computes the same operators for all images. Nothing was written.",
                        "dynamic_size=False",
                    )
                raise SurgeryError(
                    f"The exported program does not run in a process of its own: {lines[-1] if lines else ''}",
                    "It must not need this package.",
                    'form="matmul" or form="sum"',
                )
            outputs = load_file(got)
        names = sorted(outputs, key=lambda name: tuple(map(int, name.split())))
        return [[outputs[name] for name in names if int(name.split()[0]) == i] for i in range(len(inputs))]


def _strip(graphs: torch.fx.GraphModule) -> None:
    """Remove the stack trace of each node: paths of this machine, half as large as a small network."""
    for graph in graphs.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
