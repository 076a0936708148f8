"""A quantized ONNX file beside its program: every task is given ONNX Runtime's integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from pynq_kgrc.backends.base import open_backend
from pynq_kgrc.graph import tap_views


@dataclass(frozen=True)
class Compared:
    """How far the codes of one task are from those of the file."""

    task: str
    elements: int
    differing: int
    worst: int


def integers(path, clip):
    """(scale, zero point, codes [1, C, ...]) of every QuantizeLinear of a map."""
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
    return [(scale, zero, codes) for (_, scale, zero, _), codes in zip(wanted, found, strict=True)]


def compare(path, program, frames, rank=5) -> Iterator[Compared]:
    """Run each task whose inputs the file has as integers on those, and compare what it writes."""
    reals = program.clip.normalise(frames)
    known = {}
    for scale, zero, codes in integers(path, reals[None] if rank == 5 else reals[None][:, :, 0]):
        known.setdefault((scale, codes.size), []).append((zero, codes.astype(np.int64).ravel()))
    backend = open_backend("emulate", program.config)
    try:
        backend.load(program)
        clip = program.encode_clip(frames)
        backend.write(program.source, clip)
        given = {program.source} if (program.input.scale, reals.size) in known else set()
        """The slots that hold the file's integers."""
        for number, task in enumerate(program.tasks):
            backend.run(number, number + 1)
            ours = backend.read(task.target, task.shape.out_channels, task.out_size)
            whole = (task.shape.out_channels, *task.shape.out_size)  # before a pool in the task
            theirs = known.get((task.out.scale, math.prod(whole)), [])
            reads = {task.source}
            if getattr(task, "shortcut", None) is not None:
                reads.add(task.shortcut.source)
            given.discard(task.target)
            if not reads <= given:
                continue
            if task.name.endswith(".unfold") or ".copy" in task.name:  # copies codes
                given.add(task.target)
                continue
            if not theirs:
                continue
            moved = [(codes - zero + task.out.zero_point).reshape(whole) for zero, codes in theirs]
            if getattr(task, "pool", None) is not None:
                moved = [np.maximum.reduce(list(tap_views(codes, task.pool))) for codes in moved]
            # a ReLU behind the quantizer is computed in the same task
            moved += [np.maximum(codes, task.out.zero_point) for codes in moved]
            differences = [np.abs(ours - codes) for codes in moved]
            best = min(range(len(moved)), key=lambda i: differences[i].max())
            yield Compared(
                task.name,
                ours.size,
                int(np.count_nonzero(differences[best])),
                int(differences[best].max()),
            )
            backend.write(task.target, moved[best].astype(ours.dtype))
            given.add(task.target)
    finally:
        backend.close()
