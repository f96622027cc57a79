"""What a runtime has to be able to do, and the registry."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from condconv_surgery.deploy.file_proof import FileProof, prove_outputs
from condconv_surgery.errors import InputError, SurgeryError, one_line


@dataclass(frozen=True)
class Request:
    """What to write. images: an example [B, C, H, W]. batch: of the graph, None for any. dynamic_size: also any H, W.

    metadata: what whoever serves the file has to know, as JSON values. in_a_loop: the graph is for one image, in a loop
    over those of any batch; then ``images`` is one, and ``batch`` 1.
    """

    images: Tensor
    batch: int | None
    dynamic_size: bool
    metadata: dict[str, Any] = field(default_factory=dict)
    in_a_loop: bool = False

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...] | None:
        """As ``torch.export.export`` takes them; None where every dimension is fixed."""
        dynamic = torch.export.Dim.DYNAMIC
        dimensions = [*([0] if self.batch is None else []), *([2, 3] if self.dynamic_size else [])]
        return (dict.fromkeys(dimensions, dynamic),) if dimensions else None


class Runtime:
    """Writes a model for one runtime and runs the file there.

    preferred: the forms of a conditional layer (``deploy.forms.graph_forms``) that it takes, best first.
    loops: a graph for one image may stand in a loop over those of any batch.
    fixed_batch: its graph is for one batch, 1 if no other is asked for. fixed_size: and for one size.
    suffix: of its file. suffix_beside: of the file with the weights beside it, if any. extra, packages: of this
    package, and what they install.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    suffix_beside: ClassVar[str] = ""
    extra: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    preferred: ClassVar[tuple[str, ...]]
    fixed_batch: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = False
    loops: ClassVar[bool] = False

    def write(self, model: nn.Module, request: Request, path: Path) -> dict[str, int]:
        """Write ``model`` to ``path``, with further files beside it; returns versions of the format to report."""
        raise NotImplementedError

    def load(self, path: Path, threads: int | None = None) -> Callable[[Tensor], list[Tensor]]:
        """The file in its runtime: gives the outputs for a batch. threads: of the runtime, by default its own choice.

        torch has one number of threads for the whole process, and keeps that.
        """
        raise NotImplementedError

    def run(self, path: Path, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """The outputs of the file for each of ``inputs``, in order."""
        loaded = self.load(path)
        return [loaded(x) for x in inputs]

    def prove(self, model: nn.Module, path: Path, inputs: Sequence[Tensor]) -> FileProof:
        """How far the outputs of the file are from those of ``model``."""
        return prove_outputs(model, self.run(path, inputs), inputs)

    def require_packages(self) -> None:
        """Raise ``InputError`` where a package is missing."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise InputError(
                    f"{self.name} needs a package that is not installed: {error.name}.",
                    f"It takes {', '.join(self.packages)}.",
                    f'pip install "condconv-surgery[{self.extra}]"',
                ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of an exporter, its progress on stdout, and the whole graph that torch prints on failure."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def cannot_export(error: Exception, runtime: str, dynamic_size: bool = False) -> SurgeryError:
    """The error to raise for whatever an exporter raises."""
    if "data-dependent" in f"{error} {error.__cause__}":
        return SurgeryError(
            f"{runtime} cannot take the model: its forward decides by values: {one_line(error.__cause__ or error)}",
            "One graph computes the same operators for all images.",
            "the part of the model before that decision",
        )
    return SurgeryError(
        f"{runtime} cannot take the model: {one_line(error.__cause__ or error)}",
        "torch must trace its forward as one graph, of operators that the runtime has.",
        "dynamic_size=False" if dynamic_size else "collapse, then the exporter of the plain network",
    )
