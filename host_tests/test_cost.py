"""The cost model: tiles, skipped groups, the slowest process, designs.

test_csim.py compares the counts of whole programs with those of the C-simulation.
"""

import json
import math
import shutil
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from networks import Net, compiled, random_codes, small_config

from pynq_kgrc.accelerator import cost, tiling
from pynq_kgrc.accelerator.boards import BOARDS, REFERENCE
from pynq_kgrc.accelerator.config import PRESETS, AcceleratorConfig, preset
from pynq_kgrc.accelerator.latency import layer_time, task_time
from pynq_kgrc.accelerator.plan import plan_convolution
from pynq_kgrc.backends import csim
from pynq_kgrc.compress.patterns import Rates, project
from pynq_kgrc.errors import CompileError, ConfigError
from pynq_kgrc.graph import ConvShape

TABLE_V = json.loads((Path(__file__).parent / "kgrc_tables.json").read_text("utf-8"))


def window(size, kernel, stride=1, pad=0, filters=8):
    triple = [(v,) * 3 if isinstance(v, int) else v for v in (kernel, stride, pad, pad)]
    return ConvShape(3, size, *triple, filters=filters)


SHAPES = [
    window((16, 56, 56), 3, 1, 1),
    window((16, 112, 112), (1, 7, 7), (1, 2, 2), (0, 3, 3)),
    window((64, 224, 224), 7, 2, 3),
    window((5, 9, 13), (3, 1, 1), (2, 1, 1), (1, 0, 0)),
    window((8, 15, 15), 1, 2),
    window((7, 20, 31), 2, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.kernel))
