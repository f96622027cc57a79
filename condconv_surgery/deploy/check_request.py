"""What an export cannot be, as errors before anything is traced: that takes minutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from condconv_surgery.deploy.forms.graph_forms import CONSTANT
from condconv_surgery.deploy.mean_mixtures import Labelled
from condconv_surgery.deploy.runtimes.onnx_detector import OnnxDetector
from condconv_surgery.deploy.runtimes.runtime_protocol import Runtime
from condconv_surgery.errors import InputError, listed, unknown_name
from condconv_surgery.layers import ConditionalConv2d
from condconv_surgery.layers.conv2d_subclasses import padding_of
from condconv_surgery.ops.geometry import TF_SAME
from condconv_surgery.recipe import InputSpec

MOST_SIZED = 2
"""Layers whose padding depends on the size: torch takes 7 s to trace one with symbolic sizes, 17 s for two, and more
than a minute for three (torch 2.14, one core)."""


def quantizable(runtime: Runtime, quantize: str, data: Any) -> Sequence[str]:
    """The forms of a model whose convolutions become integers. Raises ``InputError`` for what cannot be."""
    if quantize != "int8":
        raise unknown_name("quantization", quantize, ["int8"], 'quantize="int8"')
    if runtime.name != "onnx":
        raise InputError(f'quantize="int8" with to="{runtime.name}".', "Only ONNX files are quantised.", 'to="onnx"')
    if data is None:
        raise InputError('quantize="int8" needs images.', "They give the ranges of the activations.", "data=FOLDER")
    return CONSTANT


def require_sizes(batches: Sequence[Labelled], spec: InputSpec, dynamic_size: bool) -> None:
    """Raise ``InputError`` for images that the file will not take."""
    wanted = (spec.channels, spec.height, spec.width)
    for images, _ in batches:
        if tuple(images.shape[1:]) != wanted and not (dynamic_size and images.shape[1] == spec.channels):
            raise InputError(
                f"data= holds images [B, C, H, W] of shape {list(images.shape)}.",
                f"The file takes [B, {', '.join(map(str, wanted))}].",
                f"size={images.shape[-1]}",
            )


def runtime_of_detectors(runtime: Runtime, quantize: str | None, data: Any) -> Runtime:
    """The runtime for torchvision's detectors. Raises ``InputError`` where there is none."""
    if runtime.name != "onnx":
        raise InputError(
            f'to="{runtime.name}" with a detector of torchvision: how many boxes it gives depends on the image.',
            "A detector is written for ONNX, for one image of one size; model.backbone for every runtime.",
            'to="onnx"',
        )
    if quantize is not None or data is not None:
        raise InputError(
            "quantize= and data= are for classifiers. The model is a detector of torchvision.",
            "A detector is written in float32, and has no top-1.",
            "without them",
        )
    return OnnxDetector()


def batch_of(runtime: Runtime, batch: int | None, dynamic_size: bool) -> int | None:
    """The batch of the graph, ``None`` for any. Raises ``InputError`` for one that the runtime does not take."""
    if batch is not None and batch < 1:
        raise InputError(f"batch={batch}.", "It is the number of images of each call.", "batch=1")
    if batch not in (None, 1) and isinstance(runtime, OnnxDetector):
        raise InputError(f"batch={batch} with a detector of torchvision.", "Its file takes one image.", "batch=1")
    if dynamic_size and runtime.fixed_size:
        raise InputError(f'to="{runtime.name}" takes one size.', "Its shapes are fixed.", "dynamic_size=False")
    return 1 if batch is None and runtime.fixed_batch else batch


def require_file_name(path: Path, runtime: Runtime) -> None:
    """Raise ``InputError`` for a folder, and for a name of another kind of file."""
    if path.is_dir():
        raise InputError(f"{path} is a folder.", "A file has a name.", f"{path / f'model{runtime.suffix}'}")
    if path.suffix != runtime.suffix:
        wanted = path.with_suffix(runtime.suffix)
        raise InputError(f"{path} does not end in {runtime.suffix}.", f'With to="{runtime.name}" it must.', f"{wanted}")


def require_free_name(path: Path, runtime: Runtime) -> None:
    """Raise ``InputError`` where the second file would replace one that no export of this runtime wrote."""
    beside = path.with_suffix(runtime.suffix_beside) if runtime.suffix_beside else path
    if beside.exists() and not path.exists():
        raise InputError(
            f"{beside} is there, without {path}: it belongs to another file.",
            f"An export to {runtime.name} writes both, and would replace it.",
            f"{path.with_name(f'{path.stem}_{runtime.name}{runtime.suffix}')}",
        )


def require_traceable_sizes(model: nn.Module) -> None:
    """Raise ``InputError`` where symbolic sizes would take hours: each padding is a function of the one before."""
    found = [name for name, module in model.named_modules() if _pads_by_size(module)]
    if len(found) > MOST_SIZED:
        raise InputError(
            f"The padding of {len(found)} layers depends on the size of the image: {listed(found)}.",
            f"For any size, at most {MOST_SIZED} can: torch would trace the others for hours.",
            "dynamic_size=False, and a file for each size",
        )


def _pads_by_size(module: nn.Module) -> bool:
    """TensorFlow's "same" with a stride, by a layer of ours, a convolution of a known class or a layer of timm."""
    if isinstance(module, ConditionalConv2d):
        return module.geometry.padding == TF_SAME and max(module.geometry.stride) > 1
    convolution = isinstance(module, nn.Conv2d) and padding_of(module) == TF_SAME
    of_timm = type(module).__module__.startswith("timm.") and type(module).__name__.endswith("Same")  # a pool, say
    stride: Any = getattr(module, "stride", 1)
    return (convolution or of_timm) and (max(stride) if isinstance(stride, tuple) else stride) > 1
