"""ncnn, by ``pnnx``."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from condconv_surgery.deploy.forms.graph_forms import CONSTANT
from condconv_surgery.deploy.runtimes.runtime_protocol import Request, Runtime, cannot_export, quietly
from condconv_surgery.errors import SurgeryError


class Ncnn(Runtime):
    """A .param, and a .bin beside it, in float32, for one image of one size. ncnn has no batch."""

    name, suffix, extra = "ncnn", ".param", "ncnn"
    suffix_beside = ".bin"
    packages = ("ncnn", "pnnx")
    preferred = CONSTANT
    fixed_batch = fixed_size = True

    def write(self, model: nn.Module, request: Request, path: Path) -> dict[str, int]:
        import pnnx

        if len(request.images) != 1:
            raise SurgeryError("ncnn computes one image at a time.", "Its tensors have no batch.", "batch=1")
        with tempfile.TemporaryDirectory() as folder:
            traced = Path(folder, "model.pt")
            try:
                with quietly():
                    torch.jit.trace(model, request.images, check_trace=False).save(str(traced))  # type: ignore[no-untyped-call]
            except Exception as error:  # whatever a user's forward raises
                raise cannot_export(error, "torch.jit.trace") from error
            shape = ",".join(map(str, request.images.shape))
            files = [f"ncnnparam={path}", f"ncnnbin={path.with_suffix('.bin')}"]
            command = [pnnx.EXEC_PATH, str(traced), f"inputshape=[{shape}]", "fp16=0", *files]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode or not path.exists():
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise cannot_export(RuntimeError(lines[-1] if lines else f"exit code {done.returncode}"), "pnnx")
        return {}

    def load(self, path: Path, threads: int | None = None) -> Callable[[Tensor], list[Tensor]]:
        import ncnn

        net = ncnn.Net()
        if threads is not None:
            net.opt.num_threads = threads
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = False
        net.load_param(str(path))
        net.load_model(str(path.with_suffix(".bin")))
        names = sorted(net.output_names())

        def call(x: Tensor) -> list[Tensor]:
            extractor = net.create_extractor()
            extractor.input("in0", ncnn.Mat(x[0].numpy()))
            found = [np.array(extractor.extract(name)[1]) for name in names]
            return [torch.from_numpy(value)[None] for value in found]

        return call
