"""Quantized ONNX files: their scales, zero points and ranges of codes are kept, or refused."""

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from quantized_onnx import compare
from random_onnx import RandomGraph

from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.backends.base import open_backend
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import CompileError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.models.onnx_trace import trace_onnx

FILES = Path(__file__).resolve().parent / "onnx_files"
QDQ = sorted((*FILES.glob("qdq-*.onnx"), *FILES.glob("qcdq-*.onnx")))

TIES = 0.01
"""Largest share of a task's codes that may differ by one: reals that are close to a half."""

TWO_ROUNDINGS = 0.3
"""The same with a shortcut, which is rounded separately: 1/4 if fractions are uniform."""


def shape_of(path):
    return [d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]


def clip_of(shape):
    frames, height, width = shape[2:] if len(shape) == 5 else (1, *shape[2:])
    return ClipSpec(frames, height, width, height, std=(0.25, 0.25, 0.25))


def frames_of(clip, seed=0):
    shape = (clip.frames, clip.height, clip.width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def compiled(path, design="8-sparse"):
    """The quantized graph and the program of a file, and frames."""
    clip = clip_of(shape_of(path))
    frames = frames_of(clip)
    config = preset(design)
    graph = choose_quant(trace_onnx(path, clip), [clip.normalise(frames)], config.bits)
    return graph, lower(graph, config), frames


@pytest.mark.parametrize("design", ["8-sparse", "16-sparse"])
@pytest.mark.parametrize("path", QDQ, ids=[path.stem for path in QDQ])
def test_every_task_writes_the_codes_of_onnx_runtime(path, design):
    """Within one code, given the same integers; most are equal."""
    graph, program, frames = compiled(path, design)
    found = list(compare(path, program, frames, len(shape_of(path))))
    shortcuts = {task.name for task in program.tasks if getattr(task, "shortcut", None)}
    assert len(found) >= len(program.tasks) - 2  # without parts of a concat and wide results
    for each in found:
        most = TWO_ROUNDINGS if each.task in shortcuts else TIES
        assert each.worst <= 1, each
        assert each.differing <= 2 + most * each.elements, each


def test_files_of_both_quantizers_are_there():
    assert {path.stem for path in QDQ} == {
        *("qdq-images-s8", "qdq-residual-u8", "qdq-residual-symmetric", "qcdq-4bit", "qcdq-8bit")
    }


def test_scales_zero_points_and_weights_are_those_of_the_file():
    """Read from the file's own initializers, by ONNX Runtime's names for them."""
    path = FILES / "qdq-residual-u8.onnx"
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    graph, program, _ = compiled(path)
    names = {layer.name: layer for layer in graph.layers}
    clip = names["clip"].out_quant
    assert clip.scale == float(held["clip_scale"])
    assert clip.zero_point == int(held["clip_zero_point"]) - 128
    # ONNX Runtime left these to the quantizer; the float graph has to have them
    relus = {layer.name for layer in graph.layers if layer.activation == "relu"}
    assert relus == {
        *("stem.0", "layer1.0.conv1", "layer1.0.add", "layer1.1.conv1", "layer1.1.add")
    }
    fc = names["fc"]
    np.testing.assert_array_equal(fc.weight_quant.scale, held["fc.weight_scale"].astype(float))
    codes = np.rint(fc.weight.reshape(5, -1) / fc.weight_quant.scale[:, None])
    stored = held["fc.weight_quantized"]
    np.testing.assert_array_equal(codes, stored if stored.shape == codes.shape else stored.T)
    scales = {float(v) for k, v in held.items() if k.endswith("_scale") and v.size == 1}
    assert all(layer.out_quant.scale in scales for layer in graph.layers)
    assert all(task.out.scale in scales for task in program.tasks)


@pytest.mark.parametrize("bits", [8, 4])
def test_both_forms_of_brevitas_give_one_graph(bits):
    """QONNX, which ONNX Runtime cannot run, equals QCDQ, which is compared with it above."""
    plain, node = (compiled(FILES / f"{form}-{bits}bit.onnx")[0] for form in ("qcdq", "qonnx"))
    assert len(plain.layers) == len(node.layers) == 5
    for a, b in zip(plain.layers, node.layers, strict=True):
        assert (a.op, a.name, a.code_range, a.activation) == (
            b.op,
            b.name,
            b.code_range,
            b.activation,
        )
        assert a.out_quant == b.out_quant
        if a.weight is not None:
            np.testing.assert_allclose(a.weight, b.weight, rtol=1e-6)
            np.testing.assert_array_equal(a.weight_quant.scale, b.weight_quant.scale)


def test_narrow_codes_stay_narrow_on_a_wider_design():
    """Codes of 4 bits are 16 numbers on a design of 8 bits, and all weights lie within +-7."""
    graph, program, frames = compiled(FILES / "qcdq-4bit.onnx")
    assert [layer.code_range for layer in graph.layers][1:4] == [(-8, 7)] * 3
    backend = open_backend("emulate", program.config)
    backend.load(program)
    backend.write(program.source, program.encode_clip(frames))
    highest = []
    for number, task in enumerate(program.tasks[:2]):
        backend.run(number, number + 1)
        codes = backend.read(task.target, task.shape.out_channels, task.out_size)
        assert codes.min() == -8
        assert np.abs(task.weights.values).max() == 7
        highest.append(int(codes.max()))
    backend.close()
    assert max(highest) == 7


def refused(path, design="8-sparse"):
    with pytest.raises(CompileError) as caught:
        compiled(path, design)
    return str(caught.value)


def test_more_bits_than_the_design_are_refused():
    message = refused(FILES / "qcdq-4bit.onnx", "4-sparse")
    assert message.startswith("clip: ") and "-128 to 127" in message and "more bits" in message


def wide(tmp_path, zero):
    """Codes of 16 bits, which the standard has from opset 21 on."""
    nodes = [*coded("x", "clip", "s16", "z16"), *WEIGHT, *CONV, *coded("y", "c", "s16", "z16")]
    held = {"s16": np.float32(0.001), "z16": np.int16(zero)}
    return saved(tmp_path, nodes, held, opset=21)


def test_codes_of_16_bits(tmp_path):
    _, program, frames = compiled(wide(tmp_path, 0), "16-sparse")
    (found,) = compare(tmp_path / "net.onnx", program, frames, 4)
    assert found.worst <= 1
    message = refused(wide(tmp_path, 100), "16-sparse")
    assert "with zero point 100" in message and "symmetric, with a zero point of 0" in message
    assert "use more bits" in refused(wide(tmp_path, 0), "8-sparse")


FLOAT = TensorProto.FLOAT
BASE = {
    "s": np.float32(0.05),
    "z": np.uint8(128),
    "t": np.float32(0.04),
    "low": np.uint8(0),
    "w": np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
    "ws": np.array([0.01, 0.02, 0.015, 0.01], np.float32),
    "wz": np.zeros(4, np.int8),
}


def coded(name, source, scale="s", zero="z", **more):
    """QuantizeLinear and DequantizeLinear, which make `name`."""
    names = [scale, *([zero] if zero else [])]
    return [
        helper.make_node(
            "QuantizeLinear", [source, *names], [f"{name}_q"], name=f"{name}_q", **more
        ),
        helper.make_node("DequantizeLinear", [f"{name}_q", *names], [name], name=name, **more),
    ]


WEIGHT = [helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wr"], name="wr", axis=0)]
CONV = [helper.make_node("Conv", ["x", "wr"], ["c"], name="c", pads=[1] * 4)]


def saved(tmp_path, nodes, constants=(), opset=17):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("clip", FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", FLOAT, ["n", "c", "h", "w"])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in {**BASE, **dict(constants)}.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("qonnx.custom_op.general", 2)]
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def quant(*inputs, **given):
    given = {"signed": 1, "narrow": 0, "rounding_mode": "ROUND", **given}
    domain = "qonnx.custom_op.general"
    return helper.make_node("Quant", list(inputs), ["y"], name="y", domain=domain, **given)


ONE = {"one": np.float32(0.1), "zero": np.float32(0), "bits": np.float32(8)}
CHAIN = [*coded("x", "clip"), *WEIGHT, *CONV]
REFUSED = {
    "scales for each channel of a map": (
        [*CHAIN, *coded("y", "c", "ws", "wz", axis=1)],
        {},
        "one scale for each tensor",
    ),
    "another scale behind than before": (
        [
            *CHAIN,
            helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "t", "z"], ["y"], name="y"),
        ],
        {},
        "another scale or zero point",
    ),
    "a weight of -128": (
        [*CHAIN, *coded("y", "c")],
        {"w": np.full((4, 3, 3, 3), -128, np.int8)},
        "codes from -128 to -128",
    ),
    "a weight far from its zero point": (
        [*CHAIN, *coded("y", "c")],
        {"w": np.full((4, 3, 3, 3), 255, np.uint8), "wz": np.zeros(4, np.uint8)},
        "codes from 255 to 255",
    ),
    "a weight that is changed behind": (
        [
            *coded("x", "clip"),
            *WEIGHT,
            helper.make_node("Mul", ["wr", "s"], ["wm"]),
            helper.make_node("Conv", ["x", "wm"], ["y"], name="conv"),
        ],
        {},
        "changed after it was dequantized",
    ),
    "scales for channels of a weight": (
        [
            *coded("x", "clip"),
            helper.make_node("DequantizeLinear", ["w", "w3", "z3"], ["wr"], axis=1),
            helper.make_node("Conv", ["x", "wr"], ["y"], name="conv"),
        ],
        {"w3": np.ones(3, np.float32), "z3": np.zeros(3, np.int8)},
        "one for each filter",
    ),
    "operators on integers": (
        [
            *CHAIN,
            helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q"]),
            helper.make_node("Identity", ["q"], ["p"], name="between"),
            helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
        ],
        {},
        "Identity of the integers q at node between",
    ),
    "a scale of zero": ([*CHAIN, *coded("y", "c", "nil")], {"nil": np.float32(0)}, "above 0"),
    "rounding down": ([quant("clip", "one", "zero", "bits", rounding_mode="FLOOR")], ONE, "FLOOR"),
    "a zero point between codes": (
        [quant("clip", "one", "half", "bits")],
        {**ONE, "half": np.float32(0.5)},
        "whole number",
    ),
    "bits for each channel": (
        [quant("clip", "one", "zero", "each")],
        {**ONE, "each": np.full((1, 3, 1, 1), 8, np.float32)},
        "one scale for each tensor",
    ),
    "more bits than 16": (
        [quant("clip", "one", "zero", "w32")],
        {**ONE, "w32": np.float32(32)},
        "2 to 16",
    ),
    "operators that read codes": (
        [helper.make_node("QLinearAdd", ["clip"], ["y"], name="sum", domain="com.microsoft")],
        {},
        "com.microsoft.QLinearAdd at node sum; use quant_format=QuantFormat.QDQ",
    ),
    "narrow codes of the clip": (
        [
            helper.make_node("QuantizeLinear", ["clip", "s", "z"], ["q"]),
            helper.make_node("Clip", ["q", "z", "top"], ["p"]),
            helper.make_node("DequantizeLinear", ["p", "s", "z"], ["x"]),
            *WEIGHT,
            helper.make_node("Conv", ["x", "wr"], ["y"]),
        ],
        {"top": np.uint8(140)},
        "limits its input to codes -8 to 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_numerics_do_not_have_is_refused_by_name(tmp_path, case):
    nodes, constants, word = REFUSED[case]
    path = saved(tmp_path, nodes, constants)
    if case == "operators that read codes":
        model = onnx.load(path)
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        onnx.save(model, path)
    message = refused(path)
    assert word in message, message
    assert "; use " in message or "accepted" in message or "quantize" in message, message


def assert_agrees(path):
    _, program, frames = compiled(path)
    found = list(compare(path, program, frames, 4))
    assert found and max(each.worst for each in found) <= 1, found
    return program, found


def test_a_relu_that_was_left_to_the_quantizer_is_kept_before_an_add(tmp_path):
    """The quantizer of `a` cuts what is below zero; the add may not see it."""
    nodes = [*CHAIN, *coded("a", "c", "t", "low")]
    nodes += [helper.make_node("Conv", ["x", "wr"], ["b"], pads=[1] * 4, name="b")]
    nodes += [*coded("br", "b"), helper.make_node("Add", ["a", "br"], ["d"]), *coded("y", "d")]
    program, found = assert_agrees(saved(tmp_path, nodes))
    assert len(found) == len(program.tasks) == 3


def test_a_range_narrower_than_its_type_cuts(tmp_path):
    """Clip between the quantizer and its inverse; a max pool selects codes of that range."""
    nodes = [
        *CHAIN,
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q"], name="q"),
        helper.make_node("Clip", ["q", "bottom", "top"], ["p"], name="p"),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["r"], name="r"),
        helper.make_node("MaxPool", ["r"], ["m"], name="m", kernel_shape=[2, 2], strides=[2, 2]),
        *coded("y", "m"),
    ]
    path = saved(tmp_path, nodes, {"bottom": np.uint8(120), "top": np.uint8(150)})
    program, _ = assert_agrees(path)
    first = program.tasks[0]  # 31 codes, counted from the lowest one of 8 bits
    assert (first.lo, first.hi, first.out.zero_point) == (-128, -128 + 30, -128 + 8)


def test_a_second_format_of_a_value_is_a_copy(tmp_path):
    nodes = [*CHAIN, *coded("a", "c"), *coded("y", "a", "t")]
    program, found = assert_agrees(saved(tmp_path, nodes))
    assert len(found) == len(program.tasks) == 2


def test_a_relu_behind_a_quantizer_is_in_the_same_task(tmp_path):
    nodes = [*CHAIN, *coded("a", "c"), helper.make_node("Relu", ["a"], ["r"]), *coded("y", "r")]
    program, _ = assert_agrees(saved(tmp_path, nodes))
    assert [task.lo for task in program.tasks] == [0]


def test_a_batch_norm_behind_a_quantizer_is_not_folded_before_it(tmp_path):
    held = {k: np.random.default_rng(1).uniform(0.5, 2, 4).astype(np.float32) for k in "gbmv"}
    norm = helper.make_node("BatchNormalization", ["a", *"gbmv"], ["n"], name="norm")
    program, found = assert_agrees(
        saved(tmp_path, [*CHAIN, *coded("a", "c"), norm, *coded("y", "n", "t")], held)
    )
    assert len(found) == len(program.tasks) == 2


def test_a_batch_norm_before_a_quantizer_keeps_the_codes_of_the_weight(tmp_path):
    held = {k: np.random.default_rng(1).uniform(0.5, 2, 4).astype(np.float32) for k in "bmv"}
    held["g"] = np.array([1, -2, 0.5, -1], np.float32)
    norm = helper.make_node("BatchNormalization", ["c", *"gbmv"], ["n"], name="norm")
    path = saved(tmp_path, [*CHAIN, norm, *coded("y", "n", "t")], held)
    program, _ = assert_agrees(path)
    codes = compiled(path)[0].layers[1]
    found = np.rint(codes.weight / codes.weight_quant.scale[:, None, None, None, None])
    np.testing.assert_array_equal(np.abs(found[:, :, 0]), np.abs(BASE["w"]))
    assert len(program.tasks) == 1


def test_padding_between_quantizers_is_padding_with_zeros(tmp_path):
    nodes = [
        *coded("a", "clip"),
        helper.make_node("Pad", ["a", "p"], ["b"], name="pad"),
        *coded("x", "b"),
        *WEIGHT,
        helper.make_node("Conv", ["x", "wr"], ["c"], name="c"),
        *coded("y", "c", "t"),
    ]
    program, found = assert_agrees(
        saved(tmp_path, nodes, {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1], np.int64)})
    )
    assert len(found) == len(program.tasks) == 1


