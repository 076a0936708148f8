"""Windows with too many taps are cut into smaller ones that compute the same."""

import shutil
import time

import numpy as np
import pytest
from networks import Net, small_config

from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.accelerator.cutting import cut_convolution, cut_pools, cut_window
from pynq_kgrc.accelerator.header import MAX_TAPS
from pynq_kgrc.analysis.description import describe
from pynq_kgrc.analysis.fidelity import measure_fidelity
from pynq_kgrc.backends.image import build_image
from pynq_kgrc.compiler.latency import PrunedCycles
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import run_float, run_layer_float
from pynq_kgrc.runtime import Session

BACKENDS = ["emulate", "board"] + ["csim"] * (shutil.which("g++") is not None)

WINDOWS = {
    "global": dict(size=(8, 16, 16), kernel=(8, 16, 16)),
    "two outputs": dict(size=(8, 16, 32), kernel=(8, 16, 16)),
    "prime": dict(size=(1, 1, 521), kernel=(1, 1, 521)),
    "more than the kernel": dict(size=(2, 2, 261), kernel=(2, 2, 257), stride=300),
    "overlapping": dict(size=(9, 10, 11), kernel=9, stride=1),
    "strided": dict(size=(20, 20, 20), kernel=10, stride=4),
    "padded": dict(size=(9, 9, 9), kernel=9, stride=2, pad=4),
    "padded after": dict(
        size=(4, 15, 15), kernel=(4, 16, 16), stride=16, pad=0, pad_after=(0, 1, 1)
    ),
    "three steps": dict(size=(64, 64, 70), kernel=64, stride=64),
}


def pooled(op, size, kernel, stride=None, pad=0, pad_after=None):
    net = Net(size=size, channels=2)
    return net, net.pool("clip", kernel, stride or kernel, pad, pad_after, op=op)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("op", ["max_pool", "average_pool"])
def test_pools_in_steps_pool_the_same(name, op):
    net, pool = pooled(op, **WINDOWS[name])
    graph = net.graph()
    cut = cut_pools(graph)
    if name == "prime" and op == "average_pool":
        assert len(cut.layers) == 2  # no divisor: it stays, and `lower` refuses it
        return
    assert len(cut.layers) > 2
    assert len({layer.name for layer in cut.layers}) == len(cut.layers)
    assert max(layer.shape.taps for layer in cut.layers[1:]) <= MAX_TAPS
    clip = net.clips(1)[0]
    wanted = run_float(graph, clip)
    assert cut.output == pool
    np.testing.assert_allclose(run_float(cut, clip), wanted, rtol=1e-4, atol=1e-6)
    if op == "max_pool":
        np.testing.assert_array_equal(run_float(cut, clip), wanted)


