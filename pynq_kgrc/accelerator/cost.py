"""What a task costs on our accelerator: trips of its pipelined loops, multiply-accumulates, bytes.

The model follows the loops of hls_src: closed forms, and for the array one short walk over the
plan. Memory never stalls in it. The C-simulation counts the same trips while it runs and the
emulation the same bytes; tests require equality (host_tests/test_cost.py, test_csim.py). The
paper's own model is in `paper.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.plan import Item
from pynq_kgrc.accelerator.tiling import (
    MIN_FEATURE_ROWS,
    NO_POOL,
    Work,
    beats_of_row,
    convolution_work,
    region_beats,
    region_trips,
    tiles,
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

    @property
    def bound(self) -> str:
        """The process with the most trips."""
        names = ("array", "input", "weights", "scale", "store", "plan")
        return max(names, key=lambda name: int(getattr(self, name)))

    @property
    def cycles(self) -> int:
        """Trips of the slowest process: all processes run at the same time."""
        return int(getattr(self, self.bound))


def layer_cycles(
    config: AcceleratorConfig,
    shape: ConvShape,
    kr: int,
    kc: int,
    pool: Size = NO_POOL,
    *,
    wide: bool = False,
) -> int:
    """Modelled cycles, without memory stalls, of a convolution with all kernel groups enabled.

    The same model judges compiled programs (`task_cost` of `Program.work`). A shortcut that is
    added to the result costs beats of memory but no cycles of this model.

    Args:
        config: the design.
        shape: of the convolution, with M filters, N channels, K taps.
        kr: rows that a group keeps, of G_M.
        kc: columns that a group keeps in a tap tile, of G_K = min(K, T_K).
        pool: window of a pool that is fused into the convolution.
        wide: whether the output has 16 bits on a design of fewer, as logits have.

    Raises:
        ConfigError: a group cannot keep `kr` x `kc`.
        CompileError: the buffers do not hold the smallest tile.
    """
    config.check_kept(shape.taps, kr, kc)
    p, q, _ = config.group_size.counts(shape.filters, shape.channels, shape.taps)
    work = convolution_work(config, shape, kr, kc, np.ones((p, q), bool), pool, wide=wide)
    return task_cost(config, work).cycles


def task_cost(config: AcceleratorConfig, work: Work) -> Cost:
    """What a task costs; each number is exactly what the C-simulation counts."""
    shape, items = work.shape, work.items
    regions = sum(item.new_region for item in items)
    vectors = sum(item.blocks for item in items)
    chunks, chunk_beats = work.chunks, work.chunk_beats(config)
    # a word of a pool takes a trip, an item of which nothing is enabled too
    trips_of_words = chunks * chunk_beats + sum(not item.mask for item in items)
    if not work.columns:
        trips_of_words = len(items) * work.weight_words
    beats_out = 16 // config.bits if work.wide else 1
    totals = dict.fromkeys(("input", "weights", "scale", "store", "macs"), 0)
    read = shortcut = written = count = 0
    for first, extent in tiles(work.out_size, work.tile):
        count += 1
        load = region_trips(config, shape, extent, first)
        handed_on = vectors * extent[0] * extent[1] * beats_of_row(config, extent[2])
        totals["input"] += regions * load
        totals["weights"] += shape.taps + trips_of_words
        totals["scale"] += vectors * 2 * config.tn + handed_on
        totals["store"] += handed_on * beats_out
        totals["macs"] += chunks * config.rows_per_cycle * config.pk * config.tn * math.prod(extent)
        read += regions * region_beats(config, shape, extent, first)
        shortcut += handed_on if work.shortcut else 0
        stored = [extent[i] // work.pool[i] for i in range(3)]
        written += vectors * stored[0] * stored[1] * beats_of_row(config, stored[2])
    tables = len(items) + chunks * config.index_words + 2 * vectors * config.tn
    return Cost(
        array=_array_trips(config, work),
        **totals,
        plan=count * len(items),
        input_beats=read,
        shortcut_beats=shortcut,
        output_beats=written * beats_out,
        weight_beats=count * chunks * chunk_beats,
        table_words=count * tables,
    )


@dataclass(frozen=True)
class _Step:
    """The items that share a region, or one that stands for a block without work."""

    loads: bool
    busy: int
    idle: int
    blocks: int


def _steps(items: Sequence[Item]) -> list[_Step]:
    steps: list[_Step] = []
    for item in items:
        busy, idle = (1, 0) if item.mask else (0, 1)
        if item.new_region or not item.mask:
            steps.append(_Step(item.new_region, busy, idle, item.blocks))
        else:
            last = steps[-1]
            steps[-1] = _Step(last.loads, last.busy + busy, last.idle + idle, item.blocks)
    return steps


def _array_trips(config: AcceleratorConfig, work: Work) -> int:
    """Trips of the array's loop: in each it computes, loads the next region, hands on sums.

    A region can be loaded as soon as the one before it is in use, because there are two places; a
    block begins when the sums of the one before the last are handed on. Times are kept relative to
    the present, so that equal tiles after each other are walked once.
    """
    steps = _steps(work.items)
    seen: dict[tuple[Size, int, tuple[int, int]], tuple[int, tuple[int, int]]] = {}
    now = regions = first_load = 0
    begun = handed = 0  # when the last region came into use, and when the last sums were handed on
    for first, extent in tiles(work.out_size, work.tile):
        load = region_trips(config, work.shape, extent, first)
        key = (extent, load, (begun, handed))
        if key in seen:
            passed, (begun, handed) = seen[key]
            now += passed
            continue
        settled = regions >= 2
        filled = ceil_div(math.prod(extent), config.pf)
        rows = max(MIN_FEATURE_ROWS, filled)
        # sums that were cleared are not added to at once
        settling = max(0, MIN_FEATURE_ROWS + 1 - filled)
        handed_on = extent[0] * extent[1] * beats_of_row(config, extent[2])
        time = 0
        for step in steps:
            if step.loads:
                # the second region's place is free from the start
                begun = time = max(time, (begun if regions != 1 else first_load - now) + load)
                first_load = begun if regions == 0 else first_load
                regions += 1
            time += step.busy * work.weight_words * rows + step.idle
            if step.blocks:
                time = max(time, handed)
                handed = time + step.blocks * handed_on + settling
        begun, handed = begun - time, max(0, handed - time)
        if settled:
            seen[key] = (time, (begun, handed))
        now += time
    return now + handed
