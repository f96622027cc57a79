"""``export``: a conditional network as the file of a runtime, which is kept only if it computes the same there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.check_request import (
    batch_of,
    quantizable,
    require_file_name,
    require_free_name,
    require_sizes,
    require_traceable_sizes,
    runtime_of_detectors,
)
from condconv_surgery.deploy.deployment_images import DeploymentImages, deployment_images
from condconv_surgery.deploy.detectors import DetectorGraph, is_detector
from condconv_surgery.deploy.file_accuracy import in_batches, top1_of_file
from condconv_surgery.deploy.file_proof import proven, require_exportable
from condconv_surgery.deploy.forms.serving_form import serving_form
from condconv_surgery.deploy.mean_mixtures import top1
from condconv_surgery.deploy.runtimes.litert_model import LiteRt
from condconv_surgery.deploy.runtimes.ncnn_model import Ncnn
from condconv_surgery.deploy.runtimes.onnx_file import Onnx
from condconv_surgery.deploy.runtimes.onnx_int8 import quantize_convolutions
from condconv_surgery.deploy.runtimes.openvino_model import OpenVino
from condconv_surgery.deploy.runtimes.pt2_program import Pt2
from condconv_surgery.deploy.runtimes.runtime_protocol import Request, Runtime
from condconv_surgery.errors import unknown_name
from condconv_surgery.layers import conditional_layers
from condconv_surgery.models.artifact.atomic_write import replacing_files, require_values
from condconv_surgery.recipe import InputSpec, recipe_of
from condconv_surgery.runtime.class_names import classes_of
from condconv_surgery.runtime.modes import input_spec_of
from condconv_surgery.runtime.wrappers import unwrapped
from condconv_surgery.surgery.copy_model import copy_of

RUNTIMES: dict[str, Runtime] = {own.name: own for own in (Onnx(), Pt2(), OpenVino(), LiteRt(), Ncnn())}

BATCHES = (1, 3, 8)
"""Batches at which a file for any batch is compared with the model."""


@dataclass(frozen=True)
class Export:
    """What ``export`` wrote.

    forms: the form of each conditional layer, by its name (``deploy.forms.graph_forms``). difference: the largest
    between model and file, relative to the outputs' magnitude, before any quantisation. shapes: the inputs at which
    they were compared. versions: of the file's format. accuracy: top-1, 0 to 1, of model and file; None without labels.
    rounding: where ``difference`` is more than 1e-4 because the model amplifies rounding: how far its own outputs in
    float32 are from those in float64; the file is at most ``deploy.file_proof.ROUNDING_FACTOR`` times as far.
    scored_on: the images of the accuracy, as text, with a warning where the model may have been trained on them.
    """

    path: Path
    runtime: str
    forms: dict[str, str]
    difference: float
    shapes: tuple[tuple[int, ...], ...]
    versions: dict[str, int] = field(default_factory=dict)
    accuracy: tuple[float, float] | None = None
    rounding: float | None = None
    scored_on: str = ""

    def form_counts(self) -> dict[str, int]:
        """How many conditional layers have each form."""
        return dict(Counter(self.forms.values()))


def export(
    model: nn.Module,
    path: str | Path,
    *,
    to: str = "onnx",
    form: str = "auto",
    batch: int | None = None,
    dynamic_size: bool = False,
    size: int | None = None,
    quantize: str | None = None,
    data: str | Path | Tensor | Iterable[Any] | None = None,
    limit: int = 1000,
) -> Export:
    """Write ``model`` for a runtime, and run the file there against the model.

        cs.export(model, "resnet18.onnx")                      # ONNX Runtime, any batch
        cs.export(model, "resnet18.tflite", to="litert")

    Batch norms are folded first (``fold``), and the constants of the routers. The metadata of the file has the classes,
    the normalisation, the input size and the variant. A detector of torchvision goes to ONNX, for one image of one
    size: its maps are compared to 1e-4, its detections as sets.

    to: ``"onnx"``, ``"pt2"`` (torch.export), ``"openvino"``, ``"litert"`` or ``"ncnn"``; the last two take one batch.
    form: of the conditional layers in the graph, see ``deploy.forms.graph_forms``; ``"auto"`` chooses for each layer.
    batch: the only one of the graph; by default any, or 1 where the runtime needs one. dynamic_size: also any H and W.
    size: side of the input in pixels, if it is not the model's own.
    quantize: ``"int8"``, for ONNX: convolutions in int8, with ranges from ``data``; routers stay float. The layers then
        have constant kernels.
    data: as ``collapse`` takes it: its labelled images, ``limit`` at most, give the top-1 of model and file.

    Raises ``InputError`` for a form that a layer or the runtime cannot have, a path that cannot be written or missing
    packages, ``SurgeryError`` where the model cannot be exported or gives NaN or the disk is full, and ``ProofError``,
    without a file, when outputs differ by more than 1e-4 of their magnitude at batches of 1, 3 and 8, or at ``batch``,
    and by more than the model's own rounding, which float64 shows. With ``dynamic_size`` a larger size is compared too,
    and a smaller one of odd sides where the model takes it.
    """
    model, runtime, path = unwrapped(model), runtime_named(to), Path(path)
    runtime.require_packages()
    require_values(model.state_dict())
    detector = is_detector(model)
    if detector:
        runtime = runtime_of_detectors(runtime, quantize, data)
    batch = batch_of(runtime, batch, dynamic_size)
    preferred = runtime.preferred if quantize is None else quantizable(runtime, quantize, data)
    require_file_name(path, runtime)
    require_free_name(path, runtime)
    spec = input_spec_of(model)
    spec = spec if size is None else replace(spec, height=size, width=size)
    original = copy_of(model).cpu().float()
    original.eval()  # returns None where a model's own train() does
    inputs = _detector_images(spec) if detector else _inputs(spec, batch, dynamic_size)
    images = inputs[0] if batch else _images(2, spec.channels, spec.height, spec.width)
    outputs = require_exportable(DetectorGraph(original) if detector else original, images)
    if dynamic_size:
        require_traceable_sizes(original)
        inputs += _of_odd_sizes(original, spec, batch)
    images_of = DeploymentImages([], []) if data is None else deployment_images(original, data, limit, spec)
    calibration, labelled, scored_on = images_of
    require_sizes(calibration, spec, dynamic_size)
    row_by_row = all(output.dim() and len(output) == len(images) for output in outputs)
    loops = runtime.loops and batch is None and row_by_row
    served, forms, in_a_loop = serving_form(
        original, form=form, preferred=preferred, batch=None if detector else batch, loops=loops
    )
    shown, graph_batch = (images[:1], 1) if in_a_loop else (images, batch)
    request = Request(shown, graph_batch, dynamic_size, metadata_of(model, spec), in_a_loop)
    with replacing_files(path, size=sum(tensor.nbytes for tensor in original.state_dict().values())) as temporary:
        versions = runtime.write(served, request, temporary)
        proof = proven(partial(runtime.prove, original, temporary, inputs), dynamic_size)
        if quantize is not None:
            quantize_convolutions(temporary, [x for one, _ in calibration for x in in_batches(one, batch)])
        before = top1(original, labelled)
        accuracy = None if before is None else (before, top1_of_file(runtime, temporary, labelled, batch))
    shapes = tuple(tuple(x.shape) for x in inputs)
    return Export(path, to, forms, proof.difference, shapes, versions, accuracy, proof.rounding, scored_on)


def _inputs(spec: InputSpec, batch: int | None, dynamic_size: bool) -> list[Tensor]:
    """At which model and file are compared."""
    sides = [(spec.height, spec.width), (spec.height + 32, spec.width + 64)][: 2 if dynamic_size else 1]
    return [_images(one, spec.channels, *side) for side in sides for one in (BATCHES if batch is None else (batch,))]


def _of_odd_sizes(model: nn.Module, spec: InputSpec, batch: int | None) -> list[Tensor]:
    """A smaller image of odd sides, where the model takes it: a graph made at an even size may hold for even ones."""
    images = _images(batch or 2, spec.channels, spec.height * 3 // 4 | 1, spec.width * 7 // 8 | 1)
    try:
        with torch.no_grad():
            model(images)
    except Exception:  # whatever a user's forward raises: it takes multiples of 32 only, say
        return []
    return [images]


def metadata_of(model: nn.Module, spec: InputSpec) -> dict[str, Any]:
    """What whoever serves the file has to know, as JSON values."""
    recipe, layers = recipe_of(model), conditional_layers(model)
    if is_detector(model):  # it normalises images itself
        spec = replace(spec, mean=(0.0,) * spec.channels, std=(1.0,) * spec.channels)
    return {
        "classes": list(classes_of(model)),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "size": [spec.channels, spec.height, spec.width],
        "interpolation": spec.interpolation,
        "crop_fraction": spec.crop_fraction,
        "source": recipe.source.name if recipe else "",
        "variant": next((layer.variant.to_dict() for layer in layers.values()), None),
    }


def runtime_named(name: str) -> Runtime:
    """The runtime of ``RUNTIMES``. Raises ``InputError`` where there is none."""
    if name not in RUNTIMES:
        raise unknown_name("runtime", name, RUNTIMES, 'to="onnx"')
    return RUNTIMES[name]


def _detector_images(spec: InputSpec) -> list[Tensor]:
    """Noise of values from 0 to 1: a detector normalises."""
    shape, generator = (1, spec.channels, spec.height, spec.width), torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator) for _ in BATCHES]


def _images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