def test_what_the_file_leaves_open_is_said(tmp_path):
    nodes = [*coded("x", "clip"), *WEIGHT, *CONV]
    nodes += [
        helper.make_node("MaxPool", ["c"], ["m"], kernel_shape=[2, 2], strides=[1, 1], name="m")
    ]
    nodes += [helper.make_node("Conv", ["m", "f"], ["y"], name="last")]
    held = {"f": np.random.default_rng(2).normal(size=(2, 4, 1, 1)).astype(np.float32)}
    with pytest.warns(UserWarning, match="is quantized, but") as told:
        compiled(saved(tmp_path, nodes, held))
    texts = [str(each.message) for each in told]
    assert any("the weights of last are not" in text for text in texts), texts
    assert any("2 of its 4 tensors" in text and "c, m" in text for text in texts), texts


def test_a_whole_quantized_file_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(FILES / "qdq-residual-u8.onnx")


def outcome(seed, path):
    """Compare the random quantized graph of a seed task by task."""
    random = RandomGraph(seed, quantized=True)
    onnx.save(random.model, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what the file leaves open
            _, program, frames = compiled(path)
    except CompileError:
        return "refused"
    try:
        found = list(compare(path, program, frames, len(random.shape)))
    except Exception as error:
        if "onnxruntime" not in type(error).__module__:
            raise
        return "invalid"
    assert all(each.worst <= 1 for each in found), (seed, found)
    return f"{'right' if found else 'nothing to compare'}"


def test_a_dozen_random_quantized_graphs(tmp_path):
    """`make test-all` takes 500."""
    outcomes = Counter(outcome(seed, tmp_path / "random.onnx") for seed in range(16))
    assert outcomes["right"] >= 4 and outcomes["refused"] >= 2, outcomes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_random_quantized_graphs(tmp_path):
    outcomes = Counter(outcome(seed, tmp_path / "random.onnx") for seed in range(1000, 1500))
    print(outcomes)
    assert outcomes["right"] > 150 and outcomes["invalid"] < 50, outcomes
