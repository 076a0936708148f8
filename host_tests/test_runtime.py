"""Sessions: from frames to labels, and the comparison of two backends."""

import time
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from networks import Net, compiled, small_config

from pynq_kgrc import runtime
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.errors import DeviceError, ProgramError
from pynq_kgrc.graph import run_float
from pynq_kgrc.program import Program
from pynq_kgrc.runtime import Seconds, Session, compare, softmax


@pytest.fixture(scope="module")
def network():
    net = Net(size=(4, 7, 7))
    net.dense(net.conv(net.conv("clip", 8), 8), 5)
    program, graph = compiled(net)
    labels = ("run", "jump", "wave", "clap", "sit")
    return msgspec.structs.replace(program, labels=labels), graph


@pytest.fixture
def frames():
    return np.random.default_rng(3).integers(0, 256, (4, 7, 7, 3), dtype=np.uint8)


def test_the_labels_are_those_of_the_float_network(network, frames):
    program, graph = network
    with Session(program) as session:
        prediction = session.classify(frames, top=9)
        logits = session.run(frames).logits
    wanted = run_float(graph, graph.clip.normalise(frames)).reshape(-1)
    assert np.corrcoef(logits, wanted)[0, 1] > 0.99
    assert [each.label for each in prediction.labels] == [
        program.labels[i] for i in np.argsort(-logits)
    ]
    assert sum(each.confidence for each in prediction.labels) == pytest.approx(1)
    assert prediction.backend == "emulate"
    assert [c.task for c in prediction.layers] == [task.name for task in program.tasks]
    assert all(c.macs > 0 and c.bytes_weight > 0 for c in prediction.layers)


def test_scores_are_those_of_the_prediction(network, frames):
    program, _ = network
    with Session(program) as session:
        start = time.perf_counter()
        scores = session.run(frames)
        passed = time.perf_counter() - start
        prediction = session.classify(frames, top=5)
    assert scores.logits.shape == scores.probabilities.shape == (5,)
    np.testing.assert_array_equal(scores.probabilities, softmax(scores.logits))
    for each in prediction.labels:
        assert each.confidence == scores.probabilities[program.labels.index(each.label)]
    parts = scores.seconds
    assert min(parts.encode, parts.pack, parts.copy, parts.device, parts.read) > 0
    assert parts.device >= sum(counters.seconds for counters in scores.layers)
    every = (parts.encode, parts.pack, parts.copy, parts.device, parts.read)
    assert parts.total == sum(every) <= passed
    assert prediction.seconds == prediction.timing.total > 0
    assert [replace(c, seconds=0) for c in scores.layers] == [
        replace(c, seconds=0) for c in prediction.layers
    ]


def test_each_part_of_the_seconds_is_its_own(network, frames, monkeypatch):
    """Each call advances a clock of the test by another number of seconds."""
    program, _ = network
    now = 0.0

    def delayed(call, seconds):
        def late(*arguments):
            nonlocal now
            now += seconds
            return call(*arguments)

        return late

    with Session(program) as session:
        monkeypatch.setattr(runtime, "time", SimpleNamespace(perf_counter=lambda: now))
        monkeypatch.setattr(Program, "encode_clip", delayed(Program.encode_clip, 1))
        for verb, seconds in (("pack", 16), ("write", 2), ("run", 4), ("read", 8)):
            call = getattr(session.backend, verb)
            monkeypatch.setattr(session.backend, verb, delayed(call, seconds))
        wanted = Seconds(encode=1, pack=16, copy=2, device=4, read=8)
        assert session.run(frames).seconds == wanted
        assert session.classify(frames).seconds == wanted.total == 31


def test_a_session_is_named_after_its_backend(network):
    program, _ = network
    backend = Emulation(program.config, cores=1)
    assert Session(program, backend).backend_name == "emulate"
    backend.close()


def test_a_second_call_and_another_clip(network, frames):
    program, _ = network
    with Session(program) as session:
        first = session.classify(frames).labels
        session.classify(255 - frames)
        assert session.classify(frames).labels == first


def test_the_encoded_clip_is_the_quantized_normalised_clip(network, frames):
    _, graph = network
    program = lower(graph, small_config(), fold=False)
    codes = program.encode_clip(frames)
    values = graph.clip.pixel_values()
    for channel in range(3):
        wanted = program.input.quantize(values[channel][frames[..., channel]])
        np.testing.assert_array_equal(codes[channel], wanted)
    assert codes.dtype == np.int8


def test_trace_gives_every_task_and_the_same_result(network, frames):
    program, _ = network
    with Session(program) as session:
        outputs = [(name, codes) for name, codes, _ in session.trace(frames)]
        traced = program.output.dequantize(outputs[-1][1]).reshape(-1)
        np.testing.assert_array_equal(session.run(frames).logits, traced)
    assert [name for name, _ in outputs] == [task.name for task in program.tasks]
    assert outputs[0][1].shape == (8, 4, 7, 7)


def test_compare_names_the_first_difference(network, frames):
    program, _ = network
    with Session(program) as left, Session(program) as right:
        assert compare(left, right, frames) is None
        broken = right.backend.read

        def read(slot, channels, size):
            codes = broken(slot, channels, size)
            if slot == program.tasks[1].target:
                codes[3, 1, 2, 4] += 1
                codes[5, 0, 0, 0] += 1
            return codes

        right.backend.read = read
        difference = compare(left, right, frames)
    assert difference.task == program.tasks[1].name
    assert difference.index == (3, 1, 2, 4)
    assert difference.right - difference.left == 1
    assert difference.count == 2


def test_compare_wants_one_program(network, frames):
    program, _ = network
    other = msgspec.structs.replace(program, name="other")
    match = "two sessions of the same program"
    with (
        Session(program) as left,
        Session(other) as right,
        pytest.raises(ProgramError, match=match),
    ):
        compare(left, right, frames)


def test_refusals(network, frames):
    program, _ = network
    with Session(program) as session:
        with pytest.raises(ProgramError, match=r"uint8 frames of shape \(4, 7, 7, 3\), not uint8"):
            session.classify(frames[:3])
        with pytest.raises(ProgramError, match=r"not float64 of \(4, 7, 7, 3\)"):
            session.classify(frames.astype(float))
        assert session.classify(frames).labels  # nothing is lost
    with pytest.raises(DeviceError, match="no backend named 'fpga'"):
        Session(program, "fpga")
    with pytest.raises(ProgramError, match="compile it for this one"):
        Session(program, Emulation(small_config(4)))


def test_an_open_backend_stays_open(network, frames):
    program, _ = network
    backend = Emulation(program.config, cores=1)
    with Session(program, backend) as session:
        labels = session.classify(frames).labels
    with Session(program, backend) as session:
        assert session.classify(frames).labels == labels
    backend.close()


def test_softmax_survives_large_logits():
    np.testing.assert_allclose(softmax(np.array([1000.0, 1000.0, -1000.0])), [0.5, 0.5, 0])
