"""A program in the accelerator's memory: descriptors, plans, scales, weights, and feature maps.

The C-simulation and the board read the same bytes (docs/format.md, "In memory").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import FIELDS, KINDS, MAX_TAPS, SCALE_BITS
from pynq_kgrc.accelerator.plan import item_words64, pack_fields
from pynq_kgrc.accelerator.tiling import Work, beats_of_row, map_beats
from pynq_kgrc.backends.base import PackedMap, check_codes, check_design
from pynq_kgrc.errors import ProgramError
from pynq_kgrc.graph import Size
from pynq_kgrc.program import ConvTask, KgrcWeights, PoolTask, Program, Slot, Task
from pynq_kgrc.quant import (
    ACCUMULATOR_BITS,
    Array,
    ceil_div,
    code_dtype,
    pack_int4,
    unpack_int4,
)


@dataclass(frozen=True, eq=False)
class Image:
    """The constant part of the memory, written once before the program runs."""

    weights: Array
    """Compact weights, uint64: of each task the even chunks, then the odd ones, each as its port
    reads them."""
    tables: Array
    """uint64: the descriptors of all tasks, then each task's items, scales and indices."""


def build_image(program: Program) -> Image:
    """Lay out weights and tables of a program.

    Raises:
        ProgramError: the hardware cannot address something: too many taps, a slot that begins
            within a vector, or a number that does not fit its bits. The message names the task.
    """
    config = program.config
    fields = np.zeros((len(program.tasks), len(FIELDS)), np.int64)
    weights: list[Array] = []
    tables: list[Array] = []
    next_weight, next_table = 0, fields.size // 2
    for number, task in enumerate(program.tasks):
        work = program.work(task)
        areas, indices = _chunks(config, task, work)
        try:
            items, scales = item_words64(work.items), _scales(config, task)
        except ProgramError as error:
            raise ProgramError(f"{task.name}: {error}") from error
        descriptor = {
            **_describe(program, task, work),
            "even_weights": next_weight // config.weight_port_words,
            "odd_weights": (next_weight + areas[0].size) // config.weight_port_words,
            "items": next_table,
            "scales": next_table + items.size,
            "indices": next_table + items.size + scales.size,
        }
        fields[number] = [descriptor.get(name, 0) for name in FIELDS]
        weights += areas
        tables += [items, scales, indices]
        next_weight += areas[0].size + areas[1].size
        next_table += items.size + scales.size + indices.size
    for number, field in np.argwhere(np.abs(fields) >= 1 << 31)[:1].tolist():
        raise ProgramError(
            f"{program.tasks[number].name}: {FIELDS[field]}={fields[number, field]} does not fit "
            f"the 32 bits that the accelerator has for it; use less than {1 << 31}"
        )
    halves = fields.astype(np.int32).view(np.uint32).astype(np.uint64)
    descriptors = (halves[:, 0::2] | halves[:, 1::2] << np.uint64(32)).ravel()
    no_weights = np.zeros(config.weight_port_words, np.uint64)
    return Image(np.concatenate([*weights, no_weights]), np.concatenate([descriptors, *tables]))


def slot_beat(program: Program, slot: Slot, what: str) -> int:
    """The address of a slot in the memory of maps, in beats of codes.

    Raises:
        ProgramError: the slot begins within a vector of T_N channels; `what` names it.
    """
    config, buffer = program.config, program.buffers[slot.buffer]
    if slot.channel % config.tn:
        raise ProgramError(
            f"{what}: its slot begins at channel {slot.channel} of a concat; the accelerator "
            f"writes vectors of {config.tn} channels: use a multiple of {config.tn} channels for "
            f"each part"
        )
    wide = buffer.bits // config.bits
    before = map_beats(config, slot.channel, buffer.size) * wide if slot.channel else 0
    return buffer.offset // config.beat_bytes + before


def pack_map(config: AcceleratorConfig, program: Program, slot: Slot, codes: Array) -> PackedMap:
    """`Backend.pack` for a backend whose memory holds maps as the accelerator `config` does."""
    check_design(program, config)
    check_codes(program, slot, codes)
    raw = encode_map(config, codes, program.buffers[slot.buffer].bits)
    return PackedMap(program, slot, slot_beat(program, slot, "write") * config.beat_bytes, raw)


def packed_map(program: Program, slot: Slot, codes: Array | PackedMap) -> PackedMap:
    """What `Backend.write` copies: `codes` if they are packed, else packed now.

    Raises:
        ProgramError: they are packed for another slot or program, or have another type or shape
            than the slot's buffer.
    """
    if not isinstance(codes, PackedMap):
        return pack_map(program.config, program, slot, codes)
    if codes.program is not program or codes.slot != slot:
        raise ProgramError(
            f"the map is packed for {codes.slot} of {codes.program.name}, this is {slot} of "
            f"{program.name}; pack it for the program that is loaded"
        )
    return codes


