"""One battery of tests for every backend: its codes equal those of the loops in `reference.py`.

Quick start: adding a backend
1. Write a class with `name`, `exclusive` and the five verbs of `backends/base.py:Backend`, in a new
   file in `pynq_kgrc/backends/`. `Loaded` holds the program and checks the range of `run`.
2. Add one line to the table `BACKENDS` in `backends/base.py`: its name, and where its class is.
3. `pytest host_tests/test_backends.py -k NAME`. Nothing changes here: the fixture `run` and the
   tests with a parameter `name` take their backends from that table.

Quick start: adding something that a task can do
1. Add its formula to docs/equations.md and its plain loops to `reference.py`.
2. Add a network with it to a test below, and call `assert_as_reference(run, program)`.
3. If it is a new kind of task, `test_every_kind_of_task` fails until its network has one.
"""

import dataclasses
import sys
from fractions import Fraction
from typing import get_args

import msgspec
import numpy as np
import pytest
from networks import Net, compiled, random_codes, small_config, stretched
from reference import run_program

from pynq_kgrc.backends.base import BACKENDS, PackedMap, open_backend
from pynq_kgrc.backends.emulation import choice, exact, winograd
from pynq_kgrc.backends.emulation.backend import Emulation, Scaling
from pynq_kgrc.errors import ConfigError, DeviceError, ProgramError
from pynq_kgrc.program import ConvTask, PoolTask, Task

DESIGNS = [(bits, sparse) for bits in (16, 8, 4) for sparse in (True, False)]


@pytest.fixture(params=[*sorted(BACKENDS), "two-cores"])
def run(request):
    """A function that runs a program on one backend: codes to {task name: output codes}."""

    def outputs(program, codes):
        if request.param == "two-cores":  # splits blocks and filters among processes
            backend = Emulation(program.config, cores=2, fork=True)
        else:
            backend = open_backend(request.param, program.config)
        try:
            backend.load(program)
            backend.write(program.source, codes)
            found = {}
            for i, task in enumerate(program.tasks):
                backend.run(i, i + 1)
                channels = task.shape.out_channels
                found[task.name] = backend.read(task.target, channels, task.out_size)
            # a second run, of all tasks in one call, must give the same codes; so must packed ones
            backend.write(program.source, backend.pack(program, program.source, codes))
            backend.run()
            last = program.tasks[-1]
            again = backend.read(last.target, last.shape.out_channels, last.out_size)
            np.testing.assert_array_equal(again, found[last.name])
            return found
        finally:
            backend.close()

    return outputs


def assert_as_reference(run, program, seed=0):
    codes = random_codes(program, seed)
    wanted = run_program(program, codes)
    found = run(program, codes)
    for task in program.tasks:
        assert found[task.name].dtype == task.out.dtype
        np.testing.assert_array_equal(found[task.name], wanted[task.name], err_msg=task.name)
    return wanted


@pytest.mark.parametrize(("bits", "sparse"), DESIGNS)
@pytest.mark.parametrize("kept", [1.0, 0.5, 1 / 9, 0.0])
def test_kept_fractions_at_twice_the_tile_and_one(run, bits, sparse, kept):
    net = Net(size=(5, 7, 7))
    net.conv(net.conv("clip", 9), 17, kept=kept)
    program, _ = compiled(net, small_config(bits, sparse))
    assert_as_reference(run, program)


