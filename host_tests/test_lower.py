"""From graph to program: what is fused, where tensors are placed, what is refused."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
from networks import Net, compiled, small_config

from pynq_kgrc.analysis.fidelity import written_tensor
from pynq_kgrc.compiler.lower import clamp_codes, lower, quantize_weight
from pynq_kgrc.compiler.pack import pack
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ACTIVATIONS, INPUT, ConvShape, Layer, activate, run_float
from pynq_kgrc.quant import QuantParams
from pynq_kgrc.runtime import Session


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


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_copy_holds_the_codes_of_its_source(bits):
    """A concat whose parts do not begin at vectors, a part of two concats, an output concat."""
    net = Net(size=(2, 4, 5))
    a, b = net.conv("clip", 5), net.conv("clip", 3)
    unaligned = net.concat(a, b)
    c = net.conv(unaligned, 4)
    shared = net.concat(c, unaligned)
    twice = net.concat(c, net.conv(shared, 4))
    net.dense(net.add(twice, twice), 3)
    program, graph = compiled(net, small_config(bits))
    frames = np.random.default_rng(1).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    torch = pytest.importorskip("torch", reason="no torch: training is not compared")
    from pynq_kgrc.compress.fake_quant import FakeQuantNetwork

    clip = torch.from_numpy(graph.clip.normalise(frames).astype(np.float64))[None]
    trained = FakeQuantNetwork(graph).codes(clip)
    with Session(program) as session:
        codes = {name: codes for name, codes, _ in session.trace(frames)}
        logits = session.run(frames).logits
    np.testing.assert_array_equal(codes[unaligned], np.concatenate([codes[a], codes[b]]))
    np.testing.assert_array_equal(codes[f"{shared}.copy0"], codes[c])
    trained_logits = trained[graph.output].detach().numpy().ravel() * program.output.scale
    np.testing.assert_allclose(trained_logits, logits, rtol=1e-12)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("filters", [4, 5], ids=["aligned", "unaligned"])
def test_a_concat_may_be_the_result(bits, filters):
    net = Net(size=(2, 4, 5))
    a, b = net.conv("clip", filters), net.conv("clip", filters)
    net.concat(a, b)
    program, graph = compiled(net, small_config(bits))
    frames = np.random.default_rng(1).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    with Session(program) as session:
        found = {name: codes for name, codes, _ in session.trace(frames)}
        logits = session.run(frames).logits
    codes = np.concatenate([found[a], found[b]])
    np.testing.assert_allclose(logits, graph[a].out_quant.dequantize(codes).ravel(), rtol=1e-12)


def dense_block(layers):
    """Each convolution reads a concat of all the maps before it (DenseNet)."""
    net = Net()
    maps = [net.conv("clip", 8)]
    for _ in range(layers):
        joined = net.concat(*maps) if len(maps) > 1 else maps[0]
        maps.append(net.conv(net.conv(joined, 8, 1, pad=0), 8))
    net.dense(net.pool(net.concat(*maps), 4, stride=4), 3)
    return net


def test_concats_that_begin_alike_lie_in_the_last_of_them(monkeypatch):
    """No task copies, and the logits are those of the program that copies each part."""
    program, graph = compiled(dense_block(4))
    layers = {layer.name for layer in graph.layers}
    assert {task.name for task in program.tasks} <= layers
    monkeypatch.setattr("pynq_kgrc.compiler.lower._inside_another", lambda *_: None)
    copying = lower(graph, program.config)
    assert len(copying.tasks) == len(program.tasks) + 9
    frames = np.random.default_rng(0).integers(0, 256, (4, 7, 7, 3), dtype=np.uint8)
    logits = []
    for each in (program, copying):
        with Session(each, "emulate") as session:
            logits.append(session.run(frames).logits)
    np.testing.assert_array_equal(*logits)
    assert np.ptp(logits[0]) > 0


def test_a_concat_that_begins_elsewhere_is_copied():
    """Not one after the other, or of another format than the larger concat."""
    net = Net()
    a, b, c = (net.conv("clip", 8) for _ in range(3))
    swapped = net.concat(b, a)
    net.conv(net.concat(a, b, c, net.conv(swapped, 8)), 4)
    program, _ = compiled(net)
    assert [t.name for t in program.tasks if "copy" in t.name] == [
        f"{swapped}.copy0",
        f"{swapped}.copy1",
    ]


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
    """Lifetimes computed independently: no two buffers that are alive together overlap."""
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


def quantized_reals(graph, program, frames):
    """Float outputs by name, of the graph with the quantized weights of the program."""
    weights = {}
    for layer in graph.convolutions():
        codes, scale = quantize_weight(layer, program.config.bits)
        weights[layer.name] = (codes * scale[:, None, None]).reshape(layer.weight.shape)
    found = {}
    clip = program.input.dequantize(program.encode_clip(frames))
    run_float(graph.with_weights(weights), clip, lambda layer, reals: found.update({layer: reals}))
    return {layer.name: reals for layer, reals in found.items()}


@pytest.mark.parametrize("backend", ["emulate", "csim"])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_new_activation_is_one_line_of_a_table(bits, backend, monkeypatch):
    """How to add a clamp: name its bounds. Here [-1, 1], which torch calls Hardtanh."""
    if backend == "csim" and shutil.which("g++") is None:
        pytest.skip("no g++ to build the C-simulation")
    monkeypatch.setitem(ACTIVATIONS, "hardtanh", (-1.0, 1.0))
    net = Net(size=(2, 6, 8))
    alone = net.conv("clip", 8, act="hardtanh")
    ridden = net.conv("clip", 8, act="hardtanh")
    net.pool(ridden, (1, 2, 2), act="relu")
    total = net.conv("clip", 8, act="none")
    net.dense(net.add(total, alone, act="hardtanh"), 2)  # the output has 16 bits: not compared
    for name in (alone, ridden, total):
        net.layers[name].weight[...] *= 4  # so that the bounds bind
    torch = pytest.importorskip("torch", reason="no torch: training is not compared")
    from pynq_kgrc.compress.fake_quant import FakeQuantNetwork

    network = FakeQuantNetwork(choose_quant(net.graph(), net.clips(), bits))
    graph = network.to_graph()
    program = lower(graph, small_config(bits))
    assert len(program.tasks) == 4
    frames = np.random.default_rng(1).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    reals = quantized_reals(graph, program, frames)
    pixels = np.stack([graph.clip.pixel_values()[c][frames[..., c]] for c in range(3)])
    trained = network.codes(torch.from_numpy(pixels)[None])
    with Session(program, backend) as session:
        for task, (_, codes, _) in zip(program.tasks[:3], session.trace(frames), strict=False):
            name = written_tensor(graph, task)
            ours = trained[name][0].detach().numpy() + task.out.zero_point
            np.testing.assert_array_equal(codes, ours, name)
            wanted = graph[name].out_quant.quantize(reals[name])
            assert np.abs(codes.astype(int) - wanted).max() <= 1 + name.startswith("add")
            low, high = task.out.dequantize(np.array([codes.min(), codes.max()]))
            assert low == pytest.approx(0 if name.startswith("pool") else -1, abs=task.out.scale)
            assert high == pytest.approx(1, abs=task.out.scale)


def test_activations_one_after_the_other_clamp_in_that_order(monkeypatch):
    for name, bounds in {"far": (3.0, None), "below": (-9.0, -2.0), "all": (-99.0, 99.0)}.items():
        monkeypatch.setitem(ACTIVATIONS, name, bounds)
    every = np.arange(-128, 128)
    for zero_point in (-128, -50, 90):
        out = QuantParams(8, 0.1, zero_point)
        for names in itertools.product(ACTIVATIONS, repeat=2):
            lo, hi = clamp_codes(out, *names)
            reals = out.dequantize(every)
            for name in names:
                # bounds that no code stands for are clamped to the type
                reals = out.dequantize(out.quantize(activate(reals, name)))
            np.testing.assert_array_equal(out.quantize(reals), np.clip(every, lo, hi), str(names))


def test_a_pool_keeps_the_activation_of_the_convolution_it_rides_on():
    net = Net()
    convolution = net.conv("clip", 4, act="relu6")
    net.dense(net.pool(convolution, act="relu"), 2)
    graph = choose_quant(net.graph(), net.clips(), 8)
    wide = QuantParams(8, 0.1, -50)  # reals from -7.8 to 17.7: no bound is that of the type
    layers = (replace(e, out_quant=wide) if e.op != INPUT else e for e in graph.layers)
    program = lower(replace(graph, layers=tuple(layers)), small_config())
    assert program.tasks[0].pool is not None
    assert (program.tasks[0].lo, program.tasks[0].hi) == (-50, 10)


def test_a_pool_whose_window_the_buffers_do_not_hold_is_a_task_of_its_own():
    net = Net(size=(2, 36, 36))
    convolution = net.conv("clip", 4, act="none")
    pool = net.pool(convolution, (1, 36, 4), act="relu")
    net.dense(pool, 2)
    program, _ = compiled(net, small_config(beat=4))
    assert [task.name for task in program.tasks][:2] == [convolution, pool]
    assert program.tasks[0].pool is None
    assert program.tasks[0].lo == program.tasks[0].out.min
    assert program.tasks[1].lo == program.tasks[1].out.zero_point


def test_a_layer_refuses_what_it_does_not_know():
    with pytest.raises(CompileError, match="conv1: no activation 'sigmoid'; there are none, relu"):
        Net().conv("clip", 4, act="sigmoid")
    with pytest.raises(CompileError, match="x: no operation 'convolve'; there are input, conv"):
        Layer("x", "convolve", ("clip",), 3, (1, 1, 1))


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
    with pytest.raises(CompileError, match="concat3: an activation after a concat; put it before"):
        compiled(joined)
