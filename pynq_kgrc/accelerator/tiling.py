"""Geometry of a task on the accelerator: output tiles, their input regions, and memory beats.

hls_src/plan.cpp computes the same numbers in hardware. The cost model and the backends use this
module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from pynq_kgrc.accelerator.boards import CLOCK_MHZ, REFERENCE, Memory
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.plan import Item, plan_convolution, plan_pool
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ConvShape, Size, WindowShape
from pynq_kgrc.quant import Array, ceil_div, packed_bytes

NO_POOL: Size = (1, 1, 1)

MIN_FEATURE_ROWS = 4
"""Fewest trips from one visit of a partial sum to the next: it is read, added to and written."""

REGION_DISTANCE = 4
"""Trips from the last write of a region into the input buffer to its first read, at the least."""

# ---- how far the processes of a task are apart ------------------------------------------------

RUNS_AHEAD = 32
"""Runs that the input ports are ahead of the data at most, empty ones included."""

RUNS_DECIDED = 16
"""Runs of trips that the schedule decides ahead of the array."""

SCHEDULE_CYCLES = 4
"""Cycles in which the schedule decides a run of trips: II of `schedule` in hls_src."""

RUNS_LISTED = 2 * RUNS_AHEAD
"""Runs that are listed and whose data have not come: as many wait in front of a port."""

PIPELINE = 25
"""Cycles to fill a pipelined loop, each time that it is entered. Assumed."""

MAKE_TILE = MAKE_REGION = 60
"""Cycles that describe a tile, and a region, one product after another. Estimated."""

TILE_SETUP = PIPELINE + MAKE_TILE
"""Cycles from one tile of the plan to the next, beside its items."""

# Words that the streams between two processes hold (STREAM pragmas of hls_src/top.cpp).
INPUT_BEATS_AHEAD = 512
ROWS_AHEAD = 64
WEIGHT_BEATS_AHEAD = 512
WEIGHT_WORDS_AHEAD = 4
REGION_WORDS_AHEAD = 16
SUM_WORDS_AHEAD = 64
CODE_WORDS_AHEAD = 64
OUTPUT_BEATS_AHEAD = 512
TILES_AHEAD = 16
ITEMS_AHEAD = 512

PORTS = 2
"""Ports of the input, and of the weights."""


def request_cycles(memory: Memory, beats: float, beat: float, under_way: float = math.inf) -> float:
    """Cycles of a port for each of many requests of `beats`, `beat` cycles each.

    A port has `outstanding` bursts under way, so that short ones wait for their responses;
    `under_way` is how many requests the process behind it has made at a time, if fewer.
    """
    bursts = math.ceil(beats / memory.burst_beats)
    length = beats / bursts * beat
    at_once = min(memory.outstanding, under_way * bursts)
    return bursts * max(length, (memory.latency + length) / at_once, 1.0)


def requests_ahead(requests: int, runs: int) -> float:
    """Requests that each input port has under way, of a region of `requests` in `runs` runs.

    A port takes RUNS_AHEAD runs from its list before it waits for beats (`read_runs` in
    hls_src/memory.cpp decides it two runs earlier). The runs of the other port, and those in the
    padding, are empty ones in the list.
    """
    return (RUNS_AHEAD - 2) * requests / (PORTS * runs)


def plane_cycles(rows: float, request: float, beat: float) -> float:
    """Cycles of the input ports for each of many planes of `rows` requests.

    The ports take turns by planes: while one is read, the other is ahead as far as streams allow.
    """
    plane = rows * request
    return max(plane / PORTS, plane - min(INPUT_BEATS_AHEAD * beat, ROWS_AHEAD * request))


def scale_cycles(config: AcceleratorConfig, words: int) -> int:
    """Cycles that scale a vector of `words` words, while the scales of the next are read."""
    return max(words, 2 * config.tn)


@dataclass(frozen=True)
class Work:
    """A task as the array executes it: its window, its output tile, its plan."""

    shape: WindowShape
    out_size: Size
    """Outputs that are computed; outputs that a fused pool drops are not."""
    pool: Size
    """Window of the pool that is fused into the task, or `NO_POOL`."""
    tile: Size
    """T_D, T_H, T_W of this task, before a fused pool."""
    weight_words: int
    """Weight words of an item: tap tiles x column steps x row steps; of a pool, its taps."""
    items: tuple[Item, ...]
    """The plan of one output tile (`plan.plan_convolution`)."""
    columns: int
    """Columns in a weight word, P_K at most; 0 for a pool."""
    shortcut: bool = False
    """Whether another map is added to the result."""
    wide: bool = False
    """Whether the output has 16 bits on a design of 8 or 4 bits."""

    @property
    def chunks(self) -> int:
        """Chunks of weights of one output tile; a chunk is one group's share of a weight word."""
        if not self.columns:
            return 0
        return sum(item.mask.bit_count() for item in self.items) * self.weight_words

    def chunk_beats(self, config: AcceleratorConfig) -> int:
        """Beats of the weight port for a chunk of rows x columns x T_N codes."""
        return chunk_beats(config, self.columns)


