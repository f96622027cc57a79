"""The routing of a whole network on labelled images: predictions, gates of each layer, accuracy gain of routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from condconv_surgery.data.labelled_images import LabelledImages, assumed_order, logit_of_each_class
from condconv_surgery.layers.find_layers import routed_layers
from condconv_surgery.recipe import InputSpec
from condconv_surgery.reporting.images.attention_statistics import LayerAttention, layer_attention
from condconv_surgery.reporting.images.collect_gates import Outputs, collect_gates, outputs_with_mean_gates
from condconv_surgery.reporting.images.predictions import Predictions
from condconv_surgery.reporting.images.report_images import ReportImages
from condconv_surgery.reporting.images.routing_statistics import LayerRouting, layer_routing
from condconv_surgery.reporting.study.paired_difference import Difference, paired_difference
from condconv_surgery.reporting.study.study_results import points
from condconv_surgery.runtime.modes import input_spec_of


@dataclass(frozen=True)
class Routing:
    """All layers with gates, and the accuracy gain of routing: ``accuracy - mean_gate_accuracy``.

    predictions: with routing, of the images. mean_gate_accuracy: top-1 with every mixture replaced by its mean over
        these images; ``None`` when the classes of the data are not those of the model.
    gain: of routing, with its 95% interval over images, paired. changed: predictions that routing makes right or wrong.
    attention: of layers with scales, how much these differ between images.
    classes: names in the data. source: the images, for thumbnails.
    """

    layers: tuple[LayerRouting, ...]
    classes: tuple[str, ...]
    predictions: Predictions
    mean_gate_accuracy: float | None
    gain: Difference | None
    changed: int
    attention: tuple[LayerAttention, ...]
    source: LabelledImages

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.predictions.images)

    @property
    def accuracy(self) -> float | None:
        """Top-1 with routing; ``None`` when the classes of the data are not those of the model."""
        return self.predictions.accuracy

    @property
    def verdict(self) -> str:
        """The conclusion for the whole network as text."""
        static = sum(layer.static for layer in self.layers)
        text = f"{static} of {len(self.layers)} layers could be static. " if self.layers else ""
        return f"{text}{self._gain()} {self.predictions.caveats}".strip()

    def _gain(self) -> str:
        if self.gain is None or self.accuracy is None or self.mean_gate_accuracy is None:
            return ""
        if not self.changed:
            return (
                "Routing changes no prediction from right to wrong or back "
                f"(top-1 {self.accuracy:.1%} with routing and with mean gates, {self.images} images)."
            )
        both = f"top-1 {self.accuracy:.1%} with routing, {self.mean_gate_accuracy:.1%} with mean gates"
        return f"Accuracy gain of routing: {points(self.gain)} points, 95% interval ({both}, {self.images} images)."

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "classes": list(self.classes),
            "accuracy": self.accuracy,
            "mean_gate_accuracy": self.mean_gate_accuracy,
            "gain": self.gain and self.gain.to_dict(),
            "held_out": self.predictions.held_out,
            "verdict": self.verdict,
            "files": list(self.predictions.images),
            "layers": [layer.to_dict() for layer in self.layers],
            "attention": [layer.to_dict() for layer in self.attention],
        }


def measure_routing(
    model: nn.Module,
    images: ReportImages,
    *,
    classes: tuple[str, ...] = (),
    spec: InputSpec | None = None,
    batch: int = 32,
) -> Routing:
    """Two passes over ``images``: one with routing, one with every mixture replaced by its mean.

    classes: names of the model's logits, to match the folder's classes by name; without them the folder's order is
        used, if the number of classes is equal. A network without routers needs the first pass only.
    """
    spec = spec or input_spec_of(model)
    routed = collect_gates(model, images.batches(spec, batch))
    predictions = predictions_of(images, routed.outputs, routed.labels, classes)
    weights = {name: [layer.float_experts() for layer in layers] for name, layers in routed_layers(model).items()}
    layers = tuple(
        layer_routing(name, gates, routed.labels, len(images.classes), weights.get(name, ()))
        for name, gates in routed.gates.items()
    )
    accuracy, gain, changed = None, None, 0
    if predictions.correct and routed.means:
        outputs = outputs_with_mean_gates(model, images.batches(spec, batch), routed.means)
        static = predictions_of(images, outputs, routed.labels, classes)
        accuracy, gain = static.accuracy, paired_difference([predictions.correct], [static.correct])
        changed = sum(a != b for a, b in zip(predictions.correct, static.correct, strict=True))
    attention = tuple(
        layer_attention(name, mixture, routed.labels, len(images.classes)) for name, mixture in routed.scales.items()
    )
    return Routing(layers, images.classes, predictions, accuracy, gain, changed, attention, images.images)


def predictions_of(images: ReportImages, outputs: Outputs, labels: Tensor, names: tuple[str, ...]) -> Predictions:
    """The predictions of one pass. names: of the logits; without them the classes of the data, if equally many."""
    notes = images.notes
    if names and len(names) != outputs.width:  # of a head that has been replaced since
        notes = (
            f"The model names {len(names)} classes and has {outputs.width} logits: its names are not used.",
            *notes,
        )
        names = ()
    logit_of = logit_of_each_class(images.classes, names) if images.classes else None
    targets: tuple[int, ...] | None = None if logit_of is None else tuple(logit_of.tolist())
    if targets is None and images.classes and not names and outputs.width == len(images.classes):
        targets, names = tuple(range(outputs.width)), images.classes
        notes = (*notes, assumed_order(images.classes))
    return Predictions(
        images.files,
        tuple(None if label < 0 else label for label in labels.tolist()),
        tuple(outputs.predicted.tolist()),
        tuple(outputs.confidence.tolist()),
        images.classes,
        names or tuple(map(str, range(outputs.width))),
        targets,
        images.held_out,
        images.where,
        tuple(images.unreadable),
        notes=notes,
    )
