"""INT8 for ONNX Runtime: static, calibrated, every convolution; routers, gates and scales stay float."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from condconv_surgery.errors import SurgeryError, one_line


def quantize_convolutions(path: Path, inputs: Sequence[Tensor]) -> None:
    """Quantise the file in place: int8 kernels, a scale for each filter, int8 activations, as pairs of Q and DQ nodes.

    inputs: images in batches that the file takes, whose activations give the ranges. Kernels must be constants.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter([{"images": x.numpy()} for x in inputs])

        def get_next(self) -> Any:
            return next(self.batches, None)

    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    level = logging.getLogger().level
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # large files belong to the disk of the output
        prepared = Path(folder, "prepared.onnx")
        logging.getLogger().setLevel(logging.ERROR)  # it advises the step that it has just done
        try:
            quant_pre_process(path, prepared, skip_symbolic_shape=True)  # batch norms of plain layers are folded here
            quantize_static(
                prepared,
                path,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
            )
        except OSError:
            raise  # of a disk
        except Exception as error:  # what it raises is no class of its own
            raise SurgeryError(
                f"ONNX Runtime cannot quantise the file: {one_line(error)}", "Nothing was written.", "no quantize="
            ) from error
        finally:
            logging.getLogger().setLevel(level)
    quantized = onnx.load(path)
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, metadata)
    onnx.save(quantized, path)
