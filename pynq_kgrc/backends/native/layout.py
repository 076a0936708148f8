"""Tasks as the kernels take them: the structures of native.h, and the weights in their order.

An element is 4 bytes: four channels of 8 bits, or two of 16. A step multiplies one element of the
padded input with the weights of some rows (filters of a block of 8). Steps exist for kept rows and
columns of enabled groups only. Their indices become offsets in elements here, once.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from pynq_kgrc.accelerator.tiling import NO_POOL
from pynq_kgrc.backends.native.library import Instructions
from pynq_kgrc.errors import ProgramError
from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.program import ConvTask, PoolTask, Program, Slot, check_accumulator
from pynq_kgrc.quant import Array, ceil_div, code_dtype

BLOCK, QUAD = 8, 4
VECTORS_MAX = 8
DOT_BYTES = 256
"""The operands of a fully connected layer are padded to a multiple of this many bytes."""

INPUT_BYTES = 192 << 10
"""Bytes of padded input that a job reads again for each block of filters; they fit a L2 cache."""

GATHERED_TAPS, GATHERED_WIDTH = 9, 16
GATHERED_ROWS, GATHERED_BYTES = 1200, 400 << 10
"""Most rows of elements that are gathered for a region, and about the bytes of all."""

JOBS_PER_THREAD = 4
"""Jobs of a convolution for each thread, if it can be cut so: the last ones end about together."""

SET_ROWS = 4
"""Rows of a set that the kernels have code for (FOUR_OF_EIGHT in native.h)."""

SET_STEPS = 1000
"""With fewer steps to a call than this, sets of rows are added."""

Three = ctypes.c_int32 * 3


class _Scaling(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bias", "mult", "shift")),
        *((name, ctypes.c_int32) for name in ("zero", "lo", "hi", "has_shortcut")),
        *((f"shortcut_{name}", ctypes.c_int32) for name in ("zero", "mult", "shift")),
        ("out_bytes", ctypes.c_int32),
    )


class _Padded(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("source", "elements")),
        *((name, ctypes.c_int32) for name in ("code_bytes", "pairs", "quads", "padding")),
        *((name, Three) for name in ("size", "stride", "lead", "length")),
        ("tail", ctypes.c_int64),
    )


class Convolution(ctypes.Structure):
    """`struct convolution` of native.h."""

    _fields_ = (
        ("input", _Padded),
        ("scaling", _Scaling),
        *((name, ctypes.c_void_p) for name in ("target", "shortcut")),
        *((name, ctypes.c_int32) for name in ("filters", "blocks", "blocks_per_job")),
        *((name, Three) for name in ("out", "pool", "whole")),
        *((name, ctypes.c_int32) for name in ("region_rows", "tile", "long_sums", "height")),
        *((name, ctypes.c_int32) for name in ("gathered", "gather_pitch")),
        ("gather", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("block_calls", "call_steps", "call_weights")),
        *((name, ctypes.c_void_p) for name in ("call_rows", "call_sets", "offsets", "weights")),
    )


class Connected(ctypes.Structure):
    """`struct connected` of native.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("source", "operand")),
        ("scaling", _Scaling),
        *((name, ctypes.c_void_p) for name in ("target", "shortcut", "weights")),
        *((name, ctypes.c_int64) for name in ("count", "length")),
        *((name, ctypes.c_int32) for name in ("filters", "code_bytes")),
    )


