"""Graph to program: what rides, what is placed where, what is refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from networks import Net, compiled, small_config

from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compiler.pack import pack
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ConvShape


def test_a_residual_block_is_two_tasks_and_its_shortcut():
    net = Net()
    a = net.conv("clip", 8)
    b = net.conv(net.conv(a, 8), 8, act="none")
    net.dense(net.add(b, a), 4)
    program, graph = compiled(net)
    names = [task.name for task in program.tasks]
    assert names == ["conv1", "conv2", "conv3", "conv5"]
    carrier = program.tasks[2]
    assert carrier.shortcut.source == program.tasks[0].target
    assert carrier.lo == graph["add4"].out_quant.zero_point  # the add's ReLU


def test_a_downsampled_shortcut_rides_on_the_later_convolution():
    net = Net()
    a = net.conv("clip", 8)
    b = net.conv(a, 8, act="none")
    down = net.conv(a, 8, 1, pad=0, act="none")
    net.dense(net.add(b, down), 4)
    program, _ = compiled(net)
    assert program.tasks[2].name == down
    assert program.tasks[2].shortcut is not None


def test_an_add_that_cannot_ride_becomes_a_diagonal_convolution():
    net = Net()
    a, b = net.conv("clip", 8), net.conv("clip", 8)  # both have an activation of their own
    net.dense(net.add(a, b), 4)
    program, _ = compiled(net)
    assert [task.name for task in program.tasks] == ["conv1", "conv2", "add3", "conv4"]
    enabled = program.tasks[2].weights.enabled
    np.testing.assert_array_equal(enabled, np.eye(2, dtype=bool))


def test_concat_is_placement():
    net = Net()
    a, b = net.conv("clip", 8), net.conv("clip", 4)
    joined = net.concat(b, a)
    net.conv(net.conv(joined, 4), 4)
    program, _ = compiled(net)
    assert len(program.tasks) == 4
    first, second, reader = program.tasks[:3]
    assert first.target.buffer == second.target.buffer == reader.source.buffer
    assert (second.target.channel, first.target.channel, reader.source.channel) == (0, 4, 0)


def test_a_concat_in_a_concat_is_placement_too():
    net = Net()
    a, b, c = (net.conv("clip", 4) for _ in range(3))
    net.conv(net.concat(c, net.concat(b, a)), 4)
    program, _ = compiled(net)
    assert [task.target.channel for task in program.tasks[:3]] == [8, 4, 0]


def test_buffers_that_live_together_do_not_overlap_and_others_share():
    net = Net(size=(4, 4, 8))
    name = "clip"
    for _ in range(6):
        name = net.conv(name, 8)
    net.dense(name, 4)
    program, _ = compiled(net)
    sizes = [buffer.nbytes(program.config) for buffer in program.buffers]
    assert program.arena_bytes < sum(sizes)
    assert program.arena_bytes == max(a + b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("seed", range(8))
def test_no_task_overwrites_what_is_still_needed(seed):
    """Lifetimes written out again: at each task, every live buffer has its bytes to itself."""
    net = Net(size=(2, 5, 5), seed=seed)
    rng = np.random.default_rng(seed)
    names = [net.conv("clip", 4)]
    for _ in range(8):
        a, b = (str(rng.choice(names)) for _ in range(2))
        same = net.layers[a].channels == net.layers[b].channels
        if same and a != b and rng.random() < 0.5:
            names.append(net.add(a, b))
        elif a != b and rng.random() < 0.5:
            names.append(net.concat(a, b))
        else:
            names.append(net.conv(a, 4 * int(rng.integers(1, 4)), act="none"))
    net.conv(net.concat(*dict.fromkeys(names[-3:])), 4)
    program, _ = compiled(net)

    def reads(task):
        shortcut = getattr(task, "shortcut", None)
        return {task.source.buffer} | ({shortcut.source.buffer} if shortcut else set())

    written_at = {program.source.buffer: -1}
    for time, task in enumerate(program.tasks):
        written_at.setdefault(task.target.buffer, time)
    last_use = dict(written_at)
    for time, task in enumerate(program.tasks):
        for buffer in reads(task) | {task.target.buffer}:
            last_use[buffer] = time
    for a, b in itertools.combinations(written_at, 2):
        together = written_at[a] <= last_use[b] and written_at[b] <= last_use[a]
        first, second = program.buffers[a], program.buffers[b]
        apart = (
            first.offset + first.nbytes(program.config) <= second.offset
            or second.offset + second.nbytes(program.config) <= first.offset
        )
        assert apart or not together, (a, b)


def test_pack_keeps_what_the_fullest_group_keeps_rounded_up():
    config = small_config()  # G_M = 4, two rows and three columns a cycle
    codes = np.zeros((8, 4, 9), np.int8)
    codes[0, 0, 1] = codes[5, 1, 2] = codes[5, 1, 7] = codes[6, 3, 8] = 1
    weights = pack(codes, config)
    assert weights.kept == (2, 3)
    assert weights.enabled.tolist() == [[True], [True]]
    assert weights.rows[1, 0].tolist() == [1, 2]
    assert weights.cols[1, 0, 0].tolist() == [2, 7, 8]
    shape = ConvShape(4, (1, 3, 3), (1, 3, 3), filters=8)
    np.testing.assert_array_equal(weights.expand(shape, 4, 9), codes)


def test_modes_follow_from_what_is_kept():
    shape = ConvShape(4, (1, 3, 3), (1, 3, 3), filters=4)
    rng = np.random.default_rng(0)
    modes = {}
    for rows, cols in itertools.product((2, 4), (3, 9)):
        codes = rng.integers(1, 9, (4, 4, 9)).astype(np.int8)
        codes[rows:] = 0
        codes[:, :, cols:] = 0
        weights = pack(codes, small_config())
        modes[rows, cols] = weights.mode(4, 9)
        np.testing.assert_array_equal(weights.expand(shape, 4, 9), codes)
    assert modes == {(2, 3): "KGRC", (2, 9): "KGR", (4, 3): "KGC", (4, 9): "dense"}
    assert pack(codes * 0, small_config(sparse=False)).kept == (4, 9)


def test_refusals_name_the_layer():
    net = Net()
    net.dense(net.conv("clip", 8), 4)
    graph = net.graph()
    with pytest.raises(CompileError, match="clip has no format of codes; run choose_quant first"):
        lower(graph, small_config())
    quantized = choose_quant(graph, net.clips(), 8)
    with pytest.raises(CompileError, match=r"clip is quantized to 8 bits, small-4 works on 4"):
        lower(quantized, small_config(4))
    joined = Net()
    joined.conv(joined.concat(joined.conv("clip", 4), joined.conv("clip", 4)), 4)
    joined.layers["concat3"] = replace(joined.layers["concat3"], activation="relu")
    with pytest.raises(CompileError, match="concat3: put the activation before the concat"):
        compiled(joined)
