"""``export``: a conditional network as the file of a runtime, which is kept only if it computes the same there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.deployment_images import DeploymentImages, deployment_images
from condconv_surgery.deploy.detectors import DetectorGraph, is_detector
from condconv_surgery.deploy.file_accuracy import in_batches, top1_of_file
from condconv_surgery.deploy.file_proof import proven, require_exportable
from condconv_surgery.deploy.graph_forms import CONSTANT
from condconv_surgery.deploy.mean_mixtures import Labelled, top1
from condconv_surgery.deploy.runtimes.litert_model import LiteRt
from condconv_surgery.deploy.runtimes.ncnn_model import Ncnn
from condconv_surgery.deploy.runtimes.onnx_detector import OnnxDetector
from condconv_surgery.deploy.runtimes.onnx_file import Onnx
from condconv_surgery.deploy.runtimes.onnx_int8 import quantize_convolutions
from condconv_surgery.deploy.runtimes.openvino_model import OpenVino
from condconv_surgery.deploy.runtimes.pt2_program import Pt2
from condconv_surgery.deploy.runtimes.runtime_protocol import Request, Runtime
from condconv_surgery.deploy.serving_form import serving_form
from condconv_surgery.errors import InputError, unknown_name
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

    forms: the form of each conditional layer, by its name (``deploy.graph_forms``). difference: the largest between
    model and file, relative to the outputs' magnitude, before any quantisation. shapes: the inputs at which they were
    compared. versions: of the file's format. accuracy: top-1, 0 to 1, of model and file; None without labels.
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
    form: of the conditional layers in the graph, see ``deploy.graph_forms``; ``"auto"`` chooses for each layer.
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
    model, runtime, path = unwrapped(model), _runtime(to), Path(path)
    runtime.require_packages()
    require_values(model.state_dict())
    detector = is_detector(model)
    if detector:
        runtime = _of_detectors(runtime, quantize, data)
    batch = _batch(runtime, batch, dynamic_size)
    preferred = runtime.preferred if quantize is None else _quantizable(runtime, quantize, data)
    _require_file_name(path, runtime)
    _require_free_name(path, runtime)
    spec = input_spec_of(model)
    spec = spec if size is None else replace(spec, height=size, width=size)
    original = copy_of(model).cpu().float()
    original.eval()  # returns None where a model's own train() does
    inputs = _detector_images(spec) if detector else _inputs(spec, batch, dynamic_size)
    images = inputs[0] if batch else _images(2, spec.channels, spec.height, spec.width)
    require_exportable(DetectorGraph(original) if detector else original, images)
    if dynamic_size:
        inputs += _of_odd_sizes(original, spec, batch)
    images_of = DeploymentImages([], []) if data is None else deployment_images(original, data, limit, spec)
    calibration, labelled, scored_on = images_of
    _require_sizes(calibration, spec, dynamic_size)
    served, forms = serving_form(original, form=form, preferred=preferred, batch=None if detector else batch)
    request = Request(images, batch, dynamic_size, metadata_of(model, spec))
    with replacing_files(path, size=sum(tensor.nbytes for tensor in original.state_dict().values())) as temporary:
        versions = runtime.write(served, request, temporary)
        proof = proven(partial(runtime.prove, original, temporary, inputs), dynamic_size)
        if quantize is not None:
            quantize_convolutions(temporary, [x for one, _ in calibration for x in in_batches(one, batch)])
        before = top1(original, labelled)
        accuracy = None if before is None else (before, top1_of_file(runtime, temporary, labelled, batch))
    shapes = tuple(tuple(x.shape) for x in inputs)
    return Export(path, to, forms, proof.difference, shapes, versions, accuracy, proof.rounding, scored_on)


def _quantizable(runtime: Runtime, quantize: str, data: Any) -> Sequence[str]:
    """The forms of a model whose convolutions become integers. Raises ``InputError`` for what cannot be."""
    if quantize != "int8":
        raise unknown_name("quantization", quantize, ["int8"], 'quantize="int8"')
    if runtime.name != "onnx":
        raise InputError(f'quantize="int8" with to="{runtime.name}".', "Only ONNX files are quantised.", 'to="onnx"')
    if data is None:
        raise InputError('quantize="int8" needs images.', "They give the ranges of the activations.", "data=FOLDER")
    return CONSTANT


def _require_sizes(batches: Sequence[Labelled], spec: InputSpec, dynamic_size: bool) -> None:
    wanted = (spec.channels, spec.height, spec.width)
    for images, _ in batches:
        if tuple(images.shape[1:]) != wanted and not (dynamic_size and images.shape[1] == spec.channels):
            raise InputError(
                f"data= holds images [B, C, H, W] of shape {list(images.shape)}.",
                f"The file takes [B, {', '.join(map(str, wanted))}].",
                f"size={images.shape[-1]}",
            )


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


def _runtime(name: str) -> Runtime:
    if name not in RUNTIMES:
        raise unknown_name("runtime", name, RUNTIMES, 'to="onnx"')
    return RUNTIMES[name]


def _of_detectors(runtime: Runtime, quantize: str | None, data: Any) -> Runtime:
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


def _batch(runtime: Runtime, batch: int | None, dynamic_size: bool) -> int | None:
    if batch is not None and batch < 1:
        raise InputError(f"batch={batch}.", "It is the number of images of each call.", "batch=1")
    if batch not in (None, 1) and isinstance(runtime, OnnxDetector):
        raise InputError(f"batch={batch} with a detector of torchvision.", "Its file takes one image.", "batch=1")
    if dynamic_size and runtime.fixed_size:
        raise InputError(f'to="{runtime.name}" takes one size.', "Its shapes are fixed.", "dynamic_size=False")
    return 1 if batch is None and runtime.fixed_batch else batch


def _require_file_name(path: Path, runtime: Runtime) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder.", "A file has a name.", f"{path / f'model{runtime.suffix}'}")
    if path.suffix != runtime.suffix:
        wanted = path.with_suffix(runtime.suffix)
        raise InputError(f"{path} does not end in {runtime.suffix}.", f'With to="{runtime.name}" it must.', f"{wanted}")


def _require_free_name(path: Path, runtime: Runtime) -> None:
    """Raise ``InputError`` where the second file would replace one that no export of this runtime wrote."""
    beside = path.with_suffix(runtime.suffix_beside) if runtime.suffix_beside else path
    if beside.exists() and not path.exists():
        raise InputError(
            f"{beside} is there, without {path}: it belongs to another file.",
            f"An export to {runtime.name} writes both, and would replace it.",
            f"{path.with_name(f'{path.stem}_{runtime.name}{runtime.suffix}')}",
        )


def _detector_images(spec: InputSpec) -> list[Tensor]:
    """Noise of values from 0 to 1: a detector normalises."""
    shape, generator = (1, spec.channels, spec.height, spec.width), torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator) for _ in BATCHES]


def _images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