class Pool(ctypes.Structure):
    """`struct pool` of native.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("source", "target")),
        *((name, ctypes.c_int32) for name in ("quads", "code_bytes", "out_bytes", "average")),
        *((name, Three) for name in ("size", "out", "kernel", "stride", "lead")),
        *((name, ctypes.c_int32) for name in ("in_zero", "zero", "lo", "hi")),
        *((name, ctypes.c_int32) for name in ("mult", "shift", "rescales")),
    )


@dataclass
class LaidOut:
    """A task for the kernels; `kept` are the arrays that its structure points to."""

    structure: Convolution | Connected | Pool
    maps: dict[str, Slot]
    """Fields of the structure that point into a map, and the slot."""
    operand_bytes: int = 0
    """Of the workspace for its input."""
    scratch_bytes: int = 0
    """Of each thread."""
    kept: list[Array] = field(default_factory=list)

    def place(self, addresses: dict[Slot, int], operand: int) -> None:
        """Point to the maps, and to the workspace at the address `operand`."""
        for name, slot in self.maps.items():
            if name == "source" and isinstance(self.structure, Convolution):
                self.structure.input.source = addresses[slot]
            else:
                setattr(self.structure, name, addresses[slot])
        if isinstance(self.structure, Convolution):
            self.structure.input.elements = operand
        elif isinstance(self.structure, Connected):
            self.structure.operand = operand


def lay_out(
    program: Program, task: ConvTask | PoolTask, instructions: Instructions, threads: int
) -> LaidOut:
    """A task of a program for one set of vector instructions.

    Raises:
        ProgramError: a filter could overflow the accumulator, or the layer is too large.
    """
    if isinstance(task, PoolTask):
        return _lay_out_pool(program, task)
    check_accumulator(task, program.config)
    shape = task.shape
    whole = shape.kernel == shape.in_size and shape.out_size == (1, 1, 1)
    if whole and not any(shape.pad_before) and task.pool is None:
        return _lay_out_connected(program, task, instructions)
    return _lay_out_convolution(program, task, instructions, threads)


def _code_bytes(bits: int) -> int:
    return code_dtype(bits).itemsize


# ---- convolutions ------------------------------------------------------------------------------


class Axis:
    """How one axis of the input is padded; see `struct padded` of native.h.

    With stride 1 a row's padding behind is the next row's padding in front.
    """

    def __init__(self, shape: ConvShape, axis: int) -> None:
        size, kernel = shape.in_size[axis], shape.kernel[axis]
        self.out, self.stride, before = (
            shape.out_size[axis],
            shape.stride[axis],
            shape.pad_before[axis],
        )
        if self.stride == 1:
            behind = max(0, self.out + kernel - 1 - before - size)
            self.lead = max(before, behind)
            self.length, self.shift = self.lead + size, self.lead - before
        else:
            self.lead, self.shift = before, 0
            self.length = self.out + (kernel - 1) // self.stride
        taps = np.arange(kernel)
        self.phases = taps % self.stride
        """[kernel]: the phase of each tap."""
        self.indices = taps // self.stride + self.shift
        """[kernel]: where it lies in its phase, from an output's index on."""


def _tap_offsets(axes: list[Axis]) -> tuple[Array, int]:
    """int64 [taps]: elements from an output's position to a tap of plane 0; those of a plane."""
    d, h, w = axes
    volume = d.length * h.length * w.length
    phase = (d.phases[:, None, None] * h.stride + h.phases[:, None]) * w.stride + w.phases
    index = (d.indices[:, None, None] * h.length + h.indices[:, None]) * w.length + w.indices
    plane = d.stride * h.stride * w.stride * volume
    return (phase.astype(np.int64) * volume + index).reshape(-1), plane


@dataclass
class _Steps:
    """The calls and steps of all blocks; see `struct convolution` of native.h."""

    block_calls: list[int]
    call_steps: list[int]
    call_weights: list[int]
    call_rows: list[list[int]]
    call_sets: list[int]
    offsets: list[Array]
    weights: list[Array]


def _kept_rows(program: Program, task: ConvTask) -> Array:
    """bool [M, N, K]: whether a weight is in a kept row and column of an enabled group."""
    weights = task.weights
    ones = msgspec.structs.replace(weights, values=np.ones(weights.values.shape, np.int8))
    gk = program.group_columns(task)
    return ones.expand(task.shape, program.config.gm, gk).astype(bool)


def _cut_steps(weight: Array, kept: Array, offsets: Array, vectors: list[int]) -> _Steps:
    """The steps of a layer, block by block.

    Args:
        weight: codes [blocks, 8, planes, channels of an element, K].
        kept: bool of the same shape.
        offsets: int64 [planes, K], of each element from an output's position.
        vectors: for each number of rows, how many vectors of sums fit the registers.
    """
    most = max(rows for rows, count in enumerate(vectors) if count)
    steps = _Steps([0], [0], [], [], [], [], [])
    flat, words = offsets.reshape(-1), 0
    for block, mask in zip(weight, kept, strict=True):
        # bit r of a step: row r is kept there
        bits = (mask.any(axis=2) << np.arange(BLOCK)[:, None, None]).sum(axis=0).reshape(-1)
        bits[~block.any(axis=(0, 2)).reshape(-1)] = 0
        columns = block.transpose(1, 3, 0, 2).reshape(flat.size, BLOCK, -1)
        for value in np.unique(bits[bits > 0]).tolist():
            rows = [r for r in range(BLOCK) if value >> r & 1]
            at = np.flatnonzero(bits == value)
            for part in np.array_split(rows, ceil_div(len(rows), most)):
                steps.call_rows.append([len(part), *part.tolist(), *[0] * (BLOCK - len(part))])
                steps.call_sets.append(sum(1 << r for r in part.tolist()))
                steps.call_weights.append(words)
                steps.call_steps.append(steps.call_steps[-1] + len(at))
                steps.offsets.append(flat[at])
                chosen = np.ascontiguousarray(columns[at][:, part])
                steps.weights.append(chosen.view(np.int32).reshape(-1))
                words += len(steps.weights[-1])
        steps.block_calls.append(len(steps.call_rows))
    return steps


