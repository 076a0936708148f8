"""ONNX files: what is accepted equals ONNX Runtime, everything else is refused by name."""

import contextlib
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from random_onnx import RandomGraph

from pynq_kgrc import Session
from pynq_kgrc.cli import main
from pynq_kgrc.errors import CompileError, ModelError
from pynq_kgrc.graph import ClipSpec, run_float
from pynq_kgrc.models.c3d import c3d
from pynq_kgrc.models.onnx_trace import trace_onnx
from pynq_kgrc.models.r2plus1d import r2plus1d_18
from pynq_kgrc.models.trace import trace
from pynq_kgrc.program import load
from pynq_kgrc.video import load_clip

FILES = Path(__file__).resolve().parent / "onnx_files"
FLOAT = sorted((*FILES.glob("residual-*.onnx"), *FILES.glob("images-*.onnx")))

SHARE = 1e-4
"""Largest error of float results, as a share of the largest."""


def session(path):
    """ONNX Runtime without graph optimizations."""
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def clip_of(shape):
    """The ClipSpec of an input [1, 3, D, H, W] or [1, 3, H, W]."""
    frames, height, width = shape[2:] if len(shape) == 5 else (1, *shape[2:])
    return ClipSpec(frames, height, width, height)


def assert_equal(path, shape, seed=0):
    """Trace a file and compare it with ONNX Runtime; the graph."""
    clip = clip_of(shape)
    graph = trace_onnx(path, clip)
    reals = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    runtime = session(path)
    (wanted, *_) = runtime.run(None, {runtime.get_inputs()[0].name: reals})
    found = run_float(graph, reals.reshape(3, clip.frames, clip.height, clip.width))
    if graph.softmax:  # the runtime applies it
        found = np.exp(found - found.max())
        found /= found.sum()
    assert found.size == wanted.size
    most = SHARE * np.abs(wanted).max() + 1e-6
    assert np.abs(found.ravel() - wanted.ravel()).max() <= most
    return graph


@pytest.mark.parametrize("path", FLOAT, ids=[path.stem for path in FLOAT])
def test_files_of_exporters(path):
    shape = session(path).get_inputs()[0].shape
    assert_equal(path, shape)


def test_there_are_files_of_both_exporters_and_three_opsets():
    ways = {path.stem.split("-")[1] for path in FLOAT}
    assert ways == {"legacy11", "legacy17", "dynamo18", "dynamo23"}
    assert len(FLOAT) == 8


