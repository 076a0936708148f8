"""What a task costs on our accelerator: trips of its pipelined loops, multiply-accumulates, bytes.

Closed forms and one short walk over the plan, with the loop structure of hls_src: the C-simulation
counts the same trips while it runs, and the emulation the same bytes; all have to agree exactly
(host_tests/test_cost.py, test_csim.py). The paper's own model is in `paper.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.plan import Item
from pynq_kgrc.accelerator.tiling import (
    MIN_FEATURE_ROWS,
    Work,
    beats_of_row,
    region_beats,
    region_words,
    tiles,
)
from pynq_kgrc.graph import Size
from pynq_kgrc.quant import ceil_div


@dataclass(frozen=True)
class Cost:
    """What a task costs; the fields up to `plan` are trips, each of one process."""

    array: int
    input: int
    weights: int
    scale: int
    store: int
    plan: int
    macs: int
    input_beats: int
    shortcut_beats: int
    output_beats: int
    weight_beats: int
    table_words: int

    @property
    def bound(self) -> str:
        """The process that takes longest."""
        names = ("array", "input", "weights", "scale", "store", "plan")
        return max(names, key=lambda name: int(getattr(self, name)))

    @property
    def cycles(self) -> int:
        """Trips of the slowest process: all of them run side by side."""
        return int(getattr(self, self.bound))


def task_cost(config: AcceleratorConfig, work: Work) -> Cost:
    """Everything a task costs, each number exactly as the C-simulation counts it."""
    shape, items = work.shape, work.items
    regions = sum(item.new_region for item in items)
    vectors = sum(item.vectors for item in items)
    chunks, chunk_beats = work.chunks, work.chunk_beats(config)
    # a word of a pool takes a trip, an item of which nothing is enabled too
    trips_of_words = chunks * chunk_beats + sum(not item.mask for item in items)
    if not work.columns:
        trips_of_words = len(items) * work.words
    beats_out = 16 // config.bits if work.wide else 1
    totals = dict.fromkeys(("input", "weights", "scale", "store", "macs"), 0)
    read = shortcut = written = count = 0
    for first, extent in tiles(work.out_size, work.tile):
        count += 1
        load = region_words(config, shape, extent, first)
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
            steps.append(_Step(item.new_region, busy, idle, item.vectors))
        else:
            last = steps[-1]
            steps[-1] = _Step(last.loads, last.busy + busy, last.idle + idle, item.vectors)
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
        load = region_words(config, work.shape, extent, first)
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
            time += step.busy * work.words * rows + step.idle
            if step.blocks:
                time = max(time, handed)
                handed = time + step.blocks * handed_on + settling
        begun, handed = begun - time, max(0, handed - time)
        if settled:
            seen[key] = (time, (begun, handed))
        now += time
    return now + handed
