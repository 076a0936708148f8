"""An independent oracle: ONNX Runtime computes each task from the same codes as the emulation.

A task becomes a small ONNX model in QDQ form, which computes in reals what the task computes in
integers: DequantizeLinear, Conv or a pool, QuantizeLinear. It shares no arithmetic with this
project. It rounds once, half to even. The accelerator rounds half up, and a shortcut separately.
So codes may differ by one. Whole networks are not compared, because differences grow from layer
to layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from pynq_kgrc.backends.base import open_backend
from pynq_kgrc.program import ConvTask, PoolTask, Program, Task
from pynq_kgrc.quant import Array

OPSET, IR_VERSION = 21, 10
"""The first opset whose QuantizeLinear has 16 bits, and its file format version."""

ELEMENTS = {
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int16): TensorProto.INT16,
    np.dtype(np.float32): TensorProto.FLOAT,
}


@dataclass(frozen=True)
class Agreement:
    """How many codes of one task differ, and by how much."""

    task: str
    elements: int
    differing: int
    worst: int
    """Largest difference of two codes."""

    @property
    def fraction(self) -> float:
        """Fraction of the elements that differ."""
        return self.differing / self.elements


class Model:
    """Collects the nodes of one task; every method returns the name of the new tensor."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.inputs: list[tuple[str, Array]] = []
        self.constants: dict[str, Array] = {}

    def codes(self, name: str, codes: Array, scale: float, zero: int) -> str:
        """Add an input of codes [C, D, H, W]; the tensor of their reals."""
        self.inputs.append((name, codes[None]))
        return self._linear("DequantizeLinear", name, scale, zero, codes.dtype)

    def constant(self, name: str, values: Array) -> str:
        self.constants[name] = values
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        output = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def _linear(
        self, op: str, source: str, scale: Array | float, zero: Array | int, dtype: np.dtype
    ) -> str:
        at = len(self.nodes)
        scales = self.constant(f"scale_{at}", np.asarray(scale, np.float32))
        zeros = self.constant(f"zero_{at}", np.array(zero, dtype))
        return self.node(op, source, scales, zeros, axis=0)

    def weight(self, codes: Array, scale: Array) -> str:
        """Add symmetric weight codes [M, ...] with a scale per filter; their reals."""
        name = self.constant("weight", codes)
        zeros = np.zeros(scale.shape, codes.dtype)
        return self._linear("DequantizeLinear", name, scale, zeros, codes.dtype)

    def run(self, real: str, task: Task) -> Array:
        """Clamp and quantize the tensor `real` as the task does; compute its codes [C, D, H, W]."""
        out = task.out
        low = (task.lo - out.zero_point) * out.scale
        high = (task.hi - out.zero_point) * out.scale
        clamped = self.node(
            "Clip",
            real,
            self.constant("low", np.float32(low)),
            self.constant("high", np.float32(high)),
        )
        if isinstance(task, ConvTask) and task.pool is not None:
            clamped = self.node("MaxPool", clamped, **window(task.pool))
        code = self._linear("QuantizeLinear", clamped, out.scale, out.zero_point, out.dtype)
        (found,) = session(self.proto(code, out.dtype)).run(None, dict(self.inputs))
        codes: Array = found[0]
        return codes

    def proto(self, output: str, dtype: np.dtype) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "task",
            [
                helper.make_tensor_value_info(name, ELEMENTS[value.dtype], value.shape)
                for name, value in self.inputs
            ],
            [helper.make_tensor_value_info(output, ELEMENTS[dtype], None)],
            [numpy_helper.from_array(np.asarray(v), name) for name, v in self.constants.items()],
        )
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)


def session(model: ModelProto) -> ort.InferenceSession:
    """A session without graph optimizations: these use 8-bit kernels, and some saturate."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 2
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def window(shape) -> dict[str, object]:
    """The ONNX attributes of a kernel's or pool's window."""
    return {
        "kernel_shape": list(shape.kernel),
        "strides": list(shape.stride),
        "pads": [*shape.pad_before, *shape.pad_after],
    }


def real_scale(mult: Array | int, shift: Array | int) -> Array:
    """The real factor of a multiplier and its shift."""
    return np.asarray(mult, np.float64) * np.exp2(-np.asarray(shift, np.float64))


def run_task(program: Program, task: Task, source: Array, shortcut: Array | None) -> Array:
    """The task's output codes by ONNX Runtime, from its input codes [C, D, H, W].

    A task stores only the ratio S_x * S_w / S_y, and S_y. For a convolution S_x is set to 1, which
    gives S_w; for a pool the ratio gives S_x.
    """
    model = Model()
    if isinstance(task, PoolTask):
        taps = task.shape.taps if task.average else 1
        scale = float(real_scale(task.mult, task.shift)) * task.out.scale * taps
        real = model.codes("source", source, scale, task.in_zero)
        if task.average:  # we always divide by the size of the whole window
            real = model.node("AveragePool", real, **window(task.shape), count_include_pad=1)
        else:
            real = model.node("MaxPool", real, **window(task.shape))
        return model.run(real, task)
    config, shape = program.config, task.shape
    codes = task.weights.expand(shape, config.gm, program.group_columns(task))
    scale = real_scale(task.mult, task.shift) * task.out.scale
    # the task's bias is for sums of w * x, that of ONNX for sums of w * (x - Z_x)
    bias = (task.bias + task.in_zero * codes.sum(axis=(1, 2), dtype=np.int64)) * scale
    weight = codes.reshape(shape.filters, shape.channels, *shape.kernel)
    real = model.node(
        "Conv",
        model.codes("source", source, 1.0, task.in_zero),
        model.weight(weight, scale),
        model.constant("bias", bias.astype(np.float32)),
        **window(shape),
    )
    if task.shortcut is not None:
        assert shortcut is not None
        r = task.shortcut
        scale = float(real_scale(r.mult, r.shift)) * task.out.scale
        real = model.node("Add", real, model.codes("shortcut", shortcut, scale, r.zero_point))
    return model.run(real, task)


def agreements(
    program: Program, codes: Array, oracle: Program | None = None
) -> Iterator[Agreement]:
    """Emulate a program task by task, compute each task with ONNX Runtime too, and compare.

    Args:
        program: what the emulation runs.
        codes: the input [C, D, H, W].
        oracle: the program that ONNX Runtime computes; another one to test the oracle itself.
    """
    backend = open_backend("emulate", program.config)
    try:
        backend.load(program)
        backend.write(program.source, codes)
        for i, (task, told) in enumerate(
            zip(program.tasks, (oracle or program).tasks, strict=True)
        ):
            # buffers are reused, so the inputs of a task are read right before it runs
            source = backend.read(task.source, task.shape.channels, task.shape.in_size)
            shortcut = None
            if isinstance(task, ConvTask) and task.shortcut is not None:
                size = task.shape.out_size
                shortcut = backend.read(task.shortcut.source, task.shape.filters, size)
            backend.run(i, i + 1)
            ours = backend.read(task.target, task.shape.out_channels, task.out_size)
            theirs = run_task(program, told, source, shortcut)
            assert theirs.shape == ours.shape, (task.name, theirs.shape, ours.shape)
            difference = np.abs(ours.astype(np.int32) - theirs)
            yield Agreement(
                task.name,
                math.prod(ours.shape),
                int(np.count_nonzero(difference)),
                int(difference.max()),
            )
    finally:
        backend.close()
