"""The geometry of a task on the accelerator: output tiles, their input regions, and memory beats.

The hardware (hls_src/plan.cpp) does the same arithmetic; the cost model and the backends read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.plan import Item
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ConvShape, Size, WindowShape
from pynq_kgrc.quant import ceil_div, packed_bytes

NO_POOL: Size = (1, 1, 1)

MIN_FEATURE_ROWS = 4
"""Trips between two visits of a sum, for its read, add and write."""


@dataclass(frozen=True)
class Work:
    """A task as the array sees it: its windows, the tile, and how much there is for each item."""

    shape: WindowShape
    out_size: Size
    """Outputs that are computed; those that a fused pool drops are not."""
    pool: Size
    tile: Size
    words: int
    """Words of weights of an item: tap tiles x column blocks x row blocks; taps of a pool."""
    items: tuple[Item, ...]
    columns: int
    """Columns of weights of a word, P_K at most; 0 of a pool."""
    shortcut: bool = False
    wide: bool = False
    """Whether the output has 16 bits in a design of fewer."""

    @property
    def chunks(self) -> int:
        """Chunks of weights of a pass: a word of one group each."""
        if not self.columns:
            return 0
        return sum(item.mask.bit_count() for item in self.items) * self.words

    def chunk_beats(self, config: AcceleratorConfig) -> int:
        """Beats of a chunk: rows x columns x T_N codes."""
        bits = config.rows_per_cycle * self.columns * config.tn * config.bits
        return ceil_div(bits, 64 * config.weight_port_words)


def beats_of_row(config: AcceleratorConfig, width: int) -> int:
    """Beats of a row of a map, which is filled up to whole ones."""
    return ceil_div(width, config.port_positions)


def map_beats(config: AcceleratorConfig, channels: int, size: Size) -> int:
    """Beats of a map `[channels / T_N][D][H][W / B][B][T_N]`."""
    return ceil_div(channels, config.tn) * size[0] * size[1] * beats_of_row(config, size[2])


def conv_words(config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int) -> int:
    """Words of weights of an item: tap tiles x column blocks x row blocks (eq. 16)."""
    tap_tiles = ceil_div(shape.taps, config.group_size.columns(shape.taps))
    return tap_tiles * ceil_div(kc, config.pk) * ceil_div(kr, config.rows_per_cycle)


def weight_bytes(
    config: AcceleratorConfig, shape: ConvShape, rows: int, cols: int, enabled: int
) -> int:
    """Bytes of a layer's compact weights, indices and block-enable bits, without any filling up.

    An index takes a byte and is stored only where the axis is not dense; a group has one
    enable bit.
    """
    p, q, t = config.group_size.counts(shape.filters, shape.channels, shape.taps)
    gk = config.group_size.columns(shape.taps)
    values = packed_bytes(enabled * t * rows * config.tn * cols, config.bits)
    row_indices = enabled * rows if rows < config.gm else 0
    col_indices = enabled * t * cols if cols < gk else 0
    return values + row_indices + col_indices + -(-p * q // 8)


# ---- tiles ----------------------------------------------------------------------------------


def pooled_size(shape: WindowShape, pool: Size) -> Size:
    """Outputs that are computed: whole windows of a fused pool."""
    d, h, w = (o // p * p for o, p in zip(shape.out_size, pool, strict=True))
    return d, h, w


@lru_cache(maxsize=4096)
def tile_size(
    config: AcceleratorConfig,
    shape: WindowShape,
    pool: Size = NO_POOL,
    words: int = 1,
    what: str = "layer",
) -> Size:
    """T_D, T_H, T_W of a layer: of the tiles that the buffers hold the one with the fewest trips.

    Its width is the map's or a multiple of what a memory port moves at once; each axis holds whole
    windows of a fused pool. `words` is what the array does with one region.

    Raises:
        CompileError: not even one output position fits; `what` names the layer.
    """
    out = pooled_size(shape, pool)
    step = (pool[0], pool[1], pool[2] * config.port_positions)
    depths, heights, widths = (_lengths(out[axis], step[axis]) for axis in range(3))
    best, fewest = None, math.inf
    for tile in product(depths, heights, widths):
        if math.prod(tile) > config.features:
            continue
        if region_footprint(config, shape, tile) > config.input_positions:
            continue
        trips = 0
        for count, extent in _kinds(out, tile):
            rows = max(MIN_FEATURE_ROWS, ceil_div(math.prod(extent), config.pf))
            load = region_words(config, shape, extent, (0, 0, 0))
            trips += count * max(rows * words, load)
        if trips < fewest:
            best, fewest = tile, trips
    if best is None:
        least = (min(out[0], step[0]), min(out[1], step[1]), min(out[2], step[2]))
        raise CompileError(
            f"{what}: its smallest tile {least} with kernel {shape.kernel} and stride "
            f"{shape.stride} needs {region_footprint(config, shape, least)} input positions and "
            f"{math.prod(least)} sums; {config.name} holds {config.input_positions} and "
            f"{config.features}"
        )
    return best


def region_footprint(config: AcceleratorConfig, shape: WindowShape, tile: Size) -> int:
    """Positions of the input buffer that the region of an output tile takes.

    It is cut into phases of the stride; its rows and planes are filled up until P_F neighbouring
    outputs lie in P_F banks (make_tile in hls_src/plan.cpp).
    """
    pf = config.pf
    depth, height, width = (
        ceil_div((tile[i] - 1) * shape.stride[i] + shape.kernel[i], shape.stride[i])
        for i in range(3)
    )
    pitch = width + (tile[2] - width) % pf
    plane = height * pitch
    plane += (tile[1] * tile[2] - plane) % pf
    phases = math.prod(min(k, s) for k, s in zip(shape.kernel, shape.stride, strict=True))
    return phases * depth * plane


def _lengths(size: int, step: int) -> list[int]:
    """Lengths of tiles along an axis: the whole, and multiples of `step` that share it out."""
    shares = {ceil_div(size, n * step) * step for n in range(1, size + 1)}
    return sorted({size} | {length for length in shares if length < size}, reverse=True)


def _kinds(out: Size, tile: Size) -> Iterator[tuple[int, Size]]:
    """How many tiles there are of each extent; those at the far edges are clipped."""
    along = []
    for size, length in zip(out, tile, strict=True):
        whole, rest = divmod(size, length)
        along.append([(n, extent) for n, extent in ((whole, length), (1, rest)) if n and extent])
    for (a, d), (b, h), (c, w) in product(*along):
        yield a * b * c, (d, h, w)


def tiles(out: Size, tile: Size) -> Iterator[tuple[Size, Size]]:
    """First output and extent of each tile, in the order of the accelerator."""
    starts = [range(0, size, length) for size, length in zip(out, tile, strict=True)]
    for first in product(*starts):
        d, h, w = (min(t, o - f) for t, o, f in zip(tile, out, first, strict=True))
        yield (first[0], first[1], first[2]), (d, h, w)


# ---- regions --------------------------------------------------------------------------------


def region_words(config: AcceleratorConfig, shape: WindowShape, extent: Size, first: Size) -> int:
    """Words that fill the region of a tile, padding included."""
    rows = len(_rows(shape, 0, extent[0])) * len(_rows(shape, 1, extent[1]))
    return rows * len(_beats(config, shape, first[2], extent[2])) * _parts(config, shape)


def region_beats(config: AcceleratorConfig, shape: WindowShape, extent: Size, first: Size) -> int:
    """Beats of those words that are read from memory: the ones inside the map."""
    inside = []
    for axis in (0, 1):
        begin = first[axis] * shape.stride[axis] - shape.pad_before[axis]
        rows = _rows(shape, axis, extent[axis])
        inside.append(sum(0 <= begin + row < shape.in_size[axis] for row in rows))
    limit = beats_of_row(config, shape.in_size[2])
    beats = sum(0 <= beat < limit for beat in _beats(config, shape, first[2], extent[2]))
    return inside[0] * inside[1] * beats


def _rows(shape: WindowShape, axis: int, extent: int) -> list[int]:
    """Offsets of the rows of a region along depth or height; some lie between the windows."""
    kernel, stride = shape.kernel[axis], shape.stride[axis]
    if kernel < stride:
        return [i * stride + k for i in range(extent) for k in range(kernel)]
    return list(range((extent - 1) * stride + kernel))


def _beats(config: AcceleratorConfig, shape: WindowShape, first: int, extent: int) -> range:
    """Beats along the width of a region, counted from the start of the map's row."""
    begin = first * shape.stride[2] - shape.pad_before[2]
    end = begin + (extent - 1) * shape.stride[2] + shape.kernel[2] - 1
    return range(begin // config.port_positions, end // config.port_positions + 1)


def _parts(config: AcceleratorConfig, shape: WindowShape) -> int:
    """Words of a beat: with a stride of 3 or more it could meet one bank three times."""
    return ceil_div(config.port_positions, 2) if shape.stride[2] > 2 else 1
