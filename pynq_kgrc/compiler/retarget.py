"""A program for another design of the same width, from the program alone: no weights, no torch."""

from __future__ import annotations

from msgspec.structs import replace

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.compiler.lower import lay_out
from pynq_kgrc.compiler.pack import pack
from pynq_kgrc.errors import CompileError, KgrcError
from pynq_kgrc.program import ConvTask, Program, Task, check


def retarget(program: Program, config: AcceleratorConfig) -> Program:
    """The program with the same codes in every tensor, for another design.

    The weights are packed again: a design with other kernel groups, or without index logic, keeps
    more zeros. What `lower` chose for the first design stays: a folded clip, fused pools.

    Raises:
        CompileError: the design has another width, or cannot run a task as it is.
    """
    if config.bits != program.config.bits:
        raise CompileError(
            f"{program.name} has codes of {program.config.bits} bits, {config.name} works on "
            f"{config.bits}; quantize and compile the network again"
        )
    tasks = tuple(_packed(program, task, config) for task in program.tasks)
    born = {program.source.buffer: -1}
    dies = {}
    for time, task in enumerate(tasks):
        born.setdefault(task.target.buffer, time)
        reads = [task.source.buffer]
        if isinstance(task, ConvTask) and task.shortcut is not None:
            reads.append(task.shortcut.source.buffer)
        dies.update(dict.fromkeys((*reads, task.target.buffer), time))
    buffers = dict(enumerate(program.buffers))
    offsets, arena_bytes = lay_out(buffers, born, dies, config)
    placed = tuple(replace(buffer, offset=offsets[i]) for i, buffer in buffers.items())
    found = replace(program, config=config, tasks=tasks, buffers=placed, arena_bytes=arena_bytes)
    try:
        check(found)
    except KgrcError as error:
        raise CompileError(f"{program.name} does not fit {config.name}: {error}") from error
    return found


def _packed(program: Program, task: Task, config: AcceleratorConfig) -> Task:
    if not isinstance(task, ConvTask):
        return task
    codes = task.weights.expand(task.shape, program.config.gm, program.group_columns(task))
    return replace(task, weights=pack(codes, config))
