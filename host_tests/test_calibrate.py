"""Calibration: ranges, shared formats, and the accuracy of the program's values."""

import numpy as np
import pytest
from networks import Net, compiled, small_config

from pynq_kgrc.analysis.fidelity import measure_fidelity
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compress.calibrate import (
    HEADROOM,
    METHODS,
    apply_ranges,
    choose_quant,
    choose_range,
    choose_ranges,
    choose_weight_scale,
    observe,
    tie,
)
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import run_float
from pynq_kgrc.quant import choose_params
from pynq_kgrc.runtime import Session


def branching_net():
    net = Net(size=(4, 8, 8))
    first = net.conv("clip", 8)
    left = net.conv(first, 8)
    right = net.pool(net.conv(first, 8, act="none"), 3, stride=1, pad=1)
    joined = net.concat(left, right)
    net.dense(net.pool(joined, 2), 6)
    return net


def test_concat_parts_and_pools_share_one_format():
    graph = branching_net().graph()
    ties = tie(graph)
    assert ties["conv2"] == ties["concat5"] == ties["pool4"] == ties["conv3"] == ties["pool6"]
    assert ties["conv1"] != ties["conv2"]
    quantized = choose_quant(graph, branching_net().clips(), 8)
    assert quantized["conv2"].out_quant == quantized["conv3"].out_quant
    assert quantized["conv1"].out_quant.zero_point == -128  # after a ReLU all codes are used
    assert quantized["conv3"].out_quant.zero_point > -128


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_chosen_by_the_method_for_all_tensors_of_a_format(method):
    net = branching_net()
    graph, clips = net.graph(), net.clips()
    seen = observe(graph, clips)
    found = choose_ranges(graph, clips, 8, method)
    assert found.observed == {name: (each.low, each.high) for name, each in seen.items()}
    parts = [seen[name] for name, root in tie(graph).items() if root == tie(graph)["concat5"]]
    assert len(parts) > 3
    assert found.chosen[tie(graph)["concat5"]] == choose_range(parts, 8, method)
    least, cut = (choose_range(parts, 8, each) for each in ("minmax", "percentile"))
    assert least != cut, "the methods differ on these clips"


def test_ranges_of_another_network_are_refused():
    net = branching_net()
    found = choose_ranges(net.graph(), net.clips(), 8)
    other = Net(size=(4, 8, 8))
    other.dense(other.conv("clip", 8), 6)
    with pytest.raises(CompileError, match="ranges are of another network; only one of both has"):
        apply_ranges(other.graph(), found)


def test_the_result_is_kept_at_sixteen_bits_with_headroom():
    net = branching_net()
    graph = choose_quant(net.graph(), net.clips(), 8)
    quant = graph[graph.output].out_quant
    seen = observe(net.graph(), net.clips())[graph.output]
    assert quant.bits == 16
    assert quant.scale * quant.max >= max(-seen.low, seen.high) * (HEADROOM - 1)


def test_the_input_format_comes_from_the_pixels_not_the_clips():
    net = branching_net()
    dark = [np.full((3, 4, 8, 8), -0.9, np.float32)]
    quant = choose_quant(net.graph(), dark, 8)["clip"].out_quant
    assert quant == choose_params(-1.0, 1.0, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_mse_ranges_have_the_least_error(bits):
    rng = np.random.default_rng(0)
    samples = np.append(rng.exponential(1.0, 20000), [40.0]).astype(np.float32)
    net = Net()
    seen = observe(net.graph(), net.clips(1))["clip"]
    seen.low, seen.high, seen.samples = 0.0, 40.0, [samples]
    errors = {}
    for method in METHODS:
        params = choose_params(*choose_range([seen], bits, method), bits)
        errors[method] = np.mean((params.dequantize(params.quantize(samples)) - samples) ** 2)
    assert errors["mse"] < errors["minmax"]
    assert errors["mse"] <= errors["percentile"] * 1.05


def test_weight_scales_cover_each_filter():
    weight = (
        np.random.default_rng(0).normal(size=(5, 3, 3, 3, 3))
        * np.arange(1, 6)[:, None, None, None, None]
    )
    weight[2] = 0
    scale = choose_weight_scale(weight, 8, "mse")
    np.testing.assert_allclose(scale * 127, np.abs(weight).max(axis=(1, 2, 3, 4)))
    assert (choose_weight_scale(weight, 4, "mse") <= choose_weight_scale(weight, 4, "minmax")).all()


def test_quantization_never_moves_a_zero():
    net = Net()
    net.conv(net.conv("clip", 8), 8, kept=0.3)
    zero = net.layers["conv2"].weight.reshape(8, 8, 27) == 0
    program, _ = compiled(net)
    task = program.tasks[1]
    codes = task.weights.expand(task.shape, program.config.gm, program.group_columns(task))
    assert (codes[zero] == 0).all()


@pytest.mark.parametrize(("bits", "least_db"), [(16, 65), (8, 25), (4, 3)])
def test_the_program_stays_close_to_float(bits, least_db):
    net = branching_net()
    graph = net.graph()
    rng = np.random.default_rng(5)
    frames = [rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8) for _ in range(3)]
    quantized = choose_quant(graph, [graph.clip.normalise(f) for f in frames], bits)
    report = measure_fidelity(graph, lower(quantized, small_config(bits)), frames)
    assert report.clips == 3
    assert {task.task for task in report.tasks} >= {"conv1", "conv2", "pool4"}
    assert min(task.snr_db for task in report.tasks) > least_db
    if bits == 16:
        assert report.agreeing == 3