def encode_map(config: AcceleratorConfig, codes: Array, bits: int) -> Array:
    """Codes [C, D, H, W] as the bytes of a map; the padding of channels and width is zero."""
    channels, depth, height, width = codes.shape
    vectors, row = (
        ceil_div(channels, config.tn),
        beats_of_row(config, width) * config.port_positions,
    )
    # np.empty, and not np.zeros: for a large map numpy then asks Linux for large pages
    beats = np.empty((vectors, depth, height, row, config.tn), code_dtype(bits))
    planar = codes.strides[3] == codes.itemsize
    pixels = codes.transpose(1, 2, 3, 0)
    if not planar:
        pixels = np.ascontiguousarray(pixels)
    for d, vector in np.ndindex(depth, vectors):  # a plane fits the cache
        plane, part = beats[vector, d], pixels[d, ..., vector * config.tn :][..., : config.tn]
        count = part.shape[-1]
        if count < config.tn or width < row:
            plane[...] = 0
        if planar:
            for channel in range(count):
                plane[:, :width, channel] = part[..., channel]
        else:
            # numpy copies a vector as one item much faster than code by code
            item = np.dtype((np.void, count * codes.itemsize))
            first = d * pixels.strides[0] + vector * config.tn * codes.itemsize
            shape = (height, width)
            source: Array = np.ndarray(shape, item, pixels, first, pixels.strides[1:3])
            target: Array = np.ndarray(shape, item, plane, 0, plane.strides[:2])
            target[...] = source
    return _to_bytes(beats, bits)


def decode_map(
    config: AcceleratorConfig, raw: Array, channels: int, size: Size, bits: int
) -> Array:
    """The codes [C, D, H, W] in the bytes of a map."""
    vectors, row = (
        ceil_div(channels, config.tn),
        beats_of_row(config, size[2]) * config.port_positions,
    )
    shape = (vectors, size[0], size[1], row, config.tn)
    codes = unpack_int4(raw, int(np.prod(shape))) if bits == 4 else raw.view(code_dtype(bits))
    split = codes.reshape(shape).transpose(0, 4, 1, 2, 3)
    joined = split.reshape(vectors * config.tn, size[0], size[1], row)
    return joined[:channels, :, :, : size[2]].copy()


