"""Export a Graph as an fp32 ONNX file, for the other engines of the benchmark.

Batch norm is folded in the Graph already. A layer whose kernel is its whole map becomes Gemm, as
exporters write a fully connected layer.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pynq_kgrc.graph import (
    ACTIVATIONS,
    ADD,
    AVERAGE_POOL,
    CONCAT,
    CONV,
    INPUT,
    MAX_POOL,
    Graph,
    Layer,
)

OPSET, IR_VERSION = 17, 8


class Exporter:
    """Collects the nodes of a graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.flat: set[str] = set()
        """Tensors that are [1, C] instead of [1, C, 1, 1, 1]."""

    def constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def as_map(self, layer: str, channels: int) -> str:
        """The output of `layer`, reshaped to five dimensions if it is flat."""
        if layer not in self.flat:
            return layer
        shape = self.constant(
            f"{layer}/map_shape_{len(self.nodes)}", np.array([1, channels, 1, 1, 1])
        )
        return self.node("Reshape", [layer, shape], f"{layer}/map_{len(self.nodes)}")

    def add(self, layer: Layer, graph: Graph) -> None:
        """Add the nodes of one layer; its activation is a separate node."""
        plain = layer.activation == "none"
        output = layer.name if plain else f"{layer.name}/linear"
        if layer.op == CONV and _is_fully_connected(layer):
            self._gemm(layer, output)
        else:
            sources = [self.as_map(name, graph[name].channels) for name in layer.inputs]
            self._map_operator(layer, sources, output)
        if layer.activation == "relu":
            self.node("Relu", [output], layer.name)
        elif not plain:
            low, high = ACTIVATIONS[layer.activation]
            ends = [
                "" if end is None else self.constant(f"{layer.name}/{end:g}", np.float32(end))
                for end in (low, high)  # ONNX omits an optional input by an empty name
            ]
            self.node("Clip", [output, *ends], layer.name)

    def _gemm(self, layer: Layer, output: str) -> None:
        assert layer.weight is not None and layer.bias is not None
        (source,) = layer.inputs
        if source not in self.flat:
            source = self.node("Flatten", [source], f"{layer.name}/flat", axis=1)
        weight = layer.weight.reshape(layer.weight.shape[0], -1).astype(np.float32)
        inputs = [
            source,
            self.constant(f"{layer.name}/weight", weight),
            self.constant(f"{layer.name}/bias", layer.bias.astype(np.float32)),
        ]
        self.node("Gemm", inputs, output, transB=1)
        self.flat.add(layer.name)

    def _map_operator(self, layer: Layer, sources: list[str], output: str) -> None:
        if layer.op == ADD:
            self.node("Add", sources, output)
            return
        if layer.op == CONCAT:
            self.node("Concat", sources, output, axis=1)
            return
        shape = layer.shape
        assert shape is not None
        window: dict[str, object] = {
            "kernel_shape": list(shape.kernel),
            "strides": list(shape.stride),
            "pads": [*shape.pad_before, *shape.pad_after],
        }
        if layer.op == MAX_POOL:
            self.node("MaxPool", sources, output, **window)
        elif layer.op == AVERAGE_POOL and shape.kernel == shape.in_size and not _padded(layer):
            self.node("GlobalAveragePool", sources, output)
        elif layer.op == AVERAGE_POOL:
            self.node("AveragePool", sources, output, count_include_pad=1, **window)
        else:
            assert layer.weight is not None and layer.bias is not None
            sources = [
                *sources,
                self.constant(f"{layer.name}/weight", layer.weight.astype(np.float32)),
                self.constant(f"{layer.name}/bias", layer.bias.astype(np.float32)),
            ]
            self.node("Conv", sources, output, **window)


def _padded(layer: Layer) -> bool:
    return layer.shape is not None and any(layer.shape.pad_before + layer.shape.pad_after)


def _is_fully_connected(layer: Layer) -> bool:
    return (
        layer.shape is not None and layer.shape.kernel == layer.shape.in_size and not _padded(layer)
    )


def export(graph: Graph, path: Path) -> None:
    """Write the float network beside `path`, then rename it into place."""
    exporter = Exporter()
    first = graph.layers[0]
    for layer in graph.layers:
        if layer.op != INPUT:
            exporter.add(layer, graph)
    shape = [1, first.channels, *first.size]
    clip = helper.make_tensor_value_info(first.name, TensorProto.FLOAT, shape)
    output = helper.make_tensor_value_info(graph.output, TensorProto.FLOAT, None)
    made = helper.make_graph(
        exporter.nodes, graph.name, [clip], [output], initializer=exporter.constants
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(made, opset_imports=opset, ir_version=IR_VERSION)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        onnx.save(model, beside)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
