"""The document of a program as structs. It imports no program, so that a client can decode it."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from pynq_kgrc.graph import ClipSpec


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
    macs_array: int | UnsetType = UNSET
    """Multiply-accumulates for one clip: of the layer before pruning, as torch counts them (a
    depthwise layer has one channel per filter); of its non-zero weights; and what the array
    computes, zeros in kernel groups included."""
    weight_bytes: int | UnsetType = UNSET
    """Bytes of the compact weights in memory."""
    rides: list[str] | UnsetType = UNSET
    """What is fused into the convolution: shortcut, pool."""


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
    clip: ClipSpec
    """The clip that it takes, and how a video is sampled for it."""
    classes: int
    """Number of its labels."""
    activation_peak_bytes: int
    weight_bytes: int
    macs_dense: int
    macs_kept: int
    tasks: tuple[TaskDescription, ...]
    macs_array: int | UnsetType = UNSET
    folded: list[int] | UnsetType = UNSET
    """Taps of the first convolution along depth, height and width that the host writes as channels
    of the clip; unset if it writes the clip as it is."""
    softmax: bool | UnsetType = UNSET
    """True if the network ended with a soft-max, which the runtime applies instead; else unset."""
    fidelity: FidelityDescription | UnsetType = UNSET
    path: str | UnsetType = UNSET
    """The file that it was written to."""
