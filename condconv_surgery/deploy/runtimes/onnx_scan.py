"""Loops over images as ONNX's ``Scan``: of one convolution (``ops.implementations.loop``), or of the whole graph."""

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


def loop_over_images(model: Any) -> None:
    """Make the graph of an ``onnx_ir.Model`` for one image, [1, C, H, W] -> [1, ...], a graph for any number of them.

    Its nodes and constants become the body of a ``Scan``. Names of inputs and outputs stay.
    """
    import onnx_ir as ir

    graph = model.graph
    (given,), results, nodes = list(graph.inputs), list(graph.outputs), list(graph)
    constants = list(graph.initializers.values())
    taken = {value.name for value in [given, *constants, *(out for node in graph.all_nodes() for out in node.outputs)]}
    graph.initializers.clear()
    graph.inputs.clear()
    graph.outputs.clear()
    graph.remove(nodes)

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    def like(value: Any, name: str, *leading: str) -> Any:
        return ir.Value(name=name, shape=ir.Shape([*leading, *value.shape[1:]]), type=value.type)

    one, axis = like(given, free("image")), ir.node("Constant", [], {"value_ints": [0]})
    unsqueeze = ir.node("Unsqueeze", [one, axis.outputs[0]])
    images, outputs = like(given, given.name, "batch"), [like(result, result.name, "batch") for result in results]
    given.replace_all_uses_with(unsqueeze.outputs[0])
    squeezes = [ir.node("Squeeze", [result, axis.outputs[0]]) for result in results]
    axis.outputs[0].name, unsqueeze.outputs[0].name = free("image_axis"), free("batch_of_one")
    for output, result, squeeze in zip(outputs, results, squeezes, strict=True):
        own = squeeze.outputs[0]
        own.name, own.shape, own.type = free(f"{output.name}_one"), ir.Shape(output.shape[1:]), output.type
        result.name = free(f"{output.name}_batch_of_one")  # its name is that of the graph's output now
    body = ir.Graph(
        [one],
        [squeeze.outputs[0] for squeeze in squeezes],
        nodes=[axis, unsqueeze, *nodes, *squeezes],
        initializers=constants,
        name="image",
    )
    graph.append(ir.node("Scan", [images], {"body": body, "num_scan_inputs": 1}, outputs=outputs))
    graph.inputs.append(images)
    graph.outputs.extend(outputs)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else [int(one) for one in value]
