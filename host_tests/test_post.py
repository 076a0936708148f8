"""What follows the array: scales at the ends of their ranges, and fused pools whose memory is late."""

import shutil

import numpy as np
import pytest
from msgspec.structs import replace
from networks import Net, compiled, random_codes, small_config
from reference import run_program
from test_csim import outputs, with_sources

from pynq_kgrc.backends import csim, image
from pynq_kgrc.errors import ProgramError
from pynq_kgrc.program import check
from pynq_kgrc.quant import ACCUMULATOR_BITS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

LATE = ("-O1", "-DKGRC_PLAIN", "-DKGRC_LATE")
"""A memory shows what was written as late as its DEPENDENCE pragma lets it."""

POOLS = [
    ((4, 6, 16), (2, 2, 2)),
    ((2, 8, 8), (1, 2, 2)),  # two beats in a row
    ((4, 6, 4), (2, 2, 2)),  # one: the same window in each of two trips
    ((2, 6, 4), (2, 3, 4)),
    ((4, 4, 3), (2, 2, 1)),
    ((2, 4, 1), (2, 2, 1)),
    ((2, 4, 10), (1, 2, 2)),  # half a beat of windows at the end of a row
]


def pooled(size, window):
    net = Net(size=size)
    net.conv(net.pool(net.conv("clip", 16, 1, pad=0), window), 8, 1, pad=0)
    program = compiled(net, small_config(8, pf=4), fold=False)[0]
    assert program.tasks[0].pool is not None
    return program


def wrong_codes(program, flags):
    codes = random_codes(program)
    found = outputs(csim.CSimulation(program.config, flags), program, codes)
    return sum(int((found[name] != w).sum()) for name, w in run_program(program, codes).items())


@pytest.mark.parametrize(("size", "window"), POOLS)
def test_late_writes_do_not_change_a_fused_pool(size, window):
    assert wrong_codes(pooled(size, window), LATE) == 0


def test_a_pool_that_trusts_its_memory_is_wrong_where_writes_are_late(monkeypatch, tmp_path):
    changes = [("pool.cpp", "is[i] = recent_row[i] == row;", "is[i] = false;")]
    with_sources(monkeypatch, tmp_path / "hls", changes)
    assert wrong_codes(pooled((4, 6, 4), (2, 2, 2)), LATE) > 0


def extreme(bits):
    """A program of two tasks, one with a shortcut; its scales are the ends of what is accepted."""
    net = Net(size=(1, 3, 5))
    body = net.conv("clip", 24, 1, pad=0)
    net.conv(net.add(body, net.conv(body, 24, 1, pad=0, act="none")), 8, 1, pad=0)
    program = compiled(net, small_config(bits), fold=False)[0]
    limit = 1 << (ACCUMULATOR_BITS[bits] - 1)
    tasks = []
    for task in program.tasks:
        number = np.arange(task.shape.filters)
        # the sums of so few weights stay below a 256th of the limit at 8 bits
        bias = np.where(number % 2, limit - limit // 256, limit // 256 - limit)
        shift = np.array([0, 1, 14, 30, 31, 45, 46, 47, 48, 61, 62], np.uint8)
        changed = replace(
            task,
            bias=np.where(number % 5, bias, number - 8).astype(np.int64),
            mult=np.array([1 << 14, (1 << 15) - 1, 0, 20000], np.int32)[number % 4],
            shift=shift[number % shift.size],
        )
        if task.shortcut is not None:
            short = replace(task.shortcut, zero_point=-(1 << 15), mult=(1 << 15) - 1, shift=0)
            changed = replace(changed, shortcut=short)
        tasks.append(changed)
    program = replace(program, tasks=tuple(tasks))
    assert any(task.shortcut is not None for task in tasks)
    check(program)
    return program


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_scales_at_the_ends_of_their_ranges(bits):
    assert wrong_codes(extreme(bits), ("-O0", "-DKGRC_PLAIN")) == 0


def test_a_bias_past_the_accumulator_is_refused():
    program = pooled((2, 4, 1), (2, 2, 1))
    task = replace(program.tasks[0], bias=np.full(16, 1 << 31, np.int64))
    with pytest.raises(ProgramError, match=r"a bias of 2147483648 does not fit the 32 bits .* use"):
        image.build_image(replace(program, tasks=(task, *program.tasks[1:])))
