"""What a task costs on our accelerator: trips of its pipelined loops, multiply-accumulates, bytes.

The model follows the loops of hls_src: closed forms, and for the array one short walk over the
plan. Memory never stalls in it; `latency` adds memory and gives times. The C-simulation counts the
same trips while it runs and the emulation the same bytes; tests require equality
(host_tests/test_cost.py, test_csim.py). The paper's own model is in `paper.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.plan import Item
from pynq_kgrc.accelerator.tiling import (
    MIN_FEATURE_ROWS,
    NO_POOL,
    REGION_DISTANCE,
    Work,
    beats_of_row,
    convolution_work,
    map_requests,
    region_beats,
    region_requests,
    region_trips,
    tiles,
    windows_in,
)
from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import ceil_div


@dataclass(frozen=True)
class Cost:
    """What a task costs. `array` to `plan` are the trips of one process each."""

    array: int
    input: int
    weights: int
    scale: int
    store: int
    plan: int
    macs: int
    """Multiply-accumulates that the array executes, zeros of padding included."""
    input_beats: int
    shortcut_beats: int
    output_beats: int
    weight_beats: int
    table_words: int
    """64-bit words of the plan's items, of indices and of scale factors."""
    input_requests: int
    """Runs of neighbouring beats that the ports request; bursts of memory may be shorter."""
    shortcut_requests: int
    output_requests: int
    weight_requests: int

    @property
    def bound(self) -> str:
        """The process with the most trips."""
        names = ("array", "input", "weights", "scale", "store", "plan")
        return max(names, key=lambda name: int(getattr(self, name)))

    @property
    def cycles(self) -> int:
        """Trips of the slowest process, as all run at the same time: cycles without memory."""
        return int(getattr(self, self.bound))


def layer_work(
    config: AcceleratorConfig,
    shape: ConvShape,
    kr: int,
    kc: int,
    pool: Size = NO_POOL,
    *,
    shortcut: bool = False,
    wide: bool = False,
) -> Work:
    """How the array executes a convolution with all kernel groups enabled.

    Args:
        config: the design.
        shape: of the convolution, with M filters, N channels, K taps.
        kr: rows that a group keeps, of G_M.
        kc: columns that a group keeps in a tap tile, of G_K = min(K, T_K).
        pool: window of a pool that is fused into the convolution.
        shortcut: whether another map is added to the result.
        wide: whether the output has 16 bits on a design of fewer, as logits have.

    Raises:
        ConfigError: a group cannot keep `kr` x `kc`.
        CompileError: the buffers do not hold the smallest tile.
    """
    config.check_kept(shape.taps, kr, kc)
    p, q, _ = config.group_size.counts(shape.filters, shape.channels, shape.taps)
    enabled = np.ones((p, q), bool)
    return convolution_work(config, shape, kr, kc, enabled, pool, shortcut=shortcut, wide=wide)


def task_cost(config: AcceleratorConfig, work: Work) -> Cost:
    """What a task costs; each number is exactly what the C-simulation counts."""
    shape, items = work.shape, work.items
    regions = sum(item.new_region for item in items)
    vectors = sum(item.vectors for item in items)
    chunks, chunk_beats = work.chunks, work.chunk_beats(config)
    if work.columns:
        # an item without enabled groups takes one trip
        weight_trips = chunks + sum(not item.mask for item in items)
    else:
        # a pool takes one trip per item and tap
        weight_trips = len(items) * work.weight_words
    beats_out = 16 // config.bits if work.wide else 1
    trips = dict.fromkeys(("input", "weights", "scale", "store"), 0)
    macs = input_beats = shortcut_beats = output_beats = tile_count = 0
    input_requests = shortcut_requests = output_requests = 0
    out_map = windows_in(work.out_size, work.pool)
    for first, extent in tiles(work.out_size, work.tile):
        tile_count += 1
        drained = vectors * extent[0] * extent[1] * beats_of_row(config, extent[2])
        # an item without a new region takes one trip
        trips["input"] += regions * region_trips(config, shape, extent, first)
        trips["input"] += len(items) - regions
        trips["weights"] += shape.taps + weight_trips
        trips["scale"] += drained
        trips["store"] += drained * beats_out
        macs += chunks * config.rows_per_cycle * config.pk * config.tn * math.prod(extent)
        input_beats += regions * region_beats(config, shape, extent, first)
        input_requests += regions * region_requests(config, shape, extent, first)
        if work.shortcut:
            shortcut_beats += drained
            shortcut_requests += map_requests(config, shape.out_size, extent, vectors)
        stored = windows_in(extent, work.pool)
        output_requests += map_requests(config, out_map, stored, vectors)
        output_beats += vectors * stored[0] * stored[1] * beats_of_row(config, stored[2])
    tables = len(items) + chunks * config.index_words + 2 * vectors * config.tn
    return Cost(
        array=_array_trips(config, work),
        **trips,
        plan=tile_count * len(items),
        macs=macs,
        input_beats=input_beats,
        shortcut_beats=shortcut_beats,
        output_beats=output_beats * beats_out,
        weight_beats=tile_count * chunks * chunk_beats,
        table_words=tile_count * tables,
        input_requests=input_requests,
        shortcut_requests=shortcut_requests,
        output_requests=output_requests,
        weight_requests=tile_count * min(chunks, 2),  # of two ports
    )