def dead_relu(net):
    """All outputs of the first layer are zero."""
    dead = net.conv("clip", 8)
    net.layers[dead].bias[...] = -1000
    net.dense(net.pool(net.conv(dead, 8), 2, op="average_pool"), 4)


def dead_part_of_a_concat(net):
    a, b = net.conv("clip", 8), net.conv("clip", 8)
    net.layers[a].bias[...] = -1000
    net.dense(net.concat(a, b), 4)


def nearly_dead(net):
    """One output of thousands is above zero, by next to nothing."""
    first = net.conv("clip", 8)
    graph = net.graph()
    _, highest = net.layers[first], run_float(graph, net.clips(1)[0]).max(axis=(1, 2, 3))
    net.layers[first].bias[...] -= highest + 1000 * np.arange(8) - 1e-9
    net.dense(first, 4)


def zero_filters(net):
    first = net.conv("clip", 8)
    net.layers[first].weight[2:] = 0
    second = net.conv(first, 8)
    net.layers[second].weight[...] = 0
    net.dense(second, 4)


def zero_head(net):
    head = net.dense(net.conv("clip", 8), 4)
    net.layers[head].weight[...] = 0
    net.layers[head].bias[...] = 0


def sum_that_cancels(net):
    """A residual block whose branch is the negative of its input."""
    first = net.conv("clip", 8)
    branch = net.conv(first, 8, 1, pad=0, act="none")
    net.layers[branch].weight[...] = -np.eye(8).reshape(8, 8, 1, 1, 1)
    net.layers[branch].bias[...] = 0
    net.dense(net.conv(net.add(branch, first), 8, act="none"), 4)


def small_logits(net):
    """Weights of the head that cancel: logits of 16 bits far below the largest sum."""
    first = net.conv("clip", 8)
    head = net.dense(first, 4)
    net.layers[head].weight[...] = 1000
    net.layers[head].weight[:, 4:] = -1000
    net.layers[first].weight[4:] = net.layers[first].weight[:4]
    net.layers[first].bias[4:] = net.layers[first].bias[:4]


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "make",
    [
        *(dead_relu, dead_part_of_a_concat, nearly_dead, zero_filters, zero_head),
        *(sum_that_cancels, small_logits),
    ],
)
def test_tensors_and_weights_of_zeros_compile(make, bits, method):
    """The logits are those of the float network, up to the design's width."""
    net = Net(size=(4, 8, 8))
    make(net)
    graph = net.graph()
    frames = np.random.default_rng(3).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    clip = graph.clip.normalise(frames)
    program = lower(choose_quant(graph, [clip], bits, method), small_config(bits))
    wanted = run_float(graph, clip).ravel()
    with Session(program) as session:
        logits = session.run(frames).logits
    assert np.isfinite(logits).all()
    if make not in (sum_that_cancels, small_logits):  # their error is that of what cancels
        error = {16: 0.001, 8: 0.05, 4: 0.6}[bits] * max(np.abs(wanted).max(), 1e-3)
        np.testing.assert_allclose(logits, wanted, atol=error)


def concat_of(net, ratio, pooled=False):
    """A concat of `ratio` times as large values and those of a second part."""
    small, large = net.conv("clip", 8), net.conv("clip", 8)
    net.layers[large].weight[...] *= ratio
    net.layers[large].bias[...] *= ratio
    joined = net.concat(net.pool(small, 1) if pooled else small, net.pool(large, 1))
    net.dense(joined, 4)
    return net


@pytest.mark.parametrize(("bits", "ratio"), [(16, 10000), (8, 40), (4, 10)])
@pytest.mark.parametrize("pooled", [True, False])
def test_a_small_part_of_a_concat_is_told(bits, ratio, pooled):
    net = concat_of(Net(size=(4, 8, 8)), ratio, pooled)
    part = "pool3" if pooled else "conv1"
    told = rf"concat\d: its part {part} lies within 0 to [\d.]+, but .*: {part} is coded in .* dB"
    with pytest.warns(UserWarning, match=told) as warned:
        choose_quant(net.graph(), net.clips(), bits)
    assert len(warned) == 1
    choose_quant(concat_of(Net(size=(4, 8, 8)), 2, pooled).graph(), net.clips(), bits)


def test_mistakes_are_named():
    net = branching_net()
    graph = net.graph()
    with pytest.raises(CompileError, match="calibration needs at least one clip"):
        choose_quant(graph, [], 8)
    with pytest.raises(CompileError, match=r"bits=7, method='mse'; accepted are \(16, 8, 4\)"):
        choose_quant(graph, net.clips(), 7)
    with pytest.raises(CompileError, match=r"accepted are .*minmax"):
        choose_quant(graph, net.clips(), 8, "best")
    with pytest.raises(CompileError, match=r"net takes a clip of shape \(3, 4, 8, 8\), not"):
        run_float(graph, np.zeros((3, 4, 8, 7), np.float32))
    net.layers["conv2"].weight[0, 0] = np.nan
    with pytest.raises(CompileError, match="conv2: its output is not finite; check the weights"):
        choose_quant(net.graph(), net.clips(), 8)