@pytest.mark.parametrize("pool", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("name", PRESETS)
def test_a_tile_fits_the_buffers_and_fills_the_ports(name, shape, pool):
    config = preset(name)
    tile = tiling.tile_size(config, shape, pool, 9, 3)
    out = tiling.pooled_size(shape, pool)
    assert math.prod(tile) <= config.features
    assert tiling.region_footprint(config, shape, tile) <= config.input_positions
    for length, size, window in zip(tile, out, pool, strict=True):
        assert length == size or length % window == 0
    assert tile[2] == out[2] or tile[2] // pool[2] % config.port_positions == 0


def test_a_tile_that_fits_nowhere_is_refused():
    with pytest.raises(CompileError, match=r"fc: its smallest tile \(1, 1, 1\) with kernel \(99, "):
        tiling.tile_size(preset("8-sparse"), ConvShape(1, (99, 99, 99), (99, 99, 99)), what="fc")


def test_skipped_groups_cost_nothing():
    """Without weights in half of the channel tiles, weights, input and MACs are half as many."""
    config = small_config()
    net = Net(size=(2, 6, 8), channels=16)
    net.conv("clip", 16)
    weight = net.layers["conv1"].weight
    costs = []
    for _ in range(2):
        program, _ = compiled(net, config)
        costs.append(cost.task_cost(config, program.work(program.tasks[0])))
        weight[:, 8:] = 0
    full, half = costs
    assert half.weight_beats * 2 == full.weight_beats
    assert half.input_beats * 2 == full.input_beats
    assert half.macs * 2 == full.macs
    assert half.array < 0.6 * full.array
    assert half.output_beats == full.output_beats


def test_the_slowest_process_of_a_layer():
    config = preset("8-sparse")
    plan = tuple(plan_convolution(config, np.ones((64, 64), bool), 512))
    shape = ConvShape(512, (1, 3, 3), (1, 3, 3), filters=512)
    one = (1, 1, 1)
    words = tiling.conv_words(config, shape, 8, 9)
    dense = tiling.Work(shape, one, one, one, words, plan, columns=3)
    # a chunk a trip: four to a weight word, whose sums need as many trips to settle
    found = task_time(config, dense)
    assert found.cost.bound == "array"
    assert found.cost.array < 1.01 * found.cost.weights
    # the ports of weights give less than a chunk a cycle
    assert found.bound == "weights"
    # with one column kept of nine, a weight word holds one column only
    words = tiling.conv_words(config, shape, 8, 1)
    single = tiling.Work(shape, one, one, one, words, plan, columns=1)
    beats = [cost.task_cost(config, work).weight_beats for work in (dense, single)]
    assert beats[0] == 9 * beats[1]
    net = Net(size=(4, 14, 16), channels=64)
    net.conv("clip", 64)
    program, _ = compiled(net, config)
    assert cost.task_cost(config, program.work(program.tasks[0])).bound == "array"


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("name", ["8-sparse", "4-sparse", "8-zcu102"])
def test_a_layer_alone_costs_what_its_compiled_task_costs(name, pool):
    """`layer_time` from kept rows and columns is that of the pruned, compiled layer."""
    config = preset(name)
    net = Net(size=(4, 15, 30), channels=24)
    conv = net.conv("clip", 72, kernel=3, pad=1)
    rates = Rates(rows=Fraction(1, 2), cols=Fraction(2, 3))
    weight = net.layers[conv].weight
    weight[...] = project(weight, rates, config.group_size)
    if pool:
        net.dense(net.pool(conv, pool), 5)
    program, _ = compiled(net, config)
    task = program.tasks[0]
    assert task.weights.kept == (4, 3)
    assert (task.pool is not None) == bool(pool)
    window = (pool,) * 3 if pool else tiling.NO_POOL
    wide = task.out.bits > config.bits
    found = layer_time(config, task.shape, 4, 3, window, wide=wide)
    assert found == task_time(config, program.work(task))
    assert found.cycles < layer_time(config, task.shape, 8, 9, window, wide=wide).cycles


# ---- time, with memory ------------------------------------------------------------------------


def test_what_memory_gives_by_hand():
    assert REFERENCE.port_bytes(150.0) == pytest.approx(25.6)
    assert REFERENCE.port_bytes(300.0) == pytest.approx(12.8)
    assert REFERENCE.all_bytes(150.0) == pytest.approx(64 / 8 * 2 * 1067e6 * 0.75 / 150e6)
    assert BOARDS["ultra96"].memory.all_bytes() < REFERENCE.all_bytes() / 2
    assert "latency 70 cycles, 16 bursts" in REFERENCE.describe()


def test_a_port_waits_where_bursts_are_short():
    """16 bursts under way hide a latency of 70 cycles from 6 beats of 1 cycle on, not below."""
    assert tiling.request_cycles(REFERENCE, 200, 1.0) == 200
    assert tiling.request_cycles(REFERENCE, 6, 1.0) == 6
    assert tiling.request_cycles(REFERENCE, 1, 1.0) == (70 + 1) / 16
    far = replace(REFERENCE, latency=100.0)
    assert tiling.request_cycles(far, 6, 1.0) == (100 + 6) / 16


def test_ports_of_the_input_take_turns_as_far_as_their_streams_hold():
    assert tiling.plane_cycles(1, 400.0, 2.5) == 200
    # of a plane of 2000 beats the second port has 512 when it is its turn
    assert tiling.plane_cycles(1, 2000.0, 1.0) == 2000 - 512
    # 64 runs of rows of a single beat
    assert tiling.plane_cycles(128, 4.5, 2.5) == 64 * 4.5


def memory_bound(**fields):
    """A 1x1x1 layer of few products a position: its traffic takes longer than the array."""
    shape = ConvShape(64, (8, 56, 56), (1, 1, 1), filters=64)
    return layer_time(preset("8-zcu102"), shape, 8, 1, memory=replace(REFERENCE, **fields))


def test_time_with_memory():
    time = memory_bound()
    assert time.ideal < time.cycles
    # 64 channels of 8 x 56 x 56 are written at 25.6 bytes a cycle, and read by two such ports
    assert time.busy["output"] == round(64 * 8 * 56 * 56 / 25.6)
    assert time.busy["input"] >= time.busy["output"] / 2
    assert time.cycles >= max(time.busy.values())
    assert memory_bound(port_bits=64).bound == "output"
    assert memory_bound(port_bits=64).cycles > 1.3 * time.cycles
    assert memory_bound(latency=1000.0, outstanding=1).cycles > 2 * time.cycles
    tight = memory_bound(peak_bytes_per_second=2e9)
    assert tight.bound == "memory" and tight.cycles > tight.busy["memory"] > time.cycles


def test_an_array_that_is_busy_hides_memory():
    shape = ConvShape(256, (4, 14, 14), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), filters=256)
    time = layer_time(preset("8-zcu102"), shape, 8, 9)
    assert time.bound == "array"
    assert time.ideal < time.cycles < 1.05 * time.ideal
    late = layer_time(preset("8-zcu102"), shape, 8, 9, memory=replace(REFERENCE, latency=100.0))
    assert 0 < late.cycles - time.cycles < 1000