def map_bytes(config: AcceleratorConfig, channels: int, size: Size, bits: int) -> int:
    """Bytes of a map with `channels` channels."""
    return map_beats(config, channels, size) * config.beat_bytes * (bits // config.bits)


def _to_bytes(codes: Array, bits: int) -> Array:
    flat = np.ascontiguousarray(codes).ravel()
    return pack_int4(flat) if bits == 4 else flat.view(np.uint8)


def _describe(program: Program, task: Task, work: Work) -> dict[str, int]:
    """The fields of a descriptor, without the addresses of its weights and tables."""
    shape, config = task.shape, program.config
    if shape.taps > MAX_TAPS:
        raise ProgramError(f"{task.name}: {shape.taps} taps; the accelerator has {MAX_TAPS}")
    axes = {
        "in": shape.in_size,
        "out": work.out_size,
        "kernel": shape.kernel,
        "stride": shape.stride,
        "pad": shape.pad_before,
        "tile": work.tile,
        "pool": work.pool,
        "shortcut": shape.out_size,
    }
    fields = {
        f"{name}_{axis}": size
        for name, sizes in axes.items()
        for axis, size in zip("dhw", sizes, strict=True)
    }
    lowest = -(1 << (config.bits - 1))
    kind, fill = "convolution", task.in_zero
    if isinstance(task, PoolTask):
        kind, fill = ("sum_pool", task.in_zero) if task.average else ("max_pool", lowest)
    fields |= {
        "kind": KINDS.index(kind),
        "source": slot_beat(program, task.source, task.name),
        "target": slot_beat(program, task.target, task.name),
        "item_count": len(work.items),
        "regions": sum(item.new_region for item in work.items),
        "vectors": sum(item.vectors for item in work.items),
        "fill": fill,
        "out_zero": task.out.zero_point,
        "low": task.lo,
        "high": task.hi,
        "wide": int(work.wide),
        "tap_tiles": 1,
        "col_steps": 1,
        "row_steps": 1,
    }
    if isinstance(task, ConvTask):
        kr, kc = task.weights.kept
        fields |= {
            "tap_tiles": task.weights.values.shape[2],
            "col_steps": ceil_div(kc, config.pk),
            "row_steps": ceil_div(kr, config.rows_per_cycle),
            "chunks": work.chunks,
            "chunk_beats": work.chunk_beats(config),
        }
        if task.shortcut is not None:
            fields |= {
                "has_shortcut": 1,
                "shortcut": slot_beat(program, task.shortcut.source, task.name),
                "shortcut_zero": task.shortcut.zero_point,
                "shortcut_mult": task.shortcut.mult,
                "shortcut_shift": task.shortcut.shift,
            }
    return fields


def _scales(config: AcceleratorConfig, task: Task) -> Array:
    """The scale of each filter, two 64-bit words: the bias; the multiplier and the shift."""
    if isinstance(task, ConvTask):
        bias, mult, shift = task.bias, task.mult, task.shift
    else:
        # an average subtracts the zero point of each of its codes, a maximum of one
        count = task.shape.taps if task.average else 1
        channels = task.shape.channels
        bias = np.full(channels, -count * task.in_zero, np.int64)
        mult, shift = np.full(channels, task.mult), np.full(channels, task.shift)
    # the accelerator adds a bias to a sum in the width of the accumulator
    limit = 1 << (ACCUMULATOR_BITS[config.bits] - 1)
    outside = bias[(bias >= limit) | (bias < -limit)]
    if outside.size:
        raise ProgramError(
            f"{task.name}: a bias of {outside[0]} does not fit the {ACCUMULATOR_BITS[config.bits]} "
            f"bits of the accumulator; use {-limit} to {limit - 1}"
        )
    words64 = np.zeros((ceil_div(len(bias), config.tn) * config.tn, 2), np.uint64)
    words64[: len(bias), 0] = bias.astype(np.int64).view(np.uint64)
    words64[: len(bias), 1] = pack_fields(SCALE_BITS, {"mult": mult, "shift": shift})
    return words64.ravel()


def _chunks(config: AcceleratorConfig, task: Task, work: Work) -> tuple[tuple[Array, Array], Array]:
    """The weights of the even and of the odd chunks, and the indices of all chunks, uint64.

    Each is in the order in which the array takes it. A chunk is one kernel group's share of a
    weight word: the weights that the array takes of this group in one trip. The two areas of
    weights are equally long; a chunk of zeros that no port reads may end the odd one.
    """
    none = np.zeros(0, np.uint64)
    if not isinstance(task, ConvTask):
        return (none, none), none
    codes, index = _chunk_parts(config, task.weights, work.chunk_beats(config))
    groups = config.groups_per_tile
    chunks: list[Array] = [np.zeros((0, codes.shape[-1]), np.uint64)]
    indices: list[Array] = [none]
    for item in work.items:
        on = [g for g in range(groups) if item.mask >> g & 1]
        if on:
            p = [item.filter_tile * groups + g for g in on]
            # [groups, weight words, ...] -> for each weight word its groups
            chunks.append(codes[p, item.channel_tile].swapaxes(0, 1).reshape(-1, codes.shape[-1]))
            indices.append(index[p, item.channel_tile].swapaxes(0, 1).ravel())
    if sum(map(len, chunks)) % 2:
        chunks.append(np.zeros((1, codes.shape[-1]), np.uint64))
    every = np.concatenate(chunks)
    return (every[0::2].ravel(), every[1::2].ravel()), np.concatenate(indices)


def _chunk_parts(
    config: AcceleratorConfig, weights: KgrcWeights, beats: int
) -> tuple[Array, Array]:
    """The weights [P, Q, W, N] and the indices [P, Q, W, I] of all chunks, uint64.

    W counts the weight words of an item, N and I the 64-bit words of a chunk. The weights of a
    chunk are [P_K columns][rows][T_N]; a chunk with fewer columns is cut to fewer beats. The
    indices of a chunk are one byte for each column (KGC), then one for each row (KGR).
    """
    p, q, t, kr, gn, kc = weights.values.shape
    rows, pk = config.rows_per_cycle, config.pk
    row_steps, col_steps = ceil_div(kr, rows), ceil_div(kc, pk)
    values = np.zeros((p, q, t, row_steps * rows, gn, col_steps * pk), weights.values.dtype)
    values[:, :, :, :kr, :, :kc] = weights.values
    split = values.reshape(p, q, t, row_steps, rows, gn, col_steps, pk)
    ordered = split.transpose(0, 1, 2, 6, 3, 7, 4, 5).reshape(p, q, t * col_steps * row_steps, -1)
    count = beats * config.weight_port_words * 64 // config.bits
    full = np.zeros((*ordered.shape[:3], count), values.dtype)
    full[..., : ordered.shape[3]] = ordered[..., :count]
    chunks = _to_bytes(full, config.bits).view(np.uint64).reshape(*full.shape[:3], -1)
    if not config.sparse:
        return chunks, np.zeros((p, q, chunks.shape[2], 0), np.uint64)
    indices = np.zeros((p, q, t, col_steps, row_steps, config.index_words * 8), np.uint8)
    cols = np.zeros((p, q, t, col_steps * pk), np.uint8)
    cols[..., :kc] = weights.cols
    indices[..., :pk] = cols.reshape(p, q, t, col_steps, 1, pk)
    all_rows = _filled_rows(weights.rows, row_steps * rows, config.gm)
    indices[..., pk : pk + rows] = all_rows.reshape(p, q, 1, 1, row_steps, rows)
    return chunks, indices.reshape(p, q, chunks.shape[2], -1).view(np.uint64)


def _filled_rows(rows: Array, count: int, gm: int) -> Array:
    """Kept rows [P, Q, kr] padded to `count` with rows that are not kept.

    The padding has zero weights. It needs row indices of its own, because two equal ones in a trip
    would add to the same bank of sums.
    """
    kept = np.zeros((*rows.shape[:2], gm), bool)
    np.put_along_axis(kept, rows.astype(np.intp), True, axis=2)
    others = np.argsort(kept, axis=2, kind="stable")[..., : count - rows.shape[2]]
    return np.concatenate([rows, others.astype(np.uint8)], axis=2)
