"""The error of a program against the float network that it was compiled from, on some clips."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pynq_kgrc.accelerator.cutting import cut_pools
from pynq_kgrc.graph import ADD, Graph, Layer, run_float
from pynq_kgrc.program import ConvTask, Program, Task
from pynq_kgrc.quant import Array
from pynq_kgrc.runtime import Session


@dataclass(frozen=True)
class TaskFidelity:
    """The quantization error of one task's output."""

    task: str
    bits: int
    snr_db: float
    """Signal to noise: 10 log10 of the float tensor's power over that of the error, all clips."""


@dataclass(frozen=True)
class Fidelity:
    """The result of `measure_fidelity`."""

    tasks: tuple[TaskFidelity, ...]
    clips: int
    agreeing: int
    """Clips on which program and float network have the same most probable class."""


def measure_fidelity(graph: Graph, program: Program, clips: Iterable[Array]) -> Fidelity:
    """Run clips through the float graph and the program, and compare task by task.

    Args:
        graph: the graph that `program` was compiled from; its float weights are used.
        program: runs on the emulation.
        clips: uint8 frames [D, H, W, 3] of each clip.

    Raises:
        ProgramError: frames of another shape or type than `program.clip`.
    """
    graph = cut_pools(graph)  # as the compiler does: a task may write a part of a large pool
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
            10 * math.log10(max(signal[task.name], 1e-30) / max(noise[task.name], 1e-30)),
        )
        for task in program.tasks
        if task.name in signal
    )
    return Fidelity(tasks, count, agreeing)


def written_tensor(graph: Graph, task: Task) -> str | None:
    """The graph's tensor that a task writes: that of the last layer fused into it, or None.

    None: the task is a copy that the compiler inserted.
    """
    names = {layer.name for layer in graph.layers}
    if task.name not in names:
        return None
    name = task.name
    if isinstance(task, ConvTask):
        fused = int(task.shortcut is not None and graph[name].op != ADD)
        fused += int(task.pool is not None)
        for _ in range(fused):
            (reader,) = graph.consumers(name)
            name = reader.name
    return name