@dataclass(frozen=True)
class RegionRun:
    """Consecutive items that use one input region, or one item without enabled groups."""

    loads: bool
    """Whether the run begins with a new region."""
    enabled: int
    """Items with enabled groups."""
    groups: int
    """Enabled groups of these items: as many chunks for each weight word."""
    idle: int
    """Items without; each takes one trip."""
    vectors: int
    """Vectors of T_N filters that are drained after the run; 0 if its sums are added to later."""


def region_runs(items: Sequence[Item]) -> list[RegionRun]:
    """The plan of one output tile as runs, in order."""
    runs: list[RegionRun] = []
    for item in items:
        groups = item.mask.bit_count()
        if not item.mask:
            runs.append(RegionRun(item.new_region, 0, 0, 1, item.vectors))
        elif item.new_region:
            runs.append(RegionRun(True, 1, groups, 0, item.vectors))
        else:
            last = runs[-1]
            runs[-1] = replace(
                last, enabled=last.enabled + 1, groups=last.groups + groups, vectors=item.vectors
            )
    return runs


# In each trip the array's loop can do three things at once: write a part of the next region, add
# to sums, and drain finished sums. There are two region buffers and two sum buffers. Below, R n is
# region n and S n the sums of the n-th block of filter tiles; a block here reads two regions:
#
#             0      a             b             c                           d  e
#    load    |  R0  |  R1  |      |  R2  |      |  R3  |      |  R4  |
#    compute |      |   R0 > S0   |   R1 > S0   |   R2 > S1   |   R3 > S1   |  |   R4 > S2
#    drain   |                                  |              S0              |   S1
#
# a `region_ready`: R0 is loaded, and REGION_DISTANCE - 1 trips have passed. R1 is loaded at once,
#   into the second buffer.
# b R1 comes into use, so that R2 may overwrite R0: the next `load_start`.
# d S1 is complete, but S0 is not drained yet: the array waits.
# e `sums_free`: S0 is drained. S1 drains, and S2 takes the buffer of S0.
def _array_trips(config: AcceleratorConfig, work: Work) -> int:
    """Trips of the array's loop for a task: the walk of `schedule` in hls_src/schedule.cpp.

    Times are trips since the start of the current output tile. The state that one tile leaves to
    the next is therefore small, and a tile of the same extent in the same state is computed once.
    """
    runs = region_runs(work.items)
    known: dict[tuple[Size, int, tuple[int, int]], tuple[int, tuple[int, int]]] = {}
    total = regions = 0
    load_start = sums_free = 0  # start of the next load; end of the latest drain
    for first, extent in tiles(work.out_size, work.tile):
        load = region_trips(config, work.shape, extent, first)
        key = (extent, load, (load_start, sums_free))
        if key in known:
            passed, (load_start, sums_free) = known[key]
            total += passed
            continue
        both_buffers_used = regions >= 2
        filled = ceil_div(math.prod(extent), config.pf)
        sum_rows = max(MIN_FEATURE_ROWS, filled)
        # cleared sums of a small tile are not added to before this many trips
        settling = max(0, MIN_FEATURE_ROWS + 1 - filled)
        drain = extent[0] * extent[1] * beats_of_row(config, extent[2])
        time = 0
        for run in runs:
            if run.loads:
                loaded = load_start + load
                region_ready = loaded + REGION_DISTANCE - 1
                time = max(time, region_ready)
                # the second region has a free buffer; later ones wait until this region is used
                load_start = time if regions else loaded
                regions += 1
            time += run.enabled * work.weight_words * sum_rows + run.idle
            if run.vectors:
                time = max(time, sums_free)
                sums_free = time + run.vectors * drain + settling
        load_start, sums_free = load_start - time, max(0, sums_free - time)
        if both_buffers_used:
            known[key] = (time, (load_start, sums_free))
        total += time
    return total + sums_free
