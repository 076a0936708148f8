"""A quantized ONNX file beside its program: every task is given ONNX Runtime's integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from pynq_kgrc.backends.base import open_backend


@dataclass(frozen=True)
class Compared:
    """How far the codes of one task are from those of the file."""

    task: str
    elements: int
    differing: int
    worst: int


def integers(path, clip):
    """(scale, zero point, lowest code of the type, codes [C, ...]) of every QuantizeLinear."""
    model = onnx.load(path)
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            held[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    narrowed = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "Clip"}
    wanted = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in held:
            zero = held[node.input[2]]
            name = narrowed.get(node.output[0], node.output[0])
            wanted.append((name, float(held[node.input[1]]), int(zero), zero.dtype))
    for name, *_, kind in wanted:
        if name not in {value.name for value in model.graph.output}:
            element = helper.np_dtype_to_tensor_dtype(kind)
            model.graph.output.append(helper.make_tensor_value_info(name, element, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    ort.set_default_logger_severity(4)
    runtime = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {runtime.get_inputs()[0].name: clip}
    found = runtime.run([name for name, *_ in wanted], feed)
    return [
        (scale, zero, int(np.iinfo(kind).min), codes)
        for (_, scale, zero, kind), codes in zip(wanted, found, strict=True)
    ]


def compare(path, program, frames, rank=5) -> Iterator[Compared]:
    """Run each task on the file's own integers and compare what it writes."""
    reals = program.clip.normalise(frames)
    known = {}
    for scale, zero, _, codes in integers(path, reals[None] if rank == 5 else reals[None][:, :, 0]):
        known.setdefault((scale, codes.size), []).append((zero, codes.astype(np.int64).ravel()))
    backend = open_backend("emulate", program.config)
    try:
        backend.load(program)
        backend.write(program.source, program.encode_clip(frames))
        for number, task in enumerate(program.tasks):
            backend.run(number, number + 1)
            ours = backend.read(task.target, task.shape.out_channels, task.out_size)
            theirs = known.get((task.out.scale, ours.size), [])
            if not theirs or ".copy" in task.name:  # a part of a concat
                continue
            moved = [codes - zero + task.out.zero_point for zero, codes in theirs]
            differences = [np.abs(ours.ravel() - codes) for codes in moved]
            best = min(range(len(moved)), key=lambda i: differences[i].max())
            yield Compared(
                task.name,
                ours.size,
                int(np.count_nonzero(differences[best])),
                int(differences[best].max()),
            )
            backend.write(task.target, moved[best].reshape(ours.shape).astype(ours.dtype))
    finally:
        backend.close()
