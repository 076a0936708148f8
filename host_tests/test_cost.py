"""The closed forms of the cost model are what the emulation counts, task by task."""

import math

import numpy as np
import pytest
from networks import Net, compiled, small_config

from pynq_kgrc.accelerator import cost
from pynq_kgrc.accelerator.config import PRESETS, AcceleratorConfig, preset
from pynq_kgrc.backends.emulate import count_conv, count_pool
from pynq_kgrc.errors import CompileError, ConfigError
from pynq_kgrc.graph import ConvShape
from pynq_kgrc.program import ConvTask
from pynq_kgrc.quant import packed_bytes


def assert_counts_agree(program):
    config = program.config
    for task in program.tasks:
        tile = cost.tile_size(config, task.shape, task.name)
        read = cost.input_bytes(config, task.shape, tile)
        written = packed_bytes(task.shape.out_channels * math.prod(task.out_size), task.out.bits)
        if not isinstance(task, ConvTask):
            counted = count_pool(task, config)
            assert (counted.macs, counted.bytes_weight) == (0, 0)
        else:
            counted = count_conv(task, config)
            kept = (*task.weights.kept, int(np.count_nonzero(task.weights.enabled)))
            assert counted.macs == cost.conv_macs(config, task.shape, *kept)
            tiles = cost.tile_count(task.shape, tile)
            weights = cost.weight_bytes(config, task.shape, *kept)
            assert counted.bytes_weight == weights * tiles
            read *= cost.filter_tiles(config, task.shape)
            if task.shortcut is not None:
                read += packed_bytes(
                    task.shape.filters * math.prod(task.shape.out_size), config.bits
                )
        assert counted.bytes_in == read
        assert counted.bytes_out == written


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("sparse", [True, False])
def test_counters_agree_with_the_cost_terms(bits, sparse):
    net = Net(size=(5, 9, 8))
    a = net.conv("clip", 17, (3, 3, 3), pad=(0, 1, 1), pad_after=(2, 1, 0), kept=1 / 9)
    b = net.conv(a, 17, act="none", kept=0.5)
    c = net.conv(net.add(b, a), 9, (1, 3, 3), stride=(1, 2, 2), pad=(0, 1, 1), kept=0.0)
    net.dense(net.pool(c, 3, stride=2, pad=1), 7)
    assert_counts_agree(compiled(net, small_config(bits, sparse))[0])


def test_tile_shrinks_until_its_region_fits():
    config = preset("8-sparse")
    stem = ConvShape(3, (64, 224, 224), (7, 7, 7), (2, 2, 2), (2, 2, 2), (3, 3, 3), filters=64)
    tile = cost.tile_size(config, stem)
    assert math.prod(cost.region_extent(stem, tile)) <= config.input_positions
    assert math.prod(tile) < 4 * 14 * 14
    plain = ConvShape(64, (16, 56, 56), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), filters=128)
    assert cost.tile_size(config, plain) == (4, 14, 14)
    with pytest.raises(CompileError, match=r"fc: its kernel \(99, 99, 99\) alone needs 970299"):
        cost.tile_size(config, ConvShape(1, (99, 99, 99), (99, 99, 99)), "fc")


def test_presets_are_those_of_table_v():
    macs_a_cycle = {name: c.pm * c.tn * c.pk * c.pf for name, c in PRESETS.items()}
    assert macs_a_cycle["8-sparse"] == 3072
    assert {c.rows_per_cycle for c in PRESETS.values() if c.sparse} == {4}
    assert len({c.digest for c in PRESETS.values()}) == 6
    assert (
        preset("8-sparse").digest
        == AcceleratorConfig("other name", 8, True, tm=32, tn=8, pm=16, pk=3, pf=8).digest
    )


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (dict(bits=5), "bits=5 is not a width of this accelerator; use 16, 8, 4"),
        (dict(tm=9), r"tm=9 is not a multiple of gm=4; use 4, 8, 12"),
        (dict(pm=3), r"pm=3 does not share out over the 2 groups"),
        (dict(pm=6), r"pm=6 does not share out"),
        (dict(pk=10), r"pk=10 is more than the tk=9 columns"),
        (dict(tw=0), r"tw=0 has to be 1 or more"),
        (dict(tk=300), r"tk=300: row and column indices are one byte"),
    ],
)
def test_bad_tilings_are_refused_in_a_sentence(numbers, text):
    with pytest.raises(ConfigError, match=text):
        small_config(**numbers)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="no accelerator named 'zcu999'; there are 16-dense"):
        preset("zcu999")
