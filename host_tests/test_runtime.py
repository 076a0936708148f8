"""Sessions: from frames to labels, and the comparison of two backends."""

import os
import signal
import threading
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


LIMIT = 60
"""Seconds; no wait of these tests is near it unless something is wrong."""


class Watched:
    """A session of the emulation that notes which clip is taken, encoded, written and run."""

    def __init__(self, program, monkeypatch):
        self.session = Session(program)
        self.events = []
        self.encoded = [threading.Event() for _ in range(9)]
        for verb in ("write", "run"):
            self.note(monkeypatch, self.session.backend, verb)
        encode = Program.encode_clip

        def encode_clip(program, frames):
            codes = encode(program, frames)
            self.add("encode")
            self.encoded[self.count("encode") - 1].set()
            return codes

        monkeypatch.setattr(Program, "encode_clip", encode_clip)

    def note(self, monkeypatch, target, verb):
        call = getattr(target, verb)

        def noted(*arguments):
            self.add(verb)
            return call(*arguments)

        monkeypatch.setattr(target, verb, noted)

    def add(self, event):
        self.events.append(event)

    def count(self, event):
        return self.events.count(event)

    def clips(self, count):
        for number in range(count):
            # nothing is taken before the clip before it is on the device
            assert self.count("write") == number, self.events
            self.add("take")
            yield np.full((4, 7, 7, 3), 60 * number, np.uint8)


@pytest.fixture
def watched(network, monkeypatch):
    found = Watched(network[0], monkeypatch)
    yield found
    found.session.close()
    assert "next clip" not in {thread.name for thread in threading.enumerate()}


def test_the_next_clip_is_prepared_while_the_device_runs(watched, monkeypatch):
    """And no other: the source asserts that it is asked for one clip more than were written."""
    run = watched.session.backend.run

    def waiting_run():
        number = watched.count("write")
        assert number == 4 or watched.encoded[number].wait(LIMIT), "nothing is prepared"
        return run()

    monkeypatch.setattr(watched.session.backend, "run", waiting_run)
    found = list(watched.session.classify_many(watched.clips(4), top=2))
    assert len({each.labels for each in found}) == 4
    assert all(len(each.labels) == 2 for each in found)
    monkeypatch.undo()
    frames = [np.full((4, 7, 7, 3), 60 * number, np.uint8) for number in range(4)]
    with Session(watched.session.program) as session:
        alone = [session.classify(each, top=2) for each in frames]
    assert [each.labels for each in alone] == [each.labels for each in found]


def test_no_clips(watched):
    assert list(watched.session.classify_many([])) == []
    assert watched.events == []


class Stopped(Exception):
    """What a source of the tests raises."""


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt, GeneratorExit])
def test_an_error_of_the_clips_comes_after_the_results_before_it(watched, error):
    def clips():
        yield from watched.clips(2)
        raise error

    many = watched.session.run_many(clips())
    assert [next(many)[1].logits.shape for _ in range(2)] == [(5,)] * 2
    with pytest.raises(error):
        next(many)
    assert list(many) == []


def test_an_error_of_a_clip_comes_after_the_results_before_it(watched, frames):
    for wrong in (frames[:3], frames.astype(np.int16)):
        many = watched.session.classify_many([frames, wrong, frames])
        assert next(many).labels
        with pytest.raises(ProgramError, match="takes uint8 frames"):
            next(many)


def test_a_stop_iteration_within_a_clip_is_not_the_end(watched):
    """A `next` without a default, in `frames`, would cut the clips short without an error."""
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(watched.session.run_many([1, 2], lambda clip: next(iter(()))))


def test_an_iterator_that_is_closed_or_dropped_leaves_no_thread(watched):
    released = threading.Event()

    def clips():
        yield from watched.clips(1)
        assert released.wait(LIMIT)
        yield np.zeros((4, 7, 7, 3), np.uint8)

    many = watched.session.run_many(clips())
    next(many)
    assert "next clip" in {thread.name for thread in threading.enumerate()}
    threading.Timer(0.05, released.set).start()
    many.close()
    assert "next clip" not in {thread.name for thread in threading.enumerate()}
    many = watched.session.run_many(iter([np.zeros((4, 7, 7, 3), np.uint8)] * 3))
    next(many)
    del many
    assert "next clip" not in {thread.name for thread in threading.enumerate()}


def test_a_failed_run_ends_the_clips_and_not_the_session(watched, frames, monkeypatch):
    run = watched.session.backend.run

    def failing_run(*arguments):
        if watched.count("write") == 2:
            raise DeviceError("a fault")
        return run(*arguments)

    monkeypatch.setattr(watched.session.backend, "run", failing_run)
    many = watched.session.run_many(watched.clips(4))
    next(many)
    with pytest.raises(DeviceError, match="a fault"):
        next(many)
    assert "next clip" not in {thread.name for thread in threading.enumerate()}
    monkeypatch.undo()
    assert len(watched.session.classify(frames).labels) == 5


@pytest.mark.parametrize("during", ["run", "preparation"])
def test_an_interrupt(watched, frames, monkeypatch, during):
    """Ctrl-C reaches the caller's thread: in the device's run, or while it waits for a clip."""
    right = watched.session.classify(frames).labels
    running, taken = threading.Event(), threading.Event()
    run = watched.session.backend.run

    def noted_run(*arguments):
        running.set()
        if during == "run":
            taken.wait(LIMIT)  # until the interrupt comes
            time.sleep(LIMIT)
        return run(*arguments)

    def clips():
        yield frames
        assert running.wait(LIMIT)
        taken.set()
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        yield frames

    monkeypatch.setattr(watched.session.backend, "run", noted_run)
    many = watched.session.classify_many(clips())
    if during == "preparation":
        assert next(many).labels == right
    with pytest.raises(KeyboardInterrupt):
        next(many)
    assert "next clip" not in {thread.name for thread in threading.enumerate()}
    monkeypatch.undo()
    assert watched.session.classify(frames).labels == right


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