@pytest.mark.parametrize("name", ["8-zcu102", "4-sparse", "16-sparse"])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (1, 3, 3)])
def test_the_chosen_tile_is_near_the_best(name, kernel):
    """`tile_size` estimates; of all tiles that fit, none is 8 % faster by the walk."""
    config, out = preset(name), (8, 28, 28)
    pad = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    shape = ConvShape(64, out, kernel, (1, 1, 1), pad, pad, filters=128)
    work = cost.layer_work(config, shape, 8, 3)
    steps = (1, 1, config.port_positions)
    times = [
        task_time(config, replace(work, tile=tile)).cycles
        for tile in product(*map(tiling._tile_lengths, out, steps))
        if math.prod(tile) <= config.features
        and tiling.region_footprint(config, shape, tile) <= config.input_positions
    ]
    assert len(times) > 20
    assert task_time(config, work).cycles <= 1.08 * min(times) < max(times)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("empty", range(5))
def test_trips_of_a_layer_that_begins_with_empty_filter_tiles(empty):
    """The second region is loaded while the empty tiles drain, before the first one is used."""
    config = small_config(filter_tiles=1)
    net = Net(size=(2, 3, 9))
    conv = net.conv(net.conv("clip", 16), 5 * config.tm, 1, (1, 1, 3), 0)
    net.layers[conv].weight[: empty * config.tm] = 0
    program, _ = compiled(net, config)
    backend = csim.CSimulation(config)
    backend.load(program)
    backend.write(program.source, random_codes(program))
    backend.run(0, 2)
    counted = backend.status(1)["array"]
    assert counted == cost.task_cost(config, program.work(program.tasks[1])).array


@pytest.mark.parametrize(
    "row", TABLE_V["table_v"], ids=lambda row: f"{row['bits']}-{row['design']}"
)
def test_presets_are_those_of_table_v(row):
    config = preset(f"{row['bits']}-{row['design']}")
    numbers = {key: getattr(config, key) for key in ("tm", "pm", "tn", "pf", "pk")}
    assert numbers == {key: row[key] for key in numbers}
    assert {key: getattr(config, key) for key in TABLE_V["common"]} == TABLE_V["common"]
    assert (config.bits, config.sparse) == (row["bits"], row["design"] == "sparse")


def test_a_digest_depends_on_the_numbers_and_not_on_the_name():
    assert len({c.digest for c in PRESETS.values()}) == len(PRESETS) == 9
    assert (
        preset("8-sparse").digest
        == AcceleratorConfig("other name", 8, True, tm=32, tn=8, pm=16, pk=3, pf=8).digest
    )


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (dict(bits=5), "bits=5 is not a width of this accelerator; use 16, 8, 4"),
        (dict(tm=9), r"tm=9 is not a multiple of gm=4; use 4, 8, 12"),
        (dict(pm=3), r"pm=3 cannot be divided over the 2 groups"),
        (dict(pm=6), r"pm=6 cannot be divided"),
        (dict(pk=10), r"pk=10 is more than the tk=9 columns of a tile; use 1 to 9"),
        (dict(tw=0), r"tw=0 is not 1 or more"),
        (dict(tk=300), r"tk=300: row and column indices are one byte"),
        (dict(tn=3), r"tm=8 is not a multiple of tn=3.*; use a multiple of 3"),
        (dict(tm=12, tn=6, pm=12, gm=6), r"tn=6 channels of 8 bits do not fill 64-bit words"),
        (dict(tm=128, pm=32), r"tm=128 makes 32 groups of gm=4; use 64 at most"),
        (dict(pf=1), r"pf=1 is less than the 2 positions of a beat; use 2 or more"),
        (dict(filter_tiles=0), r"filter_tiles=0 is not 1 or more"),
        (dict(beat=3), r"beat=3 is not a power of two; use 2, 4, 8"),
    ],
)
def test_the_error_of_a_bad_design_names_value_and_choice(numbers, text):
    with pytest.raises(ConfigError, match=text):
        small_config(**numbers)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="no accelerator named 'zcu999'; there are 16-dense"):
        preset("zcu999")