@pytest.mark.parametrize("way", ["legacy11", "dynamo18"])
def test_layers_have_the_paths_of_modules(way):
    """Those that `trace` gives, so that rates of pruning by layer fit both."""
    graph = trace_onnx(FILES / f"residual-{way}.onnx", ClipSpec(4, 12, 12, 12))
    found = [layer.name for layer in graph.convolutions()]
    assert found == [
        *("stem.0", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"),
        *("layer1.1.downsample.0", "fc"),
    ]
    assert "layer1.0.add" in [layer.name for layer in graph.layers]


NORMALISED = ("--mean", "0.45", "0.4", "0.5", "--std", "0.225", "0.2", "0.25")


@pytest.fixture(scope="module")
def video(example_clips):
    return str(sorted((example_clips / "calibration").glob("*.avi"))[0])


def test_compile_on_the_command_line_without_torch(video, tmp_path):
    """In a process where torch cannot be imported; the program does what the file says."""
    out = tmp_path / "net.kgrc"
    arguments = ["compile", str(FILES / "residual-dynamo18.onnx"), *NORMALISED, "--step", "2"]
    arguments += ["--design", "16-sparse", "--clips", video, "-o", str(out)]
    code = "import sys; sys.modules['torch'] = None\nfrom pynq_kgrc.cli import main\n"
    code += f"sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "random" not in done.stdout
    program = load(out)
    assert program.clip.step == 2 and program.clip.mean == (0.45, 0.4, 0.5)
    frames = load_clip(video, program.clip).frames
    with Session(program) as one:
        found = one.run(frames).logits
    runtime = session(FILES / "residual-dynamo18.onnx")
    reals = program.clip.normalise(frames)[None]
    (wanted,) = runtime.run(None, {runtime.get_inputs()[0].name: reals})
    assert np.abs(found - wanted.ravel()).max() <= 0.01 * np.abs(wanted).max()


OPTIONS = {
    "without mean": (NORMALISED[4:], "--mean R G B"),
    "without both": ((), "--mean R G B and --std R G B"),
    "std of zero": ((*NORMALISED[:5], "0", "1", "1"), "--std 0.0 1.0 1.0"),
    "classes": ((*NORMALISED, "--classes", "3"), "--classes beside"),
    "weights": ((*NORMALISED, "--weights", "x.pt"), "--weights beside"),
    "recipe": ((*NORMALISED, "--recipe", "kgr"), "no recipe 'kgr'"),
    "another size": ((*NORMALISED, "--size", "4", "13", "12"), "[1, 3, 4, 13, 12]"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit_a_file(case, video, tmp_path, capsys):
    given, word = OPTIONS[case]
    out = tmp_path / "net.kgrc"
    arguments = ["compile", str(FILES / "residual-dynamo18.onnx"), *given]
    assert main([*arguments, "--clips", video, "-o", str(out)]) == 2
    assert word in capsys.readouterr().err
    assert not out.exists()


def test_without_onnx_the_cure_is_named(video, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "pynq_kgrc.models.onnx_trace", raising=False)
    monkeypatch.setitem(sys.modules, "pynq_kgrc.models.onnx_file", None)
    arguments = ["compile", str(FLOAT[0]), *NORMALISED, "--clips", video]
    assert main([*arguments, "-o", str(tmp_path / "net.kgrc")]) == 2
    assert "pip install '.[onnx]' in the folder of the source" in capsys.readouterr().err


def test_a_network_of_torch_takes_no_mean(video, tmp_path, capsys):
    assert main(["compile", "c3d", *NORMALISED, "--clips", video, "-o", str(tmp_path / "x")]) == 2
    assert "--mean beside c3d" in capsys.readouterr().err


def test_the_size_of_an_open_input_is_asked_for(video, tmp_path, capsys):
    path = saved(tmp_path, [conv()], ["n", 3, "h", "w"], constants=WEIGHT)
    out = tmp_path / "net.kgrc"
    arguments = ["compile", str(path), *NORMALISED, "--clips", video, "-o", str(out)]
    assert main(arguments) == 2
    assert "--size" in capsys.readouterr().err
    assert main([*arguments, "--size", "1", "8", "8"]) == 0
    assert load(out).clip.height == 8


def test_torch_stays_asleep():
    code = (
        f"import sys; sys.modules['torch'] = None\n"
        f"from pynq_kgrc.models.onnx_trace import trace_onnx\n"
        f"from pynq_kgrc.graph import ClipSpec\n"
        f"trace_onnx({str(FLOAT[-1])!r}, ClipSpec(4, 12, 12, 12))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def saved(tmp_path, nodes, shape=(1, 3, 8, 8), opset=17, constants=(), out=None, **more):
    """A file of some nodes that read "clip" and write "y"."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("clip", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out or ["n", "c", "h", "w"])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in dict(constants).items()],
    )
    opsets = [helper.make_opsetid("", opset), *more.get("opsets", ())]
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def conv(source="clip", name="y", **given):
    return helper.make_node("Conv", [source, "w"], [name], name=f"conv_{name}", **given)


WEIGHT = {"w": np.ones((4, 3, 3, 3), np.float32)}
FRAME = ClipSpec(1, 8, 8, 8)


def refusal(path, clip=FRAME, kind=CompileError):
    with pytest.raises(kind) as caught:
        trace_onnx(path, clip)
    return str(caught.value)


def test_all_operators_that_are_lacking_are_named_at_once(tmp_path):
    nodes = [
        conv(name="a"),
        helper.make_node("Sigmoid", ["a"], ["b"], name="gate_1"),
        helper.make_node("Sigmoid", ["b"], ["c"], name="gate_2"),
        helper.make_node("LRN", ["c"], ["d"], name="norm", size=3),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    message = refusal(saved(tmp_path, nodes, constants=WEIGHT))
    for word in ("Sigmoid, 2 times, first at node gate_1; use", "LRN at node norm", "net: "):
        assert word in message, message


def test_a_node_of_another_domain_is_refused_by_its_name(tmp_path):
    nodes = [conv(name="a"), helper.make_node("Gelu", ["a"], ["y"], name="g", domain="my.ops")]
    path = saved(tmp_path, nodes, constants=WEIGHT, opsets=[helper.make_opsetid("my.ops", 1)])
    assert "my.ops.Gelu at node g" in refusal(path)


DYNAMIC = {"axes": ["n", 3, "h", "w"], "batch": ["n", 3, 8, 8]}


def test_open_axes_are_those_of_the_clip(tmp_path):
    for shape in DYNAMIC.values():
        path = saved(tmp_path, [conv()], shape, constants=WEIGHT)
        assert trace_onnx(path, FRAME).layers[-1].size == (1, 6, 6)


def test_a_clip_of_one_channel(tmp_path):
    """As in LeNet: a grey frame, read by the means and std of one channel."""
    path = saved(tmp_path, [conv()], (1, 1, 8, 8), constants={"w": np.ones((4, 1, 3, 3), "f4")})
    graph = trace_onnx(path, ClipSpec(1, 8, 8, 8, mean=(0.5,), std=(0.5,)))
    frame = np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32)
    (wanted,) = session(path).run(None, {"clip": frame})
    np.testing.assert_allclose(run_float(graph, frame), wanted[0][:, None], rtol=1e-5)
    assert "the clip is [1, 3, 8, 8]" in refusal(path, kind=ModelError)


def test_a_shape_that_depends_on_values_is_refused(tmp_path):
    nodes = [
        helper.make_node("NonZero", ["clip"], ["a"], name="where"),
        helper.make_node("Cast", ["a"], ["y"], to=1),
    ]
    assert "y that depends on the clip's values at node y" in refusal(saved(tmp_path, nodes))


def test_another_clip_batch_or_rank_is_refused(tmp_path):
    path = saved(tmp_path, [conv()], constants=WEIGHT)
    assert "[1, 3, 8, 8]" in refusal(path, ClipSpec(1, 9, 9, 9), ModelError)
    path = saved(tmp_path, [conv()], (2, 3, 8, 8), constants=WEIGHT)
    assert "batch of 2" in refusal(path, kind=ModelError)
    path = saved(tmp_path, [conv()], (1, 3, 8), constants=WEIGHT)
    assert "[1, C, D, H, W]" in refusal(path, kind=ModelError)


@pytest.mark.parametrize("opset", [9, 99])
def test_opsets_that_are_too_old_or_new_are_refused(tmp_path, opset):
    path = saved(tmp_path, [conv()], constants=WEIGHT)
    model = onnx.load(path)
    model.opset_import[0].version = opset
    onnx.save(model, path)
    message = refusal(path, kind=ModelError)
    assert f"opset {opset}" in message or "opset" in message.lower(), message


@pytest.mark.parametrize("held", [b"", b"not a model", bytes(100), None])
def test_files_that_are_no_whole_onnx_file(tmp_path, held):
    """None: the first half of one."""
    path = tmp_path / "broken.onnx"
    whole = FLOAT[0].read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if held is None else held)
    assert "broken.onnx: not a whole ONNX file" in refusal(path, kind=ModelError)


def test_a_missing_file_and_missing_external_data(tmp_path):
    assert "none.onnx: cannot be read" in refusal(tmp_path / "none.onnx", kind=ModelError)
    path = saved(tmp_path, [conv()], constants=WEIGHT)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert trace_onnx(path, FRAME).layers[-1].channels == 4
    (tmp_path / "w.bin").unlink()
    message = refusal(path, kind=ModelError)
    assert "w.bin" in message and "external_data=False" in message


def test_truncated_files_give_no_traceback(tmp_path):
    """Cut anywhere, a file is refused or is a file of its own, and never anything else."""
    whole = FLOAT[0].read_bytes()
    path = tmp_path / "cut.onnx"
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises((ModelError, CompileError)):
            trace_onnx(path, ClipSpec(1, 16, 16, 16))


def test_flipped_bytes_give_no_traceback(tmp_path):
    """Names that are no text, tensors and attributes of another size or type than they say."""
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.onnx"
    outcomes = Counter()
    for source in (FLOAT[0], FILES / "qdq-images-s8.onnx"):
        whole = np.frombuffer(source.read_bytes(), np.uint8)
        for _ in range(80):
            held = whole.copy()
            held[rng.integers(0, len(held), 2)] = rng.integers(0, 256, 2)
            path.write_bytes(held.tobytes())
            try:
                trace_onnx(path, ClipSpec(1, 16, 16, 16))
                outcomes["read"] += 1
            except (ModelError, CompileError):
                outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 5, outcomes


WRONG = {
    "a weight for other channels": (
        {"w": np.ones((4, 2, 3, 3), np.float32)},
        {},
        "a weight [4, 2, 3, 3] in 1 groups for 3 channels",
    ),
    "negative padding": (WEIGHT, {"pads": [-1, 0, 0, 0]}, "pads"),
    "another kernel": (WEIGHT, {"kernel_shape": [2, 2]}, ""),
    "a bias for each pixel": (WEIGHT, {"strides": [0, 1]}, ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_convolutions_that_do_not_fit(tmp_path, case):
    constants, given, word = WRONG[case]
    path = saved(tmp_path, [conv(**given)], constants=constants)
    assert word in refusal(path, kind=(CompileError, ModelError))


def test_training_is_refused(tmp_path):
    held = {"t": np.array(True), "r": np.array(0.5, np.float32)}
    nodes = [helper.make_node("Dropout", ["clip", "r", "t"], ["y"], name="drop")]
    assert "Dropout in training at node drop" in refusal(saved(tmp_path, nodes, constants=held))


def test_a_second_output_of_a_node_is_not_taken_for_the_first(tmp_path):
    nodes = [
        helper.make_node("MaxPool", ["clip"], ["a", "i"], name="pool", kernel_shape=[2, 2]),
        helper.make_node("Cast", ["i"], ["j"], to=1),
        helper.make_node("Add", ["a", "j"], ["y"]),
    ]
    assert "MaxPool whose output i is read at node pool" in refusal(saved(tmp_path, nodes))


def test_a_large_constant_is_not_computed(tmp_path):
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["big"], name="bomb"),
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Add", ["clip", "sum"], ["y"]),
    ]
    path = saved(tmp_path, nodes, constants={"s": np.array([1 << 20, 1 << 20], np.int64)})
    message = refusal(path, kind=ModelError)
    assert "node bomb; accepted are" in message, message


def test_pools_have_the_defaults_of_onnx(tmp_path):
    """Strides of 1, and a mean without the padding, which is refused where there is any."""
    pool = helper.make_node("MaxPool", ["clip"], ["y"], name="pool", kernel_shape=[2, 2])
    path = saved(tmp_path, [pool])
    assert assert_equal(path, (1, 3, 8, 8)).layers[-1].size == (1, 7, 7)
    given = {"kernel_shape": [2, 2], "pads": [1, 0, 0, 0]}
    pool = helper.make_node("AveragePool", ["clip"], ["y"], name="pool", **given)
    assert "leaves padding out of its mean at node pool" in refusal(saved(tmp_path, [pool]))
    given["count_include_pad"] = 1
    pool = helper.make_node("AveragePool", ["clip"], ["y"], name="pool", **given)
    assert_equal(saved(tmp_path, [pool]), (1, 3, 8, 8))


def test_several_inputs_and_outputs_are_refused(tmp_path):
    path = saved(tmp_path, [conv()], constants=WEIGHT)
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("flow", TensorProto.FLOAT, (1, 2)))
    onnx.save(model, path)
    assert "the inputs are clip, flow; accepted is one" in refusal(path)
    model.graph.input.pop()
    model.graph.output.append(helper.make_tensor_value_info("clip", TensorProto.FLOAT, None))
    model.graph.output[1].type.CopyFrom(model.graph.input[0].type)
    onnx.save(model, path)
    assert "the outputs are y, clip; accepted is one" in refusal(path)


def outcome(seed, path):
    """Compare the random graph of a seed: "right", "refused" or, of no graph, "invalid"."""
    random = RandomGraph(seed)
    onnx.save(random.model, path)
    reals = np.random.default_rng(seed).normal(size=random.shape).astype(np.float32)
    try:
        session(path).run(None, {"clip": reals})
    except Exception:  # a graph that ONNX Runtime refuses; ours may be stricter or read less
        with contextlib.suppress(CompileError, ModelError):
            trace_onnx(path, clip_of(random.shape))
        return "invalid"
    try:
        assert_equal(path, random.shape, seed)
    except CompileError as error:
        check_refusal(error)
        return "refused"
    return "right"


def check_refusal(error):
    """The message of a refusal has the place in the file."""
    assert "at node " in str(error) or "the output" in str(error), error


def test_a_dozen_random_graphs(tmp_path):
    """`make test-all` takes 500."""
    outcomes = Counter(outcome(seed, tmp_path / "random.onnx") for seed in range(24))
    assert outcomes["right"] >= 5 and outcomes["refused"] >= 5, outcomes


def whole_r2plus1d():
    network = r2plus1d_18()
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm3d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("build", [c3d, whole_r2plus1d], ids=["c3d", "r2plus1d_18"])
def test_whole_networks(build, opset, tmp_path):
    """Exported now, by torch's exporter that needs onnx only; equal layer by layer to `trace`."""
    torch.manual_seed(0)
    network = build().eval()
    clip, path = ClipSpec(16, 112, 112, 128), tmp_path / "whole.onnx"
    example = torch.zeros(1, 3, 16, 112, 112)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (example,), path, opset_version=opset, dynamo=False)
    graph = assert_equal(path, example.shape)
    convolutions = [layer.name for layer in graph.convolutions()]
    assert convolutions == [layer.name for layer in trace(network, clip).convolutions()]


@pytest.mark.slow
def test_five_hundred_random_graphs(tmp_path):
    outcomes = Counter(outcome(seed, tmp_path / "random.onnx") for seed in range(1000, 1500))
    print(outcomes)
    assert outcomes["right"] > 100 and outcomes["invalid"] < 50, outcomes
