"""Describes a program: a document for a person or another program to read."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from pynq_kgrc.analysis.documents import (
    FidelityDescription,
    ProgramDescription,
    TaskDescription,
)
from pynq_kgrc.analysis.fidelity import Fidelity
from pynq_kgrc.program import ConvTask, Program, Task


def describe(program: Program) -> ProgramDescription:
    """Describe a program and its tasks."""
    convolutions = [task for task in program.tasks if isinstance(task, ConvTask)]
    return ProgramDescription(
        name=program.name,
        format_version=program.version,
        accelerator=program.config.name,
        accelerator_digest=program.config.digest,
        bits=program.config.bits,
        clip=program.clip,
        classes=len(program.labels),
        activation_peak_bytes=program.arena_bytes,
        weight_bytes=sum(map(program.weight_bytes, convolutions)),
        macs_dense=sum(task.shape.own_macs for task in convolutions),
        macs_kept=sum(task.kept_macs for task in convolutions),
        macs_array=sum(map(program.array_macs, convolutions)),
        tasks=tuple(_describe_task(program, task) for task in program.tasks),
        folded=UNSET if program.fold is None else list(program.fold.kernel),
        softmax=True if program.softmax else UNSET,
    )


def _describe_task(program: Program, task: Task) -> TaskDescription:
    shape = task.shape
    pool = TaskDescription(
        name=task.name,
        in_=[shape.channels, *shape.in_size],
        out=[shape.out_channels, *task.out_size],
        kernel=list(shape.kernel),
        stride=list(shape.stride),
        mode="max pool",
    )
    if not isinstance(task, ConvTask):
        return msgspec.structs.replace(pool, mode="average pool") if task.average else pool
    kr, kc = task.weights.kept
    return msgspec.structs.replace(
        pool,
        mode=task.weights.mode(program.config.gm, program.group_columns(task)),
        kept_rows=kr,
        kept_columns=kc,
        macs_dense=task.shape.own_macs,
        macs_kept=task.kept_macs,
        macs_array=program.array_macs(task),
        weight_bytes=program.weight_bytes(task),
        rides=[part for part in ("shortcut", "pool") if getattr(task, part) is not None],
    )


def describe_fidelity(report: Fidelity) -> FidelityDescription:
    """The document of a fidelity report, signal to noise rounded to 0.1 dB."""
    snr_db = {task.task: round(task.snr_db, 1) for task in report.tasks}
    return FidelityDescription(report.clips, report.agreeing, snr_db)