def convolution_work(
    config: AcceleratorConfig,
    shape: ConvShape,
    kr: int,
    kc: int,
    enabled: Array,
    pool: Size = NO_POOL,
    *,
    shortcut: bool = False,
    wide: bool = False,
    name: str = "layer",
) -> Work:
    """How the array executes a convolution whose groups keep `kr` rows and `kc` columns a tap tile.

    `enabled` is bool [P, Q], False for kernel groups without weights; `pool` is the window of a
    pool that is fused into the convolution; `name` is the layer's, for the error message.

    Raises:
        CompileError: the buffers do not hold the smallest tile.
    """
    words = conv_words(config, shape, kr, kc)
    columns = min(config.pk, kc)
    return Work(
        shape=shape,
        out_size=pooled_size(shape, pool),
        pool=pool,
        tile=tile_size(config, shape, pool, words, columns, shortcut, wide, name),
        weight_words=words,
        items=tuple(plan_convolution(config, enabled, shape.filters)),
        columns=columns,
        shortcut=shortcut,
        wide=wide,
    )


def pool_work(
    config: AcceleratorConfig, shape: WindowShape, *, wide: bool = False, name: str = "layer"
) -> Work:
    """How the array executes a pool that is a task of its own.

    Raises:
        CompileError: the buffers do not hold the smallest tile.
    """
    return Work(
        shape=shape,
        out_size=shape.out_size,
        pool=NO_POOL,
        tile=tile_size(config, shape, NO_POOL, shape.taps, wide=wide, what=name),
        weight_words=shape.taps,
        items=tuple(plan_pool(config, shape.channels)),
        columns=0,
        wide=wide,
    )


def chunk_beats(config: AcceleratorConfig, columns: int) -> int:
    """Beats of the weight port for a chunk of that many columns."""
    bits = config.rows_per_cycle * columns * config.tn * config.bits
    return ceil_div(bits, 64 * config.weight_port_words)


def beats_of_row(config: AcceleratorConfig, width: int) -> int:
    """Beats of a row of a map; a row is padded to whole beats."""
    return ceil_div(width, config.port_positions)


def map_beats(config: AcceleratorConfig, channels: int, size: Size) -> int:
    """Beats of a map `[channels / T_N][D][H][W / B][B][T_N]`."""
    return ceil_div(channels, config.tn) * size[0] * size[1] * beats_of_row(config, size[2])


def conv_words(config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int) -> int:
    """Weight words of an item: tap tiles x column steps x row steps (KGRC paper, eq. 16)."""
    tap_tiles = ceil_div(shape.taps, config.group_size.columns(shape.taps))
    return tap_tiles * ceil_div(kc, config.pk) * ceil_div(kr, config.rows_per_cycle)


def weight_bytes(
    config: AcceleratorConfig, shape: ConvShape, kr: int, kc: int, enabled: int
) -> int:
    """Bytes of a layer's kept weights, indices and group-enable bits, without padding.

    An index takes a byte and is stored only where rows (columns) were pruned; each group has one
    enable bit. `enabled` is the number of enabled groups among all P x Q.
    """
    p, q, t = config.group_size.counts(shape.filters, shape.channels, shape.taps)
    gk = config.group_size.columns(shape.taps)
    values = packed_bytes(enabled * t * kr * config.tn * kc, config.bits)
    row_indices = enabled * kr if kr < config.gm else 0
    col_indices = enabled * t * kc if kc < gk else 0
    return values + row_indices + col_indices + ceil_div(p * q, 8)


