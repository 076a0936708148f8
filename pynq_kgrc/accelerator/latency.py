"""How long a task takes with a memory that has latency and limited ports.

`cost` counts trips and beats, which the C-simulation counts too. This module adds time: the array
stops while a region or a weight that it needs is still on its way, and while the sums that it hands
on find no room. Ports request ahead of their data, so that latency shows only at the start and
where bursts are too short. The timed simulation (`backends/timed.py`) runs the same processes word
by word, with the same assumptions; `benchmarks/latency.py` compares the two.

Everything here is modelled. The memory is assumed (`boards.Memory`), and so is II = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pynq_kgrc.accelerator.boards import CLOCK_MHZ, REFERENCE, Memory
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.cost import Cost, layer_work, region_runs, task_cost
from pynq_kgrc.accelerator.header import FIELDS, STATUS
from pynq_kgrc.accelerator.tiling import (
    CODE_WORDS_AHEAD,
    INPUT_BEATS_AHEAD,
    ITEMS_AHEAD,
    MAKE_REGION,
    MIN_FEATURE_ROWS,
    NO_POOL,
    OUTPUT_BEATS_AHEAD,
    PIPELINE,
    PORTS,
    REGION_DISTANCE,
    REGION_WORDS_AHEAD,
    ROWS_AHEAD,
    RUNS_AHEAD,
    RUNS_DECIDED,
    RUNS_LISTED,
    SCHEDULE_CYCLES,
    SUM_WORDS_AHEAD,
    TILE_SETUP,
    TILES_AHEAD,
    WEIGHT_BEATS_AHEAD,
    WEIGHT_WORDS_AHEAD,
    Work,
    beats_of_row,
    listed_runs,
    map_requests,
    plane_cycles,
    region_beats,
    region_requests,
    region_trips,
    request_cycles,
    requests_ahead,
    scale_cycles,
    tiles,
    windows_in,
)
from pynq_kgrc.graph import ConvShape, Size
from pynq_kgrc.quant import ceil_div

START = 20
"""Cycles to start a task, beside the reading of its descriptor. Assumed."""


@dataclass(frozen=True)
class TaskTime:
    """The modelled time of a task, in cycles of the array's clock."""

    cost: Cost
    cycles: int
    """From the start of the task to its end, with memory."""
    busy: dict[str, int]
    """Cycles that the array, each kind of port and the whole memory would take alone."""

    @property
    def ideal(self) -> int:
        """Trips of the slowest process: the cycles without memory, setup and filling."""
        return self.cost.cycles

    @property
    def bound(self) -> str:
        """What would take longest alone."""
        return max(self.busy, key=lambda name: self.busy[name])


def layer_time(
    config: AcceleratorConfig,
    shape: ConvShape,
    kr: int,
    kc: int,
    pool: Size = NO_POOL,
    *,
    wide: bool = False,
    memory: Memory = REFERENCE,
    clock_mhz: float = CLOCK_MHZ,
) -> TaskTime:
    """The modelled time of a convolution with all kernel groups enabled.

    The arguments are those of `cost.layer_work`. The same model judges compiled programs
    (`task_time` of `Program.work`).

    Raises:
        ConfigError: a group cannot keep `kr` x `kc`.
        CompileError: the buffers do not hold the smallest tile.
    """
    return task_time(config, layer_work(config, shape, kr, kc, pool, wide=wide), memory, clock_mhz)


def task_time(
    config: AcceleratorConfig,
    work: Work,
    memory: Memory = REFERENCE,
    clock_mhz: float = CLOCK_MHZ,
) -> TaskTime:
    """The modelled time of a task with memory."""
    return _Walk(config, work, memory, clock_mhz).time()


@dataclass(frozen=True)
class _Tile:
    """What a tile moves, and how long each process takes for it alone."""

    sum_rows: int
    settling: int
    load: int
    """Trips that write a region into its banks."""
    region: float
    """Cycles of the input ports for a region."""
    region_ahead: float
    """Cycles by which they are ahead."""
    region_runs: int
    """Runs of the list of a region, padding included."""
    drain: int
    """Trips that hand on a vector."""
    scale: float
    """Cycles that scale a vector."""
    shortcut: float
    store: float
    """Cycles of their ports for a vector."""


