"""The predictions of a classifier, one an image: accuracy by class, confusion matrix, calibration."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from condconv_surgery.data.evaluation_images import NOT_HELD_OUT, trained_images
from condconv_surgery.errors import counted, listed
from condconv_surgery.reporting.study.binomial_interval import binomial_interval

BINS = 15
"""Bins of confidence, of equal width (Guo et al. 2017)."""


@dataclass(frozen=True)
class ClassAccuracy:
    """``right`` of the ``images`` of one class are predicted as that class.

    interval: of the share, 95%. confused: the class that most of the others are predicted as, and how often.
    """

    name: str
    images: int
    right: int
    interval: tuple[float, float]
    confused: tuple[str, int] | None

    @property
    def accuracy(self) -> float:
        """0 to 1."""
        return self.right / self.images


@dataclass(frozen=True)
class Calibration:
    """Does the confidence say how often the prediction is right? (Guo et al. 2017, arXiv 1706.04599, eq. 3)

        ECE = sum_b n_b / N |accuracy_b - confidence_b|

    over ``BINS`` bins b of the confidence, the largest softmax probability. error: ECE, 0 to 1. bins: (images, mean
    confidence, accuracy) of those that are not empty. confidence: mean over all images.
    """

    error: float
    confidence: float
    bins: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Predictions:
    """The prediction for each of N images.

    images: their names. labels: index into ``classes``, ``None`` for an image without a label. predicted: index into
    ``outputs``, the names of the logits. confidence: softmax probability of the predicted class, 0 to 1.
    targets: the logit of each class; ``None`` when the classes of the data are not those of the model.
    held_out, where: as in ``EvaluationImages``. unreadable: images that were left out, with the reason.
    trained, run: how many of the images trained the model, and in which run, where that is known. notes: further
    sentences of ``caveats``.
    """

    images: tuple[str, ...]
    labels: tuple[int | None, ...]
    predicted: tuple[int, ...]
    confidence: tuple[float, ...]
    classes: tuple[str, ...]
    outputs: tuple[str, ...]
    targets: tuple[int, ...] | None
    held_out: bool = True
    where: str = ""
    unreadable: tuple[str, ...] = ()
    trained: int = 0
    run: str = ""
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        top1 = "" if self.accuracy is None else f", top-1 {self.accuracy:.1%}"
        return f"<{type(self).__name__}: {counted(len(self.images), 'image')}{top1}>"

    @cached_property
    def correct(self) -> str:
        """A digit for each image, 1 right and 0 wrong, as ``paired_difference`` takes it; empty without targets."""
        if self.targets is None or None in self.labels:
            return ""
        targets = self.targets
        pairs = zip(self.labels, self.predicted, strict=True)
        return "".join("1" if label is not None and targets[label] == own else "0" for label, own in pairs)

    @property
    def accuracy(self) -> float | None:
        """Top-1, 0 to 1; ``None`` without labels or where the classes are not those of the model."""
        return self.correct.count("1") / len(self.correct) if self.correct else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the accuracy over images."""
        return binomial_interval(self.correct.count("1"), len(self.correct)) if self.correct else None

    @property
    def confusion(self) -> tuple[tuple[int, ...], ...]:
        """Images of class i predicted as class j, [C][C]; a last column has outputs that are no class of the data."""
        if not self.correct or self.targets is None:
            return ()
        column = {target: c for c, target in enumerate(self.targets)}
        others = any(own not in column for own in self.predicted)
        counts = [[0] * (len(self.classes) + others) for _ in self.classes]
        for label, own in zip(self.labels, self.predicted, strict=True):
            counts[label or 0][column.get(own, len(self.classes))] += 1
        return tuple(map(tuple, counts))

    @property
    def by_class(self) -> tuple[ClassAccuracy, ...]:
        """Each class of which there are images."""
        if not self.correct:
            return ()
        wrong: list[Counter[int]] = [Counter() for _ in self.classes]
        images, right = Counter(self.labels), Counter[int | None]()
        for label, own, digit in zip(self.labels, self.predicted, self.correct, strict=True):
            if digit == "1":
                right[label] += 1
            else:
                wrong[label or 0][own] += 1
        return tuple(
            ClassAccuracy(
                name,
                images[c],
                right[c],
                binomial_interval(right[c], images[c]),
                next(((self.outputs[own], count) for own, count in wrong[c].most_common(1)), None),
            )
            for c, name in enumerate(self.classes)
            if images[c]
        )

    @property
    def calibration(self) -> Calibration | None:
        """``None`` where the accuracy is."""
        if not self.correct:
            return None
        bins: dict[int, list[tuple[float, int]]] = {}
        for confidence, digit in zip(self.confidence, self.correct, strict=True):
            bins.setdefault(min(BINS - 1, int(confidence * BINS)), []).append((confidence, int(digit)))
        rows = [
            (len(own), sum(c for c, _ in own) / len(own), sum(d for _, d in own) / len(own))
            for _, own in sorted(bins.items())
        ]
        error = sum(count * abs(accuracy - confidence) for count, confidence, accuracy in rows) / len(self.correct)
        return Calibration(error, sum(self.confidence) / len(self.confidence), tuple(rows))

    @property
    def caveats(self) -> str:
        """What limits the accuracy on these images, in sentences; empty where nothing does."""
        parts = []
        if None in self.labels:
            parts.append("The images have no labels, so accuracy is unknown.")
        elif self.targets is None:
            parts.append("The model's classes are not those of the folder, so accuracy is unknown.")
        if self.trained:
            parts.append(
                f"{self.trained} of these {counted(len(self.images), 'image')} trained this model ({self.run}): "
                "with this run as the data, it is measured on its own validation images."
            )
        elif self.correct and not self.held_out:
            parts.append(NOT_HELD_OUT)
        parts += self.notes
        if self.unreadable:
            parts.append(f"Left out as unreadable: {listed(self.unreadable)}.")
        return " ".join(parts)

    def of_run(self, run: Path) -> Predictions:
        """The same with what ``run``, which trained the model, recorded: how many of the images it trained on."""
        trained = trained_images(run, self.images)
        return replace(self, trained=trained, run=str(run), held_out=False) if trained else self

    def rows(self) -> list[dict[str, Any]]:
        """A row for each image: ``image``, ``label``, ``predicted``, ``confidence``, ``correct`` (empty if unknown)."""
        correct: list[Any] = [int(digit) for digit in self.correct] or [""] * len(self.images)
        return [
            {
                "image": image,
                "label": "" if label is None else self.classes[label],
                "predicted": self.outputs[own],
                "confidence": confidence,
                "correct": right,
            }
            for image, label, own, confidence, right in zip(
                self.images, self.labels, self.predicted, self.confidence, correct, strict=True
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the summary; ``rows`` has the images."""
        calibration = self.calibration
        return {
            "images": len(self.images),
            "where": self.where,
            "held_out": self.held_out,
            "trained": self.trained,
            "unreadable": list(self.unreadable),
            "accuracy": self.accuracy,
            "interval": None if self.interval is None else list(self.interval),
            "classes": [{**asdict(row), "accuracy": row.accuracy} for row in self.by_class],
            "confusion": [list(row) for row in self.confusion],
            "calibration": None if calibration is None else asdict(calibration),
        }