# ---- tiles ----------------------------------------------------------------------------------


def pooled_size(shape: WindowShape, pool: Size) -> Size:
    """Outputs that are computed before a fused pool: whole windows of the pool only."""
    d, h, w = (o // p * p for o, p in zip(shape.out_size, pool, strict=True))
    return d, h, w


@lru_cache(maxsize=4096)
def tile_size(
    config: AcceleratorConfig,
    shape: WindowShape,
    pool: Size = NO_POOL,
    words: int = 1,
    columns: int = 0,
    shortcut: bool = False,
    wide: bool = False,
    what: str = "layer",
) -> Size:
    """T_D, T_H, T_W of a layer: the tile with the fewest cycles among those that fit the buffers.

    The cycles are an estimate with the memory `boards.REFERENCE` (`_tile_cycles`), whatever the
    board: a program has the same tiles everywhere. The tile's width is the map's, or a multiple of
    a beat's positions. Each axis holds whole windows of a fused pool.

    Args:
        config: the design.
        shape: of the layer.
        pool: window of a fused pool.
        words: weight words of an item.
        columns: in a weight word; 0 for a pool.
        shortcut: whether another map is added to the result.
        wide: whether the output has 16 bits on a design of fewer.
        what: names the layer in the error message.

    Raises:
        CompileError: not even the smallest tile fits.
    """
    out = pooled_size(shape, pool)
    step = (pool[0], pool[1], pool[2] * config.port_positions)
    depths, heights, widths = (_tile_lengths(out[axis], step[axis]) for axis in range(3))
    best, fewest = None, math.inf
    for tile in product(depths, heights, widths):
        if math.prod(tile) > config.features:
            continue
        if region_footprint(config, shape, tile) > config.input_positions:
            continue
        cycles = sum(
            count * _tile_cycles(config, shape, pool, words, columns, shortcut, wide, extent)
            for count, extent in _count_extents(out, tile)
        )
        if cycles < fewest:
            best, fewest = tile, cycles
    if best is None:
        least = (min(out[0], step[0]), min(out[1], step[1]), min(out[2], step[2]))
        raise CompileError(
            f"{what}: its smallest tile {least} with kernel {shape.kernel} and stride "
            f"{shape.stride} needs {region_footprint(config, shape, least)} input positions and "
            f"{math.prod(least)} sums; {config.name} holds {config.input_positions} and "
            f"{config.features}"
        )
    return best


def _tile_cycles(
    config: AcceleratorConfig,
    shape: WindowShape,
    pool: Size,
    words: int,
    columns: int,
    shortcut: bool,
    wide: bool,
    extent: Size,
) -> float:
    """About the cycles of a tile, all kernel groups enabled: what `latency` walks, in closed form.

    The block of filter tiles whose sums are held together takes as long as the slowest of the array
    with what it waits for, the input, the weights and the output.
    """
    memory, out = REFERENCE, pooled_size(shape, pool)
    beat = config.beat_bytes / memory.port_bytes(CLOCK_MHZ)
    channel_tiles = ceil_div(shape.channels, config.tn)
    regions, blocks = 1, channel_tiles
    held = vectors = 1.0
    if isinstance(shape, ConvShape):
        filter_tiles = ceil_div(shape.filters, config.tm)
        regions, blocks = channel_tiles, ceil_div(filter_tiles, config.filter_tiles)
        # the last block may hold fewer: their mean
        held = filter_tiles / blocks
        vectors = ceil_div(shape.filters, config.tn) / blocks
    sums = max(MIN_FEATURE_ROWS, ceil_div(math.prod(extent), config.pf))
    array = regions * held * words * sums
    chunks = regions * held * words * config.groups_per_tile
    of_beat = max(1.0, 8 * config.weight_port_words / memory.port_bytes(CLOCK_MHZ)) / PORTS
    weights = chunks * max(1.0, chunk_beats(config, columns) * of_beat if columns else 1.0)
    # the region, without what lies past the map
    planes, rows = (
        min(len(_row_offsets(shape, axis, extent[axis])), shape.in_size[axis]) for axis in (0, 1)
    )
    limit = beats_of_row(config, shape.in_size[2])
    length = min(len(_beat_range(config, shape, 0, extent[2])), limit)
    requests = 1 if length == limit and shape.kernel[1] >= shape.stride[1] else rows
    ahead = requests_ahead(planes * requests, listed_runs(config, shape, extent, (0, 0, 0)))
    request = request_cycles(memory, rows * length / requests, beat, ahead)
    ports = planes * plane_cycles(requests, request, beat)
    load = region_trips(config, shape, extent, (0, 0, 0)) + PIPELINE
    loads = regions * max(load, ports)
    # the output, which stops the array when its streams are full
    drain = extent[0] * extent[1] * beats_of_row(config, extent[2])
    stored = windows_in(extent, pool)
    beats = (
        stored[0] * stored[1] * beats_of_row(config, stored[2]) * (16 // config.bits if wide else 1)
    )
    writes = map_requests(config, windows_in(out, pool), stored, 1)
    store: float = max(
        drain, writes * request_cycles(memory, beats / writes, beat) if writes else 0
    )
    scale: float = scale_cycles(config, drain)
    room = (CODE_WORDS_AHEAD + OUTPUT_BEATS_AHEAD + memory.burst_beats) * store / drain
    if shortcut:
        reads = map_requests(config, shape.out_size, extent, 1)
        scale = max(scale, reads * request_cycles(memory, drain / reads, beat))
    slowest = max(vectors * scale, vectors * store - room) - SUM_WORDS_AHEAD * scale / drain
    waits = max(0.0, slowest - vectors * drain)
    block = max(array + waits, loads, weights, vectors * max(scale, store))
    # a region that follows the drain of another tile is late
    return max(TILE_SETUP, blocks * block) + PIPELINE


def region_footprint(config: AcceleratorConfig, shape: WindowShape, tile: Size) -> int:
    """Positions of the input buffer that the region of an output tile occupies.

    The region is stored as stride phases: inputs that are a stride apart become neighbours. Rows
    and planes are padded until P_F neighbouring outputs read from P_F different banks
    (make_tile in hls_src/plan.cpp).
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


def _tile_lengths(size: int, step: int) -> list[int]:
    """Tile lengths to try along an axis, longest first: `size`, and shares of it in whole steps."""
    shares = {ceil_div(size, n * step) * step for n in range(1, size + 1)}
    return sorted({size} | {length for length in shares if length < size}, reverse=True)


def _count_extents(out: Size, tile: Size) -> Iterator[tuple[int, Size]]:
    """(count, extent) of the tiles of a map; tiles at the far edges are clipped."""
    per_axis = []
    for size, length in zip(out, tile, strict=True):
        whole, rest = divmod(size, length)
        per_axis.append(
            [(count, extent) for count, extent in ((whole, length), (1, rest)) if count and extent]
        )
    for (a, d), (b, h), (c, w) in product(*per_axis):
        yield a * b * c, (d, h, w)


def tiles(out: Size, tile: Size) -> Iterator[tuple[Size, Size]]:
    """First output and extent of each tile, in the order of the accelerator."""
    starts = [range(0, size, length) for size, length in zip(out, tile, strict=True)]
    for first in product(*starts):
        d, h, w = (min(t, o - f) for t, o, f in zip(tile, out, first, strict=True))
        yield (first[0], first[1], first[2]), (d, h, w)


# ---- regions --------------------------------------------------------------------------------


def region_trips(config: AcceleratorConfig, shape: WindowShape, extent: Size, first: Size) -> int:
    """Trips that write the region of a tile into the input buffer, its zero padding included."""
    rows = len(_row_offsets(shape, 0, extent[0])) * len(_row_offsets(shape, 1, extent[1]))
    beats = len(_beat_range(config, shape, first[2], extent[2]))
    return rows * beats * _trips_per_beat(config, shape)


def region_beats(config: AcceleratorConfig, shape: WindowShape, extent: Size, first: Size) -> int:
    """Beats of the region of a tile that are read from memory: those inside the map."""
    planes, rows, beats = _inside(config, shape, extent, first)
    return planes * rows * beats


def region_requests(
    config: AcceleratorConfig, shape: WindowShape, extent: Size, first: Size
) -> int:
    """Requests by which the region of a tile is read: one for each row inside the map.

    The rows of a plane are one request where they are whole and next to each other.
    """
    planes, rows, beats = _inside(config, shape, extent, first)
    if not rows * beats:
        return 0
    whole = beats == beats_of_row(config, shape.in_size[2])
    return planes if whole and shape.kernel[1] >= shape.stride[1] else planes * rows


def listed_runs(config: AcceleratorConfig, shape: WindowShape, extent: Size, first: Size) -> int:
    """Runs by which the region of a tile is listed for the input ports, padding included."""
    planes, rows = (len(_row_offsets(shape, axis, extent[axis])) for axis in (0, 1))
    beats = _inside(config, shape, extent, first)[2]
    whole = beats == beats_of_row(config, shape.in_size[2])
    return planes if whole and shape.kernel[1] >= shape.stride[1] else planes * rows


def map_requests(config: AcceleratorConfig, size: Size, extent: Size, vectors: int) -> int:
    """Requests by which a tile of `extent` outputs in a map of `size` is read or written.

    One for each row of each of its vectors of T_N channels; fewer where the tile covers whole rows,
    planes or the whole depth of the map, which lie next to each other.
    """
    if not math.prod(extent):
        return 0
    if beats_of_row(config, extent[2]) != beats_of_row(config, size[2]):
        return vectors * extent[0] * extent[1]
    if extent[1] != size[1]:
        return vectors * extent[0]
    return vectors if extent[0] != size[0] else min(vectors, 1)


def windows_in(extent: Size, pool: Size) -> Size:
    """Windows of a fused pool in that many outputs along each axis."""
    d, h, w = (length // window for length, window in zip(extent, pool, strict=True))
    return d, h, w


def _inside(
    config: AcceleratorConfig, shape: WindowShape, extent: Size, first: Size
) -> tuple[int, int, int]:
    """Planes, rows of a plane and beats of a row of a tile's region that lie inside the map."""
    inside = []
    for axis in (0, 1):
        begin = first[axis] * shape.stride[axis] - shape.pad_before[axis]
        offsets = _row_offsets(shape, axis, extent[axis])
        inside.append(sum(0 <= begin + offset < shape.in_size[axis] for offset in offsets))
    limit = beats_of_row(config, shape.in_size[2])
    beats = sum(0 <= beat < limit for beat in _beat_range(config, shape, first[2], extent[2]))
    return inside[0], inside[1], beats


def _row_offsets(shape: WindowShape, axis: int, extent: int) -> list[int]:
    """Input positions along depth or height that `extent` outputs read, from the first on.

    Positions between two windows (kernel smaller than stride) are left out.
    """
    kernel, stride = shape.kernel[axis], shape.stride[axis]
    if kernel < stride:
        return [i * stride + k for i in range(extent) for k in range(kernel)]
    return list(range((extent - 1) * stride + kernel))


def _beat_range(config: AcceleratorConfig, shape: WindowShape, first: int, extent: int) -> range:
    """Beats along the width that `extent` outputs from `first` on read; 0 starts the map's row.

    Beats below 0 or past the end of the row are padding.
    """
    begin = first * shape.stride[2] - shape.pad_before[2]
    end = begin + (extent - 1) * shape.stride[2] + shape.kernel[2] - 1
    return range(begin // config.port_positions, end // config.port_positions + 1)


def _trips_per_beat(config: AcceleratorConfig, shape: WindowShape) -> int:
    """Trips that write one beat into the banks of the input buffer.

    A bank has two ports. With a stride of 3 or more, three positions of a beat can fall
    into one bank, so that a beat is written two positions at a time.
    """
    return ceil_div(config.port_positions, 2) if shape.stride[2] > 2 else 1
