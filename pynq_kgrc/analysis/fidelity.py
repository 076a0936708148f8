"""How close a program is to the float network it came from, measured on clips."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pynq_kgrc.graph import Graph, Layer, run_float
from pynq_kgrc.program import ConvTask, Program, Task
from pynq_kgrc.quant import Array
from pynq_kgrc.runtime import Session


@dataclass(frozen=True)
class TaskFidelity:
    """How one task's output compares with the float tensor it stands for."""

    task: str
    bits: int
    snr_db: float
    """10 log10 of the power of the float tensor over that of the difference, over all clips."""


@dataclass(frozen=True)
class Fidelity:
    """The report of `measure_fidelity`."""

    tasks: tuple[TaskFidelity, ...]
    clips: int
    agreeing: int
    """Clips on which both name the same first label."""


def measure_fidelity(graph: Graph, program: Program, clips: Iterable[Array]) -> Fidelity:
    """Run clips through the float graph and the program, and compare task by task.

    Args:
        graph: the float graph that `program` was compiled from.
        program: what to judge; it runs on the emulation.
        clips: uint8 frames [D, H, W, 3].
    """
    wanted = {task.name: written_tensor(graph, task) for task in program.tasks}
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    count = agreeing = 0
    with Session(program) as session:
        for frames in clips:
            floats: dict[str, Array] = {}
            keep = set(wanted.values())

            def watch(layer: Layer, values: Array, floats: dict[str, Array] = floats) -> None:
                if layer.name in keep:  # noqa: B023
                    floats[layer.name] = values

            result = run_float(graph, program.clip.normalise(frames), watch)
            for task, (name, codes, _) in zip(program.tasks, session.trace(frames), strict=True):
                tensor = floats.get(wanted[name] or "")
                if tensor is None:
                    continue
                error = task.out.dequantize(codes) - tensor
                signal[name] = signal.get(name, 0.0) + float(np.square(tensor, dtype=float).sum())
                noise[name] = noise.get(name, 0.0) + float(np.square(error).sum())
            count += 1
            agreeing += int(np.argmax(result) == np.argmax(codes))
    tasks = tuple(
        TaskFidelity(
            task.name,
            task.out.bits,
            10 * np.log10(max(signal[task.name], 1e-30) / max(noise[task.name], 1e-30)),
        )
        for task in program.tasks
        if task.name in signal
    )
    return Fidelity(tasks, count, agreeing)


def written_tensor(graph: Graph, task: Task) -> str | None:
    """The graph's tensor that a task writes: its own, or that of what rides on it."""
    names = {layer.name for layer in graph.layers}
    if task.name not in names:
        return None  # a copy that the compiler put in
    name = task.name
    if isinstance(task, ConvTask):
        riders = int(task.shortcut is not None and graph[name].op != "add")
        riders += int(task.pool is not None)
        for _ in range(riders):
            (reader,) = graph.consumers(name)
            name = reader.name
    return name