@pytest.mark.parametrize(
    "shape",
    [
        dict(kernel=1, pad=0),
        dict(kernel=(3, 1, 1), pad=(1, 0, 0)),
        dict(kernel=(1, 3, 3), pad=(0, 1, 1)),
        dict(kernel=(1, 3, 3), pad=(0, 1, 1), stride=(1, 2, 2)),
        dict(kernel=(1, 7, 7), pad=(0, 3, 3), stride=(1, 2, 2)),
        dict(kernel=3, stride=2, pad=1),
        dict(kernel=3, stride=(2, 1, 1), pad=1),
        dict(kernel=3, pad=0, pad_after=1),
        dict(kernel=(3, 3, 3), pad=(0, 1, 2), pad_after=(2, 0, 1)),
        dict(kernel=(7, 7, 7), pad=2, pad_after=3, stride=2),
        dict(kernel=(2, 4, 3), pad=0),
        dict(kernel=1, pad=0, stride=2),
    ],
)
def test_kernels_strides_and_padding(run, shape):
    net = Net(size=(5, 9, 8))
    source = net.conv("clip", 5, 1, pad=0, act="none")  # so its zero point is not the lowest code
    net.conv(source, 7, **shape)
    program, _ = compiled(net, small_config(td=3))
    assert_as_reference(run, program)


