"""What a program holds, as a document for a person or another program to read."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from pynq_kgrc.analysis.fidelity import Fidelity
from pynq_kgrc.program import ConvTask, Program, Task


class TaskDescription(msgspec.Struct, frozen=True, kw_only=True):
    """One task. Sizes are [C, D, H, W] or [D, H, W]. Fields of convolutions are unset for pools."""

    name: str
    in_: list[int] = msgspec.field(name="in")
    out: list[int]
    kernel: list[int]
    stride: list[int]
    mode: str
    """Of a convolution: dense, KGR, KGC or KGRC. Of a pool: max pool or average pool."""
    kept_rows: int | UnsetType = UNSET
    kept_columns: int | UnsetType = UNSET
    """Rows and columns that every kernel group of the layer keeps."""
    macs_dense: int | UnsetType = UNSET
    macs_kept: int | UnsetType = UNSET
    """Multiply-accumulates for one clip: of the dense layer, and of its non-zero weights."""
    weight_bytes: int | UnsetType = UNSET
    """Bytes of the compact weights in memory."""
    rides: list[str] | UnsetType = UNSET
    """What is fused into the convolution: shortcut, pool."""


class ClipSize(msgspec.Struct, frozen=True):
    """Frames, and pixels of a frame."""

    frames: int
    height: int
    width: int


class FidelityDescription(msgspec.Struct, frozen=True):
    """How close the program is to its float network on some clips (`fidelity.Fidelity`)."""

    clips: int
    agreeing: int
    """Clips on which both name the same first label."""
    snr_db: dict[str, float]
    """Signal to noise by the name of the task."""


class ProgramDescription(msgspec.Struct, frozen=True, kw_only=True):
    """A program: sizes in bytes, operations in multiply-accumulates for one clip."""

    name: str
    format_version: int
    accelerator: str
    accelerator_digest: str
    bits: int
    clip: ClipSize
    classes: int
    """Number of its labels."""
    activation_peak_bytes: int
    weight_bytes: int
    macs_dense: int
    macs_kept: int
    tasks: list[TaskDescription]
    fidelity: FidelityDescription | UnsetType = UNSET
    path: str | UnsetType = UNSET
    """The file that it was written to."""


def describe(program: Program) -> ProgramDescription:
    """Describe a program and its tasks."""
    clip = program.clip
    convolutions = [task for task in program.tasks if isinstance(task, ConvTask)]
    return ProgramDescription(
        name=program.name,
        format_version=program.version,
        accelerator=program.config.name,
        accelerator_digest=program.config.digest,
        bits=program.config.bits,
        clip=ClipSize(clip.frames, clip.height, clip.width),
        classes=len(program.labels),
        activation_peak_bytes=program.arena_bytes,
        weight_bytes=sum(map(program.weight_bytes, convolutions)),
        macs_dense=sum(task.shape.macs for task in convolutions),
        macs_kept=sum(task.kept_macs for task in convolutions),
        tasks=[_describe_task(program, task) for task in program.tasks],
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
        macs_dense=task.shape.macs,
        macs_kept=task.kept_macs,
        weight_bytes=program.weight_bytes(task),
        rides=[part for part in ("shortcut", "pool") if getattr(task, part) is not None],
    )


def describe_fidelity(report: Fidelity) -> FidelityDescription:
    """The document of a fidelity report, signal to noise rounded to 0.1 dB."""
    snr_db = {task.task: round(task.snr_db, 1) for task in report.tasks}
    return FidelityDescription(report.clips, report.agreeing, snr_db)