class _Walk:
    """The walk of `cost._array_trips`, with the trips at which the array stands still.

    Times are cycles since the start of a tile. A process that is ahead of the array has a time at
    which it is free; streams limit how far it is ahead.
    """

    def __init__(
        self, config: AcceleratorConfig, work: Work, memory: Memory, clock_mhz: float
    ) -> None:
        self.config, self.work, self.memory = config, work, memory
        self.port_bytes = memory.port_bytes(clock_mhz)
        self.all_bytes = memory.all_bytes(clock_mhz)
        self.cost = task_cost(config, work)
        self.runs = region_runs(work.items)
        self.beat = config.beat_bytes / self.port_bytes
        weight_bytes = 8 * config.weight_port_words
        self.weight = max(1.0, weight_bytes / self.port_bytes) / PORTS
        self.regions = sum(run.loads for run in self.runs)
        self.word_setup = work.shape.taps + config.groups_per_tile + 2 * PIPELINE
        """From the last word of a tile to the first one of the next."""
        self.kinds: dict[object, _Tile] = {}

    def tile(self, first: Size, extent: Size) -> _Tile:
        config, work, shape = self.config, self.work, self.work.shape
        load = region_trips(config, shape, extent, first)
        beats = region_beats(config, shape, extent, first)
        requests = region_requests(config, shape, extent, first)
        runs = listed_runs(config, shape, extent, first)
        key = extent, load, beats, requests, runs
        if key in self.kinds:
            return self.kinds[key]
        filled = ceil_div(math.prod(extent), config.pf)
        region = ahead = 0.0
        if beats:
            length = beats / requests
            each = request_cycles(self.memory, length, self.beat, requests_ahead(requests, runs))
            # two ports take turns by planes: one is ahead while the other is read
            planes = max(1, min(requests, _planes(work, first, extent)))
            rows = requests / planes
            region = planes * plane_cycles(rows, each, self.beat)
            # a trip for each beat, and for each run that is empty
            region = max(region, runs + (beats - requests) / PORTS)
            ahead = min(PORTS * INPUT_BEATS_AHEAD * self.beat, ROWS_AHEAD * each) / PORTS
        drain = extent[0] * extent[1] * beats_of_row(config, extent[2])
        out = windows_in(work.out_size, work.pool)
        stored = windows_in(extent, work.pool)
        parts = 16 // config.bits if work.wide else 1
        beats_out = stored[0] * stored[1] * beats_of_row(config, stored[2]) * parts
        requests = map_requests(config, out, stored, 1)
        store = (
            requests * request_cycles(self.memory, beats_out / requests, self.beat)
            if requests
            else 0.0
        )
        shortcut = 0.0
        if work.shortcut:
            requests = map_requests(config, shape.out_size, extent, 1)
            shortcut = requests * request_cycles(self.memory, drain / requests, self.beat)
        made = _Tile(
            sum_rows=max(MIN_FEATURE_ROWS, filled),
            settling=max(0, MIN_FEATURE_ROWS + 1 - filled),
            load=load,
            region=region,
            region_ahead=ahead,
            region_runs=runs,
            drain=drain,
            scale=scale_cycles(config, drain),
            shortcut=shortcut,
            store=max(store, drain * parts),
        )
        self.kinds[key] = made
        return made

    def time(self) -> TaskTime:
        work, config = self.work, self.config
        # the items come, and pass through the plan and the schedule
        begin = self.memory.latency + 3 * PIPELINE
        now = float(begin)  # of the array
        # when each is free, relative to now
        load_start = 0.0
        sums_free = 0.0
        input_free = 0.0
        weights_free = -float(begin) + self.memory.latency + 2 * PIPELINE
        scale_free = store_free = shortcut_free = 0.0
        # the tile comes before its items, so that the first region is described by then
        plan_free = -float(PIPELINE + MAKE_REGION)
        place_free = -float(2 * PIPELINE)
        words_free = list_free = schedule_free = -math.inf
        known: dict[object, tuple[float, tuple[float, ...]]] = {}
        regions = 0
        left = math.prod(ceil_div(o, t) for o, t in zip(work.out_size, work.tile, strict=True))
        for first, extent in tiles(work.out_size, work.tile):
            left -= 1
            tile = self.tile(first, extent)
            state: tuple[float, ...] = (
                *(load_start, sums_free, input_free, weights_free),
                *(scale_free, store_free, shortcut_free, plan_free, place_free, words_free),
                *(list_free, schedule_free),
            )
            key = (id(tile), left == 0, state)
            both_used = regions >= 2
            if both_used and key in known:
                passed, state = known[key]
            else:
                passed, state, loads = self.walk(tile, left == 0, regions, *state)
                regions += loads
                if both_used:
                    known[key] = passed, state
            now += passed
            (
                load_start,
                sums_free,
                input_free,
                weights_free,
                scale_free,
                store_free,
                shortcut_free,
                plan_free,
                place_free,
                words_free,
                list_free,
                schedule_free,
            ) = state
        end = now + max(sums_free, scale_free, store_free)
        end += 3 * PIPELINE + self.memory.latency
        cost = self.cost
        port = {
            "input": cost.input_beats * self.beat / PORTS,
            "weights": max(cost.weights, cost.weight_beats * self.weight),
            "scale": cost.scale,
            "output": cost.output_beats * self.beat,
            "shortcut": cost.shortcut_beats * self.beat,
        }
        maps = cost.input_beats + cost.shortcut_beats + cost.output_beats
        bytes_ = maps * config.beat_bytes + 8 * (
            cost.weight_beats * config.weight_port_words + cost.table_words
        )
        memory = bytes_ / self.all_bytes
        end = max(end, begin + memory)
        end += START + 2 * self.memory.latency + len(FIELDS) / 2 + len(STATUS)
        busy = {"array": float(cost.array), **port, "memory": memory}
        return TaskTime(cost, round(end), {name: round(value) for name, value in busy.items()})

    def walk(
        self,
        tile: _Tile,
        last: bool,
        regions: int,
        load_start: float,
        sums_free: float,
        input_free: float,
        weights_free: float,
        scale_free: float,
        store_free: float,
        shortcut_free: float,
        plan_free: float,
        place_free: float,
        words_free: float,
        list_free: float,
        schedule_free: float,
    ) -> tuple[float, tuple[float, ...], int]:
        """Cycles until the array has computed a tile, and the state that it leaves."""
        items = len(self.work.items)
        chunk_beats = self.work.chunk_beats(self.config)
        time = 0.0
        first_regions, first = regions, True
        words_end = -math.inf
        # the ports begin with a tile when it is described
        after_plan = MAKE_REGION + self.memory.latency + 3 * PIPELINE
        described = max(plan_free, list_free)
        input_free = max(input_free, described + after_plan)
        # a port takes the beats of a run when it has RUNS_AHEAD runs: of the next tile, if need be
        next_plan = plan_free + items + TILE_SETUP + after_plan
        runs_left = self.regions * tile.region_runs
        # the list of a tile ends when its last runs have room in front of the ports
        list_free = described + MAKE_REGION + runs_left
        for run in self.runs:
            if run.loads:
                # a word of the region that is late stops the array
                begin = max(input_free, load_start - tile.region_ahead)
                input_free = begin + tile.region
                of_run = tile.region / tile.region_runs
                if runs_left > RUNS_LISTED >= runs_left - tile.region_runs:
                    list_free = max(list_free, begin + (runs_left - RUNS_LISTED) * of_run)
                runs_left -= tile.region_runs
                if runs_left < RUNS_AHEAD and not last:
                    listed = list_free + MAKE_REGION + 2 * PIPELINE + RUNS_AHEAD
                    rest = min(tile.region_runs, RUNS_AHEAD - runs_left) * of_run
                    input_free = max(input_free, max(next_plan, listed) + rest)
                # the process that places words begins anew with each tile
                gap = PIPELINE + MAKE_REGION - REGION_WORDS_AHEAD if first else 0
                first = False
                loaded = max(load_start + tile.load, input_free, place_free + gap + tile.load)
                place_free = loaded
                late = loaded - load_start - tile.load
                time = max(time + late if time > load_start else time, loaded + REGION_DISTANCE - 1)
                sums_free += late if sums_free > load_start else 0
                load_start = time if regions else loaded
                regions += 1
            if run.enabled:
                # the first word of a tile is made after the places of its taps
                time = max(time, words_free + self.word_setup)
                words_free = -math.inf
            trips = run.enabled * self.work.weight_words * tile.sum_rows + run.idle
            chunks = run.groups * self.work.weight_words if self.work.columns else 0
            if chunks:
                ahead = PORTS * WEIGHT_BEATS_AHEAD * self.weight
                weights_free = max(weights_free, time - ahead) + chunks * chunk_beats * self.weight
                done = max(time + max(trips, chunks), weights_free)
                late = done - time - trips
                sums_free += late if sums_free > time else 0
                time = done
            else:
                time += trips
            # a pass for each item, and for each end of a load or a drain that cuts one
            passes = run.enabled + run.idle + run.loads + 2 * bool(run.vectors)
            ahead = time - RUNS_DECIDED * trips / passes
            schedule_free = max(schedule_free, ahead - trips) + SCHEDULE_CYCLES * passes
            late = schedule_free - time
            if late > 0:
                sums_free += late if sums_free > time else 0
                time = schedule_free
            if run.enabled:
                words_end = time
            if run.vectors:
                time = max(time, sums_free)
                words = run.vectors * tile.drain
                scale_free = max(scale_free, time) + run.vectors * tile.scale
                store_free = max(store_free, time) + run.vectors * tile.store
                shortcut_free = (
                    max(shortcut_free, time - SUM_WORDS_AHEAD * self.beat)
                    + run.vectors * tile.shortcut
                )
                scale_free = max(scale_free, shortcut_free)
                held = SUM_WORDS_AHEAD * tile.scale / tile.drain
                per_word = tile.store / tile.drain
                later = (CODE_WORDS_AHEAD + OUTPUT_BEATS_AHEAD + self.memory.burst_beats) * per_word
                scale_free = max(scale_free, store_free - later)
                drained = max(time + words, scale_free - held)
                late = drained - time - words
                time += late
                load_start += late if load_start + tile.load > time - late else 0
                sums_free = time + words + tile.settling
        # the plan of the next tile, which has room for some tiles and items
        planned = max(plan_free + items, time - time * ITEMS_AHEAD / items) + TILE_SETUP
        state = (
            *(load_start - time, max(0.0, sums_free - time)),
            max(input_free, load_start - tile.region_ahead) - time,
            max(weights_free - time, -PORTS * WEIGHT_BEATS_AHEAD * self.weight),
            *(max(0.0, each - time) for each in (scale_free, store_free, shortcut_free)),
            max(planned - time, -TILES_AHEAD * time),
            place_free - time,
            words_end - WEIGHT_WORDS_AHEAD * tile.sum_rows - time,
            list_free + PIPELINE - time,
            schedule_free + PIPELINE + MAKE_REGION - time,
        )
        return round(time), tuple(round(each, 0) for each in state), regions - first_regions


def _planes(work: Work, first: Size, extent: Size) -> int:
    """Planes of the region of a tile that lie inside the map."""
    shape = work.shape
    begin = first[0] * shape.stride[0] - shape.pad_before[0]
    end = begin + (extent[0] - 1) * shape.stride[0] + shape.kernel[0]
    return min(end, shape.in_size[0]) - max(begin, 0)