@pytest.mark.parametrize("name", WINDOWS)
def test_convolutions_in_steps_compute_the_same(name):
    window = {"stride": 1, "pad": 0, **WINDOWS[name]}
    if name == "three steps":
        window = dict(size=(42, 43, 44), kernel=41, stride=1, pad=0)  # dilation 20, as traced
    net = Net(size=window.pop("size"), channels=2)
    layer = net.layers[net.conv("clip", 3, act="none", **window)]
    if name == "three steps":
        sparse = np.zeros_like(layer.weight)
        sparse[:, :, ::20, ::20, ::20] = layer.weight[:, :, ::20, ::20, ::20]
        layer.weight[...] = sparse
    clip = net.clips(1)[0]
    layers = cut_convolution(layer)
    assert len(layers) > 1
    assert layers[-1].shape.macs < 8 * layer.shape.own_macs
    reals = clip
    for part in layers:
        assert part.shape.taps <= MAX_TAPS
        reals = run_layer_float(part, [reals])
    wanted = run_layer_float(layer, [clip])
    np.testing.assert_allclose(reals, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("sparse", [True, False])
def test_what_has_too_many_taps_runs(backend, bits, sparse):
    """A large kernel with a shortcut, both kinds of large pools, and a large linear layer."""
    net = Net(size=(4, 12, 16))
    stem = net.conv("clip", 5, 1, pad=0)
    large = net.conv(stem, 5, (3, 13, 15), 1, (1, 6, 7), act="none")
    both = net.add(large, stem)
    mean = net.pool(both, (3, 13, 15), 1, (1, 6, 7), op="average_pool")
    most = net.pool(mean, (3, 13, 15), 1, (1, 6, 7))
    head = net.dense(most, 3)
    config = small_config(bits, sparse)
    graph = net.graph()
    frames = np.random.default_rng(0).integers(0, 256, (4, 12, 16, 3), dtype=np.uint8)
    program = lower(choose_quant(graph, [graph.clip.normalise(frames)], bits), config)
    assert [task.name for task in program.tasks] == [
        *(stem, f"{large}.unfold", large, f"{mean}.part", mean),
        *(f"{most}.part", most, f"{head}.unfold", head),
    ]
    build_image(program)
    with Session(program, backend) as session:
        logits = session.run(frames).logits
        codes = {name: codes for name, codes, _ in session.trace(frames)}
    wanted = run_float(graph, graph.clip.normalise(frames)).ravel()
    error = {16: 0.002, 8: 0.1, 4: 1.0}[bits]
    assert np.abs(logits - wanted).max() < error * np.abs(wanted).max()
    document = describe(program)
    assert document.macs_kept < 1.1 * document.macs_dense
    cycles = PrunedCycles(program)(graph[head], graph[head].weight != 0)
    assert cycles > 0
    assert codes[most].shape == (5, 4, 12, 16)


def test_the_fidelity_of_a_part_that_is_fused_is_measured():
    net = Net(size=(8, 16, 16))
    convolution = net.conv("clip", 4, act="none")
    pool = net.pool(convolution, (8, 16, 16))
    net.dense(pool, 3)
    graph = net.graph()
    frames = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    program = lower(choose_quant(graph, [graph.clip.normalise(frames)], 8), small_config())
    assert program.tasks[0].pool is not None  # a part of the pool
    report = measure_fidelity(graph, program, [frames])
    assert [task.task for task in report.tasks] == [convolution, pool, "conv3"]
    assert min(task.snr_db for task in report.tasks) > 20


def test_a_cut_is_found_soon():
    """Axes with many divisors, and a prime one."""
    began = time.process_time()
    for kernel in ((512, 112, 112), (521, 121, 120), (720, 96, 96)):
        layer = pooled("max_pool", kernel, kernel)[0].layers["pool1"]
        assert cut_window(layer.shape, overlaps=True) is not None
    assert time.process_time() - began < 5


def test_one_window_holds_what_it_can():
    net, pool = pooled("max_pool", (8, 8, 8), 8)
    assert len(cut_pools(net.graph()).layers) == 2
    assert (
        cut_window(pooled("max_pool", (1, 1, 1040), (1, 1, 521), 519, 0)[0].layers["pool1"].shape)
        is None
    )


def test_what_cannot_be_cut_is_named():
    net = Net(size=(1, 1, 600), channels=3)
    net.dense(net.pool("clip", (1, 1, 521), 1, op="average_pool"), 3)
    with pytest.raises(
        CompileError, match=r"pool1: its window \(1, 1, 521\) has 521 taps, the acc"
    ):
        lower(choose_quant(net.graph(), net.clips(), 8), small_config())


@pytest.mark.filterwarnings("ignore:concat.*its part:UserWarning")
@pytest.mark.parametrize("seed", range(60))
def test_what_compiles_loads(seed):
    """Large windows, strides, pools and concats, for a design of the paper and a small one."""
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.choice([1, 2, 7, 16, 33, 70], 3))
    net = Net(size=size, seed=seed)
    source = "clip"
    for _ in range(int(rng.integers(1, 4))):
        shape = net.layers[source].size
        kernel = [int(rng.choice([1, 3, min(n, 11), n])) for n in shape]
        kernel = [min(k, n) for k, n in zip(kernel, shape, strict=True)]
        stride = [int(rng.choice([1, 2, k, k + 9])) for k in kernel]
        pad = [int(rng.integers(0, k // 2 + 1)) for k in kernel]
        op = rng.choice(["conv", "max_pool", "average_pool", "concat"])
        if op == "concat":
            source = net.concat(source, source, net.conv(source, 3, 1, pad=0))
        elif op == "conv" and np.prod(kernel) < 20000:
            source = net.conv(source, int(rng.integers(1, 12)), kernel, stride, pad, act="none")
        elif op != "conv":
            source = net.pool(source, kernel, stride, pad, op=op)
    if np.prod(net.layers[source].size) < 20000:
        source = net.dense(source, 3)
    if source == "clip":
        return
    bits = int(rng.choice([16, 8, 4]))
    try:
        quantized = choose_quant(net.graph(), net.clips(1), bits)
        program = lower(quantized, preset(f"{bits}-sparse") if seed % 2 else small_config(bits))
    except CompileError as error:
        named = str(error).startswith(tuple(f"{name}:" for name in net.layers))
        if not named:
            raise
        return
    build_image(program)
    if max(np.prod(task.shape.out_size) for task in program.tasks) > 40000:
        return
    frames = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    with Session(program) as emulated, Session(program, BACKENDS[-1]) as simulated:
        for (name, codes, _), (_, same, _) in zip(
            emulated.trace(frames), simulated.trace(frames), strict=True
        ):
            np.testing.assert_array_equal(codes, same, name)
