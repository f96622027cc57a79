"""The loop over samples of ``ops.implementations.loop`` as ONNX's ``Scan``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def convolve_in_a_scan(
    x: Any, kernels: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Any:
    """``Scan`` over x [B, I, H, W] and kernels [B, O, I/G, kh, kw], a ``Conv`` for each; for the exporter's table."""
    import onnx_ir as ir
    from onnxscript import opset18 as op

    def value(name: str, like: Any, rank: int) -> Any:
        shape = None if like.shape is None else ir.Shape(like.shape[1:])
        return ir.Value(name=name, shape=shape, type=ir.TensorType(like.dtype or ir.DataType.FLOAT))

    one, kernel = value(f"{x.name}_one", x, 3), value(f"{kernels.name}_one", kernels, 4)
    axis = ir.node("Constant", [], {"value_ints": [0]})
    batch = ir.node("Unsqueeze", [one, axis.outputs[0]])
    options = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    convolution = ir.node("Conv", [batch.outputs[0], kernel], {name: _plain(value) for name, value in options.items()})
    result = ir.node("Squeeze", [convolution.outputs[0], axis.outputs[0]])
    nodes = [axis, batch, convolution, result]
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"{x.name}_scan_{i}"
    body: Any = ir.Graph([one, kernel], result.outputs, nodes=nodes, name=f"{x.name}_scan")
    return op.Scan(x, kernels, body=body, num_scan_inputs=2)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else [int(one) for one in value]