@pytest.mark.parametrize("channels", [16, 24])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_transformed_convolutions(run, kernel, channels, bits, monkeypatch):
    """Convolutions in the Winograd form, at odd and even sizes.

    They are too small for it, so its cost of memory traffic is set to 0.
    """
    monkeypatch.setattr(choice, "ELEMENT_COST", 0)
    monkeypatch.setattr(choice, "WEIGHT_COST", 0)
    monkeypatch.setattr(choice, "ONE_AXIS_CHANNELS", 16)
    net = Net(size=(5, 6, 7))
    source = net.conv("clip", channels, 1, pad=0)
    pad = tuple(k // 2 for k in kernel)
    net.conv(source, 18, kernel, pad=pad, kept=0.5)
    program, _ = compiled(net, small_config(bits))
    form = choice.choose_convolution(
        np.ones((18, channels, *kernel), int), program.tasks[-1].shape, (0, 15), exact.FLOAT64, 1
    )
    assert isinstance(form, winograd.WinogradConvolution)
    assert_as_reference(run, program)


@pytest.mark.parametrize("window", [(1, 2, 2), (2, 2, 2), (2, 3, 2), (1, 1, 4), (2, 3, 3)])
@pytest.mark.parametrize("channels", [5, 16])
def test_pools_fused_into_a_convolution(run, window, channels):
    net = Net(size=(5, 7, 6))
    pooled = net.pool(net.conv(net.conv("clip", channels), 6, act="none"), window, act="relu")
    net.conv(pooled, 3, 1, pad=0)
    program, _ = compiled(net)
    fused = [isinstance(task, ConvTask) and task.pool is not None for task in program.tasks]
    # a beat holds 4 positions; a window of 3 along the width does not divide it and is not fused
    assert fused == ([False, True, False] if window[2] != 3 else [False] * 4)
    assert_as_reference(run, program)


@pytest.mark.parametrize(
    "pool",
    [
        dict(kernel=3, stride=1, pad=1),
        dict(kernel=3, stride=2, pad=0, pad_after=1),
        dict(kernel=(1, 3, 3), stride=(1, 2, 2), pad=(0, 1, 0), pad_after=(0, 0, 1)),
        dict(kernel=2, stride=2, pad=1),
        dict(kernel=(2, 3, 3), stride=1, op="average_pool"),
        dict(kernel=3, stride=2, pad=1, op="average_pool"),
        dict(kernel=(4, 7, 7), stride=1, op="average_pool"),
    ],
)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_pools_that_are_tasks(run, pool, bits):
    net = Net()
    source = net.conv("clip", 6, act="none")
    net.conv(net.pool(source, **pool), 3, 1, pad=0)
    program, _ = compiled(net, small_config(bits))
    assert len(program.tasks) == 3
    assert_as_reference(run, program)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_shortcut_and_pool_on_one_convolution(run, bits):
    net = Net(size=(4, 6, 6))
    first = net.conv("clip", 8)
    pooled = net.pool(net.add(net.conv(first, 8, act="none"), first), 2)
    net.conv(pooled, 3, 1, pad=0)
    program, _ = compiled(net, small_config(bits))
    assert program.tasks[1].shortcut is not None
    assert program.tasks[1].pool is not None
    assert_as_reference(run, program)


def test_concat_add_and_copies(run):
    """An add that cannot be fused, or a concat of maps already placed, becomes a copy."""
    net = Net(size=(3, 5, 5))
    a, b = net.conv("clip", 4), net.conv("clip", 3, act="none")
    c = net.concat(a, b, "clip")
    d = net.concat(c, a)
    e = net.conv(d, 14, act="none")
    net.add(net.add(e, d, act="none"), e, act="relu6")
    program, _ = compiled(net)
    assert_as_reference(run, program)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_saturation_at_both_ends(run, bits):
    net = Net(size=(3, 5, 5))
    net.conv(net.conv(net.conv("clip", 8, act="none"), 16, act="none"), 8, act="none")
    program, _ = compiled(net, small_config(bits))
    wanted = assert_as_reference(run, stretched(program, 4))
    middle = wanted[program.tasks[1].name]
    assert {program.tasks[1].lo, program.tasks[1].hi} <= set(np.unique(middle).tolist())


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fully_connected_and_relu6(run, bits):
    net = Net(size=(2, 3, 3))
    net.dense(net.dense(net.conv("clip", 5, act="relu6"), 33, act="relu"), 7)
    program, _ = compiled(net, small_config(bits))
    assert program.output.bits == 16
    assert_as_reference(run, program)


def test_depth_one_and_a_dead_filter(run):
    net = Net(size=(1, 6, 6))
    name = net.conv("clip", 6, (1, 3, 3), pad=(0, 1, 1))
    net.layers[name].weight[2] = 0
    net.layers[name].bias[2] = 0.5
    net.conv(name, 4, (1, 3, 3), pad=(0, 1, 1))
    program, _ = compiled(net)
    assert_as_reference(run, program)


def test_pruned_for_another_tiling_is_right_with_more_kept(run):
    from pynq_kgrc.compress.patterns import Rates, project
    from pynq_kgrc.groups import GroupSize

    net = Net(size=(3, 5, 5))
    name = net.conv(net.conv("clip", 12), 16)
    rates = Rates(rows=Fraction(1, 2))
    net.layers[name].weight[...] = project(net.layers[name].weight, rates, GroupSize(8, 4, 9))
    kept = []
    for gm in (8, 4):
        program, _ = compiled(net, small_config(gm=gm))
        assert_as_reference(run, program)
        kept.append(program.tasks[1].weights.kept[0] / gm)
    assert kept[0] == 0.5 < kept[1]


def test_a_group_that_is_not_enabled_is_not_computed(run):
    net = Net(size=(3, 5, 5))
    name = net.conv(net.conv("clip", 8), 8)
    net.layers[name].weight[:4, 4:] = 0
    program, _ = compiled(net)
    weights = program.tasks[1].weights
    assert weights.enabled.tolist() == [[True, False], [True, True]]
    weights.values[0, 1] = 9  # values of a group that is not enabled are not read
    assert_as_reference(run, program)


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_read_returns_a_copy(name):
    net = Net(size=(1, 1, 1), channels=8)
    net.dense("clip", 8)
    program, _ = compiled(net)
    backend = open_backend(name, program.config)
    backend.load(program)
    results = []
    for seed in (0, 1):
        backend.write(program.source, random_codes(program, seed))
        backend.run()
        results.append(backend.read(program.target, 8, (1, 1, 1)))
        if seed == 0:
            kept = results[0].copy()
    np.testing.assert_array_equal(results[0], kept)
    assert (results[1] != kept).any()
    backend.close()


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_the_range_of_a_run(name):
    net = Net()
    net.conv(net.conv("clip", 4), 4)
    program, _ = compiled(net)
    backend = open_backend(name, program.config)
    assert (backend.name, backend.exclusive) == (name, name == "board")
    backend.load(program)
    backend.write(program.source, random_codes(program))
    wanted = [task.name for task in program.tasks]
    assert [counters.task for counters in backend.run()] == wanted
    codes = backend.read(program.target, 4, program.tasks[-1].out_size)
    for first, last in [(-1, None), (-1, 2), (0, 3), (0, 99), (1, 0), (0, -1), (3, 3), (3, None)]:
        refusal = rf"run\({first}, {last}\): net has 2 tasks; accepted are 0 <= first <= last <= 2"
        with pytest.raises(ProgramError, match=refusal):
            backend.run(first, last)
    assert [backend.run(at, at) for at in range(3)] == [[], [], []]
    # the program and the maps are as they were
    np.testing.assert_array_equal(backend.read(program.target, 4, codes.shape[1:]), codes)
    assert [counters.task for counters in backend.run(1)] == wanted[1:]
    backend.close()


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_a_map_is_packed_for_its_own_slot_and_program(name):
    """One of another program of the same layout would be read as this program's clip."""
    net = Net(channels=8)
    net.conv("clip", 8)
    (program, _), (other, _) = compiled(net, fold=False), compiled(net, fold=False)
    codes = random_codes(program)
    backend = open_backend(name, program.config)
    packed = backend.pack(program, program.source, codes)  # nothing is loaded yet
    backend.load(program)
    backend.write(program.source, packed)
    np.testing.assert_array_equal(backend.read(program.source, 8, codes.shape[1:]), codes)
    if isinstance(packed, PackedMap):
        with pytest.raises(ProgramError, match="pack it for the program that is loaded"):
            backend.write(program.target, packed)
        backend.load(other)
        with pytest.raises(ProgramError, match="pack it for the program that is loaded"):
            backend.write(other.source, packed)
        foreign, _ = compiled(net, small_config(bits=4), fold=False)
        with pytest.raises(ProgramError, match=r"made for small-4 .* this is small-8"):
            backend.pack(foreign, foreign.source, codes)
        with pytest.raises(ProgramError, match=r"takes int8 codes .*, not int16"):
            backend.pack(program, program.source, codes.astype(np.int16))
    else:
        with pytest.raises(ProgramError, match="packed for the accelerator's memory"):
            backend.write(program.source, PackedMap(program, program.source, 0, codes))
    backend.close()


@pytest.mark.parametrize("name", ["emulate", "native", "csim"])
def test_what_ctrl_c_stops_half_way_gives_no_answer(name, monkeypatch):
    """Not the codes of a run that did not end, nor the program before under the new one's name."""
    net = Net(size=(2, 4, 4))
    net.conv(net.conv("clip", 6), 5)
    program, _ = compiled(net)
    backend = open_backend(name, program.config)
    module, codes = sys.modules[type(backend).__module__], random_codes(program)
    target, wanted = program.target, run_program(program, codes)["conv2"]

    def stopped(*_, **__):
        raise KeyboardInterrupt

    backend.load(program)
    backend.write(program.source, codes)
    with monkeypatch.context() as patch:
        patch.setattr(module, "reported_counters" if name == "csim" else "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            backend.run()
    with pytest.raises(DeviceError, match="write the clip again after: a run that did not end"):
        backend.read(target, 5, codes.shape[1:])
    backend.write(program.source, codes)
    backend.run()
    np.testing.assert_array_equal(backend.read(target, 5, codes.shape[1:]), wanted)
    with monkeypatch.context() as patch:
        parts = {"emulate": "Workspace", "native": "count_task", "csim": "ceil_div"}
        patch.setattr(module, parts[name], stopped)
        with pytest.raises(KeyboardInterrupt):
            backend.load(program)
    with pytest.raises(ProgramError, match="no program is loaded"):
        backend.run()
    backend.load(program)
    backend.close()


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_refusals(name):
    net = Net()
    net.conv("clip", 4)
    program, _ = compiled(net, fold=False)
    other = open_backend(name, small_config(bits=4))
    with pytest.raises(ProgramError, match=r"made for small-8 .* this is small-4"):
        other.load(program)
    other.close()
    other.close()
    backend = open_backend(name, program.config)
    with pytest.raises(ProgramError, match="no program is loaded"):
        backend.run()
    backend.load(program)
    codes = random_codes(program)
    with pytest.raises(ProgramError, match=r"takes int8 codes .*, not int16"):
        backend.write(program.source, codes.astype(np.int16))
    with pytest.raises(ProgramError, match=r"not int8 of \(3, 4, 7, 6\)"):
        backend.write(program.source, codes[..., :6])
    with pytest.raises(ProgramError, match=r"holds maps of \(4, 7, 7\), not \(1, 1, 1\)"):
        backend.read(program.source, 3, (1, 1, 1))
    backend.close()


def test_unknown_backend():
    with pytest.raises(DeviceError, match="no backend named 'gpu'; there are emulate"):
        open_backend("gpu", small_config())


def test_config_refuses_by_name():
    with pytest.raises(ConfigError, match=r"tm=12 is not a multiple of gm=8; use 8, 16, 24"):
        small_config(tm=12, gm=8)


def test_every_kind_of_task(run):
    """One program with every kind of task, and with all that can be fused into a convolution."""
    net = Net(size=(4, 6, 6))
    first = net.conv("clip", 8)
    pooled = net.pool(net.add(net.conv(first, 8, act="none"), first), 2)
    pooled = net.pool(pooled, (1, 2, 2), stride=1, op="average_pool")
    net.dense(net.pool(pooled, (2, 1, 1), stride=1, pad=(1, 0, 0)), 5)
    program, _ = compiled(net)
    assert {type(task) for task in program.tasks} == set(get_args(Task))
    convolutions = [task for task in program.tasks if isinstance(task, ConvTask)]
    pools = [task for task in program.tasks if isinstance(task, PoolTask)]
    assert any(task.pool is not None and task.shortcut is not None for task in convolutions)
    assert {task.average for task in pools} == {True, False}
    assert_as_reference(run, program)


@pytest.mark.parametrize("shift", [0, 1, 8, 17, 18, 20, 25, 40, 62])
@pytest.mark.parametrize("bits", [8, 16])
def test_scaling_rounds_every_sum_as_the_integers_do(shift, bits):
    one = 1 << shift
    # multipliers for which some sum, scaled, is as little as possible below a half
    close = (((one >> 1) - 1) * pow(s, -1, one) % one for s in range(1, 97_000, 2))
    mult = [16384, 32767, *[m for m in close if 1 << 14 <= m < 1 << 15]][:9]
    net = Net(size=(1, 4, 4))
    net.conv("clip", len(mult), 1, pad=0)
    program, _ = compiled(net)
    task = msgspec.structs.replace(
        program.tasks[0],
        mult=np.array(mult, np.int32),
        shift=np.full(len(mult), shift, np.uint8),
        bias=np.zeros(len(mult), np.int64),
        in_zero=0,
        out=dataclasses.replace(program.tasks[0].out, bits=bits),
        lo=-(1 << (bits - 1)),
        hi=(1 << (bits - 1)) - 1,
    )
    scaling = Scaling(task, 8, np.full((len(mult), 3, 1), 127), (-255, 255))
    # the largest sums are +-3 * 127 * 255: scaled, their range must be below 2^15 for int16
    assert scaling.integer_dtype == (np.int16 if shift >= 18 and bits == 8 else np.int32)
    sums = np.arange(-97_000, 97_000.0, dtype=np.float32).reshape(50, -1, 1)
    sums = np.repeat(sums, len(mult), axis=2)
    codes = np.empty(sums.shape, task.out.dtype)
    every = slice(0, len(mult))
    scaling.store(sums, codes, every, None)
    np.testing.assert_array_equal(codes, scaling._in_integers(sums, every, None))
