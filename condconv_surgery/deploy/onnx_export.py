"""``export_onnx``: a conditional network as an ONNX file for every batch, proven in ONNX Runtime before it is kept."""

from __future__ import annotations

import importlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.fold_batch_norm import fold
from condconv_surgery.deploy.graph_forms import choose_forms
from condconv_surgery.errors import InputError, ProofError, SurgeryError, one_line
from condconv_surgery.layers import conditional_layers
from condconv_surgery.layers.find_layers import folded_layers
from condconv_surgery.models.artifact.atomic_write import replacing, require_values
from condconv_surgery.recipe import InputSpec, recipe_of
from condconv_surgery.runtime.modes import input_spec_of
from condconv_surgery.surgery.copy_model import copy_of
from condconv_surgery.surgery.proof.output_tensors import output_tensors

OPSET = 18
"""Of the file. ONNX Runtime since 1.14 reads it."""

BATCHES = (1, 3, 8)
"""Batches at which the file is compared with the model."""

TOLERANCE = 1e-4
"""Largest difference, relative to the magnitude of the outputs."""


@dataclass(frozen=True)
class OnnxExport:
    """What ``export_onnx`` wrote.

    forms: the form of each conditional layer, by its name. difference: the largest between model and file, relative to
    the outputs' magnitude. shapes: the inputs at which they were compared. opset, ir: versions of the file.
    """

    path: Path
    forms: dict[str, str]
    difference: float
    shapes: tuple[tuple[int, ...], ...]
    opset: int
    ir: int


def export_onnx(
    model: nn.Module, path: str | Path, *, form: str = "auto", dynamic_size: bool = False, size: int | None = None
) -> OnnxExport:
    """Write ``model`` as an ONNX file with a dynamic batch, and run it in ONNX Runtime against the model.

        cs.export_onnx(model, "resnet18.onnx")

    Batch norms are folded first (``fold``). The file's metadata has the classes, the normalisation, the input size and
    the variant. Its input is ``images`` [B, C, H, W].

    form: of the conditional layers in the graph, see ``deploy.graph_forms.FORMS``; ``"auto"`` chooses for each layer.
    dynamic_size: also H and W. size: side of the input in pixels, if it is not the model's own.

    Raises ``InputError`` for a form that a layer cannot have, a path that cannot be written or missing packages,
    ``SurgeryError`` where torch cannot export the model, and ``ProofError``, without a file, when the outputs at
    batches of 1, 3 and 8 differ by more than 1e-4 of their magnitude.
    """
    runtime = _require_packages()
    require_values(model.state_dict())
    spec = input_spec_of(model)
    height, width = (spec.height, spec.width) if size is None else (size, size)
    original = copy_of(model).eval().cpu().float()
    served = copy_of(original)
    if conditional_layers(served) and not folded_layers(served):
        fold(served, inplace=True, prove=False)  # the proof below covers it
    forms = choose_forms(served, form)
    images = _images(2, spec.channels, height, width)
    program = _export(served, images, dynamic_size)
    _strip(program.model.graph)
    program.model.metadata_props.update(_metadata(model, spec, height, width))
    sides = [(height, width), (height + 32, width + 64)] if dynamic_size else [(height, width)]
    shapes = tuple((batch, spec.channels, *side) for side in sides for batch in BATCHES)
    path = Path(path)
    with replacing(path) as temporary:
        program.save(str(temporary), external_data=False)
        session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        difference = max(_difference(original, session, _images(*shape)) for shape in shapes)
        if not difference <= TOLERANCE:
            raise ProofError(
                f"The exported file differs from the model by {difference:.3g} of its outputs.",
                f"At most {TOLERANCE:g} is allowed. Nothing was written.",
                'another form="matmul" or form="sum"',
            )
    return OnnxExport(path, forms, difference, shapes, OPSET, int(program.model.ir_version))


def form_counts(export: OnnxExport) -> dict[str, int]:
    """How many conditional layers have each form."""
    return dict(Counter(export.forms.values()))


def _require_packages() -> Any:
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError(
            f"ONNX needs a package that is not installed: {error.name}.",
            "onnx and onnxscript write the file, onnxruntime proves it.",
            'pip install "condconv-surgery[onnx]"',
        ) from error


def _export(model: nn.Module, images: Tensor, dynamic_size: bool) -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    sizes = {2: dynamic, 3: dynamic} if dynamic_size else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: dynamic, **sizes},),
                input_names=["images"],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # whatever torch.export raises for a user's forward
        cause = error.__cause__ or error
        raise SurgeryError(
            f"torch cannot export the model: {one_line(cause)}",
            "torch.export must trace its forward as one graph.",
            "dynamic_size=False" if dynamic_size else "collapse, then the exporter of the plain network",
        ) from error


def _strip(graph: Any) -> None:
    """Remove what torch notes of each node: stack traces with paths of this machine, as large as a small network."""
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _difference(model: nn.Module, session: Any, images: Tensor) -> float:
    """The largest over all outputs, relative to the largest output."""
    with torch.no_grad():
        expected = output_tensors(model(images))
    actual = [torch.from_numpy(value) for value in session.run(None, {session.get_inputs()[0].name: images.numpy()})]
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        return float("inf")
    gap = max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))
    return gap / max(float(b.abs().max()) for b in expected) if gap else 0.0


def _images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _metadata(model: nn.Module, spec: InputSpec, height: int, width: int) -> dict[str, str]:
    """What whoever serves the file has to know, each value as JSON."""
    recipe, layers = recipe_of(model), conditional_layers(model)
    values = {
        "classes": list(recipe.classes) if recipe else [],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "size": [spec.channels, height, width],
        "interpolation": spec.interpolation,
        "crop_fraction": spec.crop_fraction,
        "source": recipe.source.name if recipe else "",
        "variant": next((layer.variant.to_dict() for layer in layers.values()), None),
    }
    return {name: json.dumps(value) for name, value in values.items()}