def _lay_out_convolution(
    program: Program, task: ConvTask, instructions: Instructions, threads: int
) -> LaidOut:
    shape, bits = task.shape, program.config.bits
    long = bits == 16
    pairs = long or not instructions.bytes
    vectors = list(instructions.long_vectors if long else instructions.vectors)
    channels = 2 if pairs else 4
    quads, blocks = ceil_div(shape.channels, QUAD), ceil_div(shape.filters, BLOCK)
    planes = quads * QUAD // channels
    axes = [Axis(shape, axis) for axis in range(3)]
    taps, plane = _tap_offsets(axes)
    if planes * plane >= 1 << 31:
        raise ProgramError(
            f"{task.name}: its padded input has {planes * plane} elements; the native backend "
            f"takes less than {1 << 31}"
        )
    weight = task.weights.expand(shape, program.config.gm, program.group_columns(task))
    kept = _kept_rows(program, task)
    cut = (blocks, BLOCK, planes, channels, shape.taps)
    operands = np.zeros(
        (blocks * BLOCK, planes * channels, shape.taps), np.int16 if pairs else np.int8
    )
    operands[: shape.filters, : shape.channels] = weight
    mask = np.zeros(operands.shape, bool)
    mask[: shape.filters, : shape.channels] = kept
    offsets = np.arange(planes)[:, None] * plane + taps
    steps = _cut_steps(operands.reshape(cut), mask.reshape(cut), offsets, vectors)
    made = Convolution()
    gathers = _gathers(task, planes)
    laid = LaidOut(made, {"source": task.source, "target": task.target})
    _set_padded(made.input, task, axes, bits, pairs, quads)
    _set_scaling(laid, made.scaling, task, _bias(task, weight, unsigned=not pairs))
    rows = max((call[0] for call in steps.call_rows), default=1)
    made.filters, made.blocks, made.long_sums = shape.filters, blocks, int(long)
    made.tile = vectors[rows] * instructions.lanes
    if instructions.set_vectors and not long and _adds_sets(steps):
        made.tile = instructions.set_vectors * instructions.lanes
        _point(laid, made, "call_sets", np.asarray(steps.call_sets, np.uint8))
    _set_outputs(made, task, axes, gathers)
    _set_jobs(made, instructions, planes, shape.kernel, threads, gathers)
    joined = _joined(steps.offsets)
    if gathers:
        rows_of, joined = np.unique(joined, return_inverse=True)
        made.gathered, made.height = len(rows_of), shape.out_size[1]
        made.gather_pitch = _vectors(made.region_rows * made.out[2], instructions.lanes)
        _point(laid, made, "gather", rows_of.astype(np.int32))
        joined = joined * made.gather_pitch
    for name, values, dtype in (
        ("block_calls", steps.block_calls, np.int32),
        ("call_steps", steps.call_steps, np.int64),
        ("call_weights", steps.call_weights, np.int64),
        ("call_rows", steps.call_rows, np.uint8),
        ("offsets", joined, np.int32),
        ("weights", _joined(steps.weights), np.int32),
    ):
        _point(laid, made, name, np.asarray(values, dtype))
    laid.operand_bytes = 4 * (planes * plane + made.input.tail + 64)
    positions = made.region_rows * made.input.length[2] + instructions.lanes
    codes = 2 * (BLOCK * made.pool[0] * positions + 128)
    sums = BLOCK * VECTORS_MAX * instructions.lanes * 8
    laid.scratch_bytes = sums + 2 * codes + 2 * (made.out[2] * QUAD * 2 + 128)
    laid.scratch_bytes += 4 * (made.gathered * made.gather_pitch + 64)
    return laid


def _vectors(count: int, lanes: int) -> int:
    """A count rounded up to whole vectors."""
    return ceil_div(count, lanes) * lanes


def _gathers(task: ConvTask, planes: int) -> bool:
    """Whether the elements of a region are gathered: where that was measured to be faster.

    Not for a pool, not if they fit no cache, not for one tap, whose elements are read in order
    anyway, and not for many taps along long rows, where one load from a cache serves several taps.
    """
    taps, width = task.shape.taps, task.shape.out_size[2]
    if task.pool is not None or planes * taps > GATHERED_ROWS:
        return False
    return 1 < taps <= GATHERED_TAPS or width <= GATHERED_WIDTH


def _adds_sets(steps: _Steps) -> bool:
    """Whether sums of all 8 rows in registers are faster: calls of 4 rows, with few steps each."""
    fours = all(call[0] == SET_ROWS for call in steps.call_rows)
    return fours and steps.call_steps[-1] < SET_STEPS * len(steps.call_rows)


def _joined(parts: list[Array]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _bias(task: ConvTask, weight: Array, unsigned: bool) -> Array:
    """int64 [M]: the bias; with unsigned operands, which are 128 larger, less what that adds."""
    sums = weight.sum(axis=(1, 2), dtype=np.int64)
    return task.bias - 128 * sums if unsigned else task.bias


def _set_padded(
    made: _Padded, task: ConvTask, axes: list[Axis], bits: int, pairs: bool, quads: int
) -> None:
    made.code_bytes, made.pairs, made.quads = _code_bytes(bits), int(pairs), quads
    code = np.array([task.in_zero] * 4, np.int64)
    element = code[:2].astype(np.int16) if pairs else (code + 128).astype(np.uint8)
    made.padding = int(element.view(np.int32)[0])
    made.size = Three(*task.shape.in_size)
    made.stride = Three(*task.shape.stride)
    made.lead = Three(*(axis.lead for axis in axes))
    made.length = Three(*(axis.length for axis in axes))
    d, h, w = axes
    made.tail = (d.lead * h.length + h.lead) * w.length + w.lead


def _set_scaling(laid: LaidOut, made: _Scaling, task: ConvTask, bias: Array) -> None:
    whole = ceil_div(task.shape.filters, BLOCK) * BLOCK
    for name, values, dtype in (
        ("bias", bias, np.int64),
        ("mult", task.mult, np.int32),
        ("shift", task.shift, np.int32),
    ):
        padded = np.zeros(whole, dtype)
        padded[: len(values)] = values
        if name == "shift":  # of no filter; it does not keep a quad from being scaled in vectors
            padded[len(values) :] = padded[0]
        _point(laid, made, name, padded)
    made.zero, made.lo, made.hi = task.out.zero_point, task.lo, task.hi
    made.out_bytes = _code_bytes(task.out.bits)
    if task.shortcut is not None:
        made.has_shortcut, made.shortcut_zero = 1, task.shortcut.zero_point
        made.shortcut_mult, made.shortcut_shift = task.shortcut.mult, task.shortcut.shift
        laid.maps["shortcut"] = task.shortcut.source


def _region_rows(rows: int, columns: int, most: int, unit: int) -> int:
    """Rows of a region, at most `most` and at least half of that: so that the fewest positions are
    computed, which come in a `unit`.
    """

    def units(region: int) -> int:
        whole, rest = divmod(rows, region)
        return whole * ceil_div(region * columns, unit) + ceil_div(rest * columns, unit)

    return min(range(most, (most - 1) // 2, -1), key=units)


def _set_outputs(made: Convolution, task: ConvTask, axes: list[Axis], gathers: bool) -> None:
    """The outputs, in whole windows of the pool.

    Without padding along the height, and without a pool, all rows of all depths lie one behind the
    other: they count as rows of one depth. So they do where the input is gathered.
    """
    whole = task.shape.out_size
    pool = NO_POOL if task.pool is None else task.pool.kernel
    if gathers or (pool == NO_POOL and axes[1].length == axes[1].out):
        whole = (1, whole[0] * whole[1], whole[2])
    made.whole, made.pool = Three(*whole), Three(*pool)
    made.out = Three(*(o // p * p for o, p in zip(whole, pool, strict=True)))


def _set_jobs(
    made: Convolution,
    instructions: Instructions,
    planes: int,
    kernel: Size,
    threads: int,
    gathers: bool,
) -> None:
    """Cut the outputs into regions whose input fits a cache, and the filters into parts."""
    if gathers:
        row_bytes = 4 * planes * math.prod(kernel) * made.out[2]
        most = max(1, min(made.out[1], GATHERED_BYTES // row_bytes))
        unit = made.tile if made.call_sets else instructions.lanes
        made.region_rows = _region_rows(made.out[1], made.out[2], most, unit)
    else:
        row_bytes = 4 * planes * made.input.length[2] * (kernel[0] + made.pool[0] - 1)
        rows = max(1, min(made.out[1], INPUT_BYTES // row_bytes))
        rows = ceil_div(made.out[1], ceil_div(made.out[1], rows))
        made.region_rows = ceil_div(rows, made.pool[1]) * made.pool[1]
    regions = made.out[0] // made.pool[0] * ceil_div(made.out[1], made.region_rows)
    parts = 1 if threads == 1 else ceil_div(JOBS_PER_THREAD * threads, max(1, regions))
    made.blocks_per_job = ceil_div(made.blocks, min(parts, made.blocks))


def _point(laid: LaidOut, structure: Any, name: str, values: Array) -> None:
    """Point a field to an array, which is kept alive."""
    array = np.ascontiguousarray(values)
    laid.kept.append(array)
    setattr(structure, name, array.ctypes.data)


# ---- fully connected layers, pools -------------------------------------------------------------


def _lay_out_connected(program: Program, task: ConvTask, instructions: Instructions) -> LaidOut:
    shape, bits = task.shape, program.config.bits
    made = Connected()
    laid = LaidOut(made, {"source": task.source, "target": task.target})
    weight = task.weights.expand(shape, program.config.gm, program.group_columns(task))
    quads = ceil_div(shape.channels, QUAD)
    made.count = quads * QUAD * shape.taps
    made.length = ceil_div(made.count, DOT_BYTES) * DOT_BYTES
    made.filters, made.code_bytes = shape.filters, _code_bytes(bits)
    # [M, N, K] -> [M, quads, K, 4], the order of a map
    padded = np.zeros((shape.filters, quads * QUAD, shape.taps), code_dtype(bits))
    padded[:, : shape.channels] = weight
    rows = padded.reshape(shape.filters, quads, QUAD, shape.taps).transpose(0, 1, 3, 2)
    ordered = np.zeros((shape.filters, made.length), code_dtype(bits))
    ordered[:, : made.count] = rows.reshape(shape.filters, -1)
    _point(laid, made, "weights", ordered)
    unsigned = bool(instructions.bytes) and bits != 16
    _set_scaling(laid, made.scaling, task, _bias(task, weight, unsigned))
    laid.operand_bytes = 2 * made.length
    return laid


def _lay_out_pool(program: Program, task: PoolTask) -> LaidOut:
    shape = task.shape
    made = Pool()
    made.quads, made.average = ceil_div(shape.channels, QUAD), int(task.average)
    made.code_bytes, made.out_bytes = _code_bytes(program.config.bits), _code_bytes(task.out.bits)
    made.size, made.out = Three(*shape.in_size), Three(*shape.out_size)
    made.kernel, made.stride = Three(*shape.kernel), Three(*shape.stride)
    made.lead = Three(*shape.pad_before)
    made.in_zero, made.zero, made.lo, made.hi = task.in_zero, task.out.zero_point, task.lo, task.hi
    made.mult, made.shift = task.mult, task.shift
    same = (task.mult, task.shift) == (1 << 14, 14) and task.in_zero == task.out.zero_point
    made.rescales = int(task.average or not same)
    laid = LaidOut(made, {"source": task.source, "target": task.target})
    plane = shape.in_size[1] * shape.in_size[2]
    span = shape.in_size[2] + sum(pad[2] for pad in (shape.pad_before, shape.pad_after))
    laid.scratch_bytes = (plane + span + 2 * shape.out_size[2]) * QUAD * made.code_bytes
    return laid


def map_shape(channels: int, size: Size) -> tuple[int, ...]:
    """The shape of a map in memory: [quads, D, H, W, 4]."""
    return (ceil_div(channels, QUAD), *size, QUAD)


def map_bytes(channels: int, size: Size, bits: int) -> int:
    """Bytes of a map in memory."""
    return math.prod(map_shape(channels, size)) * _code_bytes(bits)
