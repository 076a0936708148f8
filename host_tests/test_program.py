"""The container: loading gives what was saved, and a damaged file is refused."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest
from networks import Net, compiled, random_codes, small_config

from pynq_kgrc.accelerator.plan import ITEM_BITS, BitField
from pynq_kgrc.analysis.timing import modelled_ms
from pynq_kgrc.backends.base import BACKENDS, open_backend
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.errors import CompileError, ProgramError
from pynq_kgrc.program import ConvTask, Program, Slot, check, load


def small_net():
    net = Net(size=(3, 5, 5))
    first = net.conv("clip", 8)
    second = net.conv(first, 8, act="none", kept=0.5)
    joined = net.concat(net.add(second, first), net.conv(first, 4, 1, pad=0))
    net.dense(net.pool(joined, 3, stride=2), 5)
    return net


def outputs(program: Program) -> np.ndarray:
    backend = Emulation(program.config, cores=1)
    backend.load(program)
    backend.write(program.source, random_codes(program))
    backend.run()
    last = program.tasks[-1]
    codes = backend.read(last.target, last.shape.out_channels, last.out_size)
    backend.close()
    return codes


@pytest.fixture(scope="module", params=[16, 8, 4])
def program(request):
    return compiled(small_net(), small_config(request.param))[0]


def assert_same(a, b):
    """Check that two values are equal in every field and array."""
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, msgspec.Struct):
        for name in a.__struct_fields__:
            assert_same(getattr(a, name), getattr(b, name))
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_the_work_of_a_task_is_computed_once(program, monkeypatch):
    """Backends and cost models share one plan of each task."""
    fresh = msgspec.structs.replace(program)
    planned = []
    plan = Program._plan
    monkeypatch.setattr(
        Program, "_plan", lambda self, task: planned.append(task) or plan(self, task)
    )
    check(fresh)
    for name in BACKENDS:
        if name == "board" and find_spec("pynq") is None:
            continue
        backend = open_backend(name, fresh.config)
        backend.load(fresh)
        backend.close()
    assert modelled_ms(fresh) > 0
    assert planned == list(fresh.tasks)
    # a program for another design has plans of its own
    other = msgspec.structs.replace(fresh, config=small_config(program.config.bits, td=1))
    assert other.work(other.tasks[0]) != fresh.work(fresh.tasks[0])


def test_load_gives_what_was_saved(program, tmp_path):
    path = tmp_path / "new" / "net.kgrc"
    program.save(path)
    loaded = load(path)
    assert_same(loaded, program)
    np.testing.assert_array_equal(outputs(loaded), outputs(program))
    assert os.listdir(path.parent) == ["net.kgrc"]
    program.save(path)  # over an old one
    assert_same(load(path), program)


def test_four_bit_weights_are_packed(tmp_path):
    for bits in (8, 4):
        compiled(Net(size=(1, 3, 3)) and small_net(), small_config(bits))[0].save(
            tmp_path / f"{bits}"
        )
    sizes = []
    for bits in (8, 4):
        raw = (tmp_path / f"{bits}").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        start, end = header["conv2/values"]["data_offsets"]
        sizes.append(end - start)
    assert sizes[0] == 2 * sizes[1]


def test_a_failed_save_leaves_the_old_file(program, tmp_path, monkeypatch):
    path = tmp_path / "net.kgrc"
    program.save(path)
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        program.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.kgrc"]


def mutated(rng, raw):
    """One random damage: a flipped bit, changed, removed or inserted bytes, or a shorter file."""
    data = bytearray(raw)
    at = int(rng.integers(len(data)))
    if rng.random() < 0.5:  # the header is where the interesting bytes are
        at = int(rng.integers(min(len(data), 6000)))
    kind = int(rng.integers(5))
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(1, 9)))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + int(rng.integers(1, 99))]
    else:
        data[at:at] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(data)


def test_ten_thousand_mutations(tmp_path):
    """Loading gives a ProgramError or the original program: no crash, no hang, nothing else."""
    original = compiled(small_net())[0]
    path = tmp_path / "net.kgrc"
    original.save(path)
    raw = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(10_000):
        path.write_bytes(mutated(rng, raw))
        try:
            survived = load(path)
        except ProgramError:
            refused += 1
        else:
            assert_same(survived, original)
    assert refused > 9_900


def with_document(path, change):
    """Change the JSON document of a container, and its digest with it."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from pynq_kgrc.program import DIGEST_KEY, DOCUMENT_KEY, _digest

    with safe_open(path, framework="numpy") as container:
        document = json.loads(container.metadata()[DOCUMENT_KEY])
        tensors = {name: container.get_tensor(name) for name in container.keys()}  # noqa: SIM118
    change(document, tensors)
    text = json.dumps(document)
    metadata = {DOCUMENT_KEY: text, DIGEST_KEY: _digest(text.encode(), tensors)}
    save_file(tensors, path, metadata)


def set_in(*keys, value):
    def change(document, _):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


def set_array(name, change_array):
    def change(_, tensors):
        tensors[name] = change_array(tensors[name].copy())

    return change


def first_element(value):
    def change(array):
        array.reshape(-1)[0] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_in("version", value=6), r"version 6; this release reads 'pynq_kgrc' of .* 3, 4, 5"),
        (set_in("version", value=5), r"conv1: values are not \d+ packed 4-bit powers of two"),
        (set_in("version", value=0), r"version 0; this release reads 'pynq_kgrc' of .* 1, 2"),
        (set_in("clip", "sampling", value="some"), r"sampling='some' .* accepted are centre"),
        (set_in("clip", "temperature", value=0), r"temperature=0.0; accepted is above 0"),
        (set_in("clip", "threshold", value=1), r"threshold=1.0; accepted is 0 to below 1"),
        (set_in("format", value="onnx"), r"format 'onnx' version 4; this release reads"),
        (set_in("tasks", value=[]), "the program has no task"),
        (set_in("tasks", 0, "target", "buffer", value=99), r"conv1: buffer is 99, accepted are 0"),
        (set_in("tasks", 0, "source", "channel", value=-1), r"conv1: channel offset is -1"),
        (set_in("tasks", 0, "lo", value=-200), r"conv1: lo is -200, accepted are -128 to 127"),
        (set_in("tasks", 0, "in_zero", value=300), r"conv1: in_zero is 300, accepted are -128"),
        (set_in("tasks", 0, "out", "scale", value=-1.0), r"conv1: output: .* is not a format"),
        (set_in("tasks", 0, "out", "bits", value=16), r"bits of its target buffer is 8, expected"),
        (set_in("tasks", 0, "shape", "stride", 0, value=0), r"conv1: kernel .*must be positive"),
        (set_in("tasks", 0, "shape", "kernel", value=[9, 9, 9]), r"conv1: kernel .* is larger"),
        (set_in("tasks", 0, "shape", "pad_before", 1, value=7), r"conv1: padding .* exceeds"),
        (
            set_in("tasks", 0, "shape", "filters", value=9),
            r"conv1: shape of enabled is \(2, 3\), exp",
        ),
        (set_in("tasks", 0, "name", value="conv2"), "two tasks are named 'conv2'"),
        (set_in("tasks", 0, "kind", value="gpu"), r"unknown field `kind`"),
        (set_in("tasks", 0, "type", value="gpu"), r"Invalid value 'gpu' - at `\$.tasks"),
        (set_in("config", "bits", value=5), r"bits=5 is not a width"),
        (set_in("config", "tm", value=6), r"tm=6 is not a multiple of gm=4"),
        (set_in("buffers", 0, "offset", value=1), r"buffer 0: offset 1 is not a multiple of 64"),
        (set_in("buffers", 0, "offset", value=64 << 20), r"buffer 0: its end is .* accepted are"),
        (set_in("arena_bytes", value=1 << 60), r"arena_bytes is \d+, accepted"),
        (set_in("clip", "frames", value=0), r"frames=0 of a clip"),
        (set_in("clip", "std", value=[0, 1, 1]), r"std .* do not normalise"),
        (set_in("labels", value=["a"]), r"1 labels for 5 outputs"),
        (set_in("target", "buffer", value=0), r"target of the program is"),
        (set_in("tasks", 0, "weights", "rows", value="nowhere"), r"an array 'nowhere' that is not"),
        (set_in("tasks", 1, "shortcut", "shift", value=63), r"conv2: shortcut: shift is 63"),
        (set_array("conv1/shift", first_element(63)), r"conv1: shift is 63, accepted are 0 to 62"),
        (set_array("conv1/mult", first_element(77)), r"conv1: mult is 77, accepted are 16384"),
        (set_array("conv2/values", first_element(-128)), r"conv2: a weight exceeds 127"),
        (set_array("conv1/rows", first_element(9)), r"conv1: rows do not increase within 0 to 3"),
        (set_array("conv1/bias", first_element(1 << 31)), r"conv1: filter 0 could reach \d+ in"),
        (set_array("conv1/bias", lambda a: a[1:]), r"conv1: shape of bias is \(7,\), expected"),
        (set_array("conv1/bias", lambda a: a.astype("f8")), r"conv1: type of bias is float64"),
        (
            set_array("conv1/values", lambda a: a[0]),
            r"conv1: shape of values is .*, expected \(6, ",
        ),
        (set_array("conv1/cols", lambda a: a[..., :0]), r"conv1: shape of values is .*, expected"),
        (set_array("conv1/enabled", np.logical_not), r"conv1: shape of values is .*expected \(0, "),
    ],
)
def test_inconsistent_documents_are_refused_by_name(change, text, tmp_path):
    path = tmp_path / "net.kgrc"
    compiled(small_net())[0].save(path)
    with_document(path, change)
    with pytest.raises(ProgramError, match=text):
        load(path)


def with_all_groups(program, tensors):
    """Put the arrays in as a file before version 4 has them: groups that are off included."""
    for task in program.tasks:
        if isinstance(task, ConvTask):
            for part in ("values", "rows", "cols"):
                tensors[f"{task.name}/{part}"] = getattr(task.weights, part)


def test_groups_that_are_off_are_not_in_the_file(tmp_path):
    """A depthwise convolution has one group in P; the file does not grow with P * Q."""
    net = Net(size=(1, 3, 3))
    net.conv(net.conv("clip", 64, 1, pad=0), 64, 3)
    weight = net.layers["conv2"].weight
    weight[...] = np.where(np.eye(64)[:, :, None, None, None], weight, 0)
    for bits in (8, 4):
        program, _ = compiled(net, small_config(bits))
        weights = program.tasks[1].weights
        assert weights.enabled.sum() == 16 and weights.enabled.size == 16 * 16
        path = tmp_path / f"{bits}.kgrc"
        program.save(path)
        assert path.stat().st_size < weights.values.nbytes * bits / 8
        assert_same(load(path), program)


def test_a_small_file_does_not_fill_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "net.kgrc"
    program = compiled(small_net())[0]
    program.save(path)
    nbytes = sum(t.weights.values.nbytes for t in program.tasks if isinstance(t, ConvTask))
    monkeypatch.setattr("pynq_kgrc.program.MAX_WEIGHT_BYTES", nbytes)
    load(path)
    monkeypatch.setattr("pynq_kgrc.program.MAX_WEIGHT_BYTES", nbytes - 1)
    with pytest.raises(ProgramError, match="bytes of its weights with all groups is"):
        load(path)


CLIP_FIELDS_OF_VERSION_2 = ("sampling", "stride", "rate", "temperature", "threshold")


def test_a_file_of_version_1_is_read_and_written_as_version_4(tmp_path):
    """Version 1 has no fields that say how a video is sampled: the program has the defaults."""
    path = tmp_path / "old.kgrc"
    program, _ = compiled(small_net(), fold=False)
    clip = replace(
        program.clip, sampling="uniform", stride=3, rate=12.5, temperature=1.5, threshold=0.25
    )
    msgspec.structs.replace(program, clip=clip).save(path)
    assert load(path).clip == clip and load(path).version == 4

    def to_version_1(document, tensors):
        document["version"] = 1
        del document["fold"], document["softmax"]
        with_all_groups(program, tensors)
        assert document["clip"].keys() >= set(CLIP_FIELDS_OF_VERSION_2)
        for name in CLIP_FIELDS_OF_VERSION_2:
            del document["clip"][name]

    with_document(path, to_version_1)
    old = load(path)
    assert old.version == 1
    assert old.clip == program.clip
    assert (old.clip.sampling, old.clip.temperature, old.clip.threshold) == ("windows", 1.0, 0.0)
    np.testing.assert_array_equal(outputs(old), outputs(program))
    old.save(path)
    new = load(path)
    assert new.version == 4 and new.clip == old.clip
    np.testing.assert_array_equal(outputs(new), outputs(program))


@pytest.mark.parametrize(("bits", "top"), [(8, 64), (4, 4)])
def test_weights_of_powers_of_two_take_few_bits(bits, top, tmp_path):
    """3 bits at a width of 4, 4 bits at 8; one other code, and all are stored as codes."""
    program, _ = compiled(small_net(), small_config(bits=bits))
    rng = np.random.default_rng(0)
    choices = [0, *(sign * (1 << i) for i in range(top.bit_length()) for sign in (1, -1))]

    def with_values(task, values):
        if not isinstance(task, ConvTask):
            return task
        weights = msgspec.structs.replace(task.weights, values=values(task.weights.values))
        return msgspec.structs.replace(task, weights=weights)

    def powers(values):
        return rng.choice(np.array(choices, np.int8), values.shape)

    tasks = tuple(with_values(task, powers) for task in program.tasks)
    few, plain = tmp_path / "few.kgrc", tmp_path / "plain.kgrc"
    changed = msgspec.structs.replace(program, tasks=tasks)
    changed.save(few)
    read = load(few)
    assert read.version == 5
    for ours, theirs in zip(read.tasks, tasks, strict=True):
        if isinstance(ours, ConvTask):
            np.testing.assert_array_equal(ours.weights.values, theirs.weights.values)
            assert ours.weights.values.dtype == np.int8
    np.testing.assert_array_equal(outputs(read), outputs(changed))
    last = tasks[-1].weights.values.copy()
    last.reshape(-1)[0] = 3
    other = with_values(tasks[-1], lambda _: last)
    msgspec.structs.replace(program, tasks=(*tasks[:-1], other)).save(plain)
    assert load(plain).version == 4
    count = sum(task.weights.values.size for task in tasks if isinstance(task, ConvTask))
    saved = {8: 4, 4: 1}[bits] * count / 8
    assert plain.stat().st_size - few.stat().st_size == pytest.approx(saved, abs=100)
    with_document(few, set_in("config", "bits", value=16))
    with pytest.raises(ProgramError, match="version 5 is for designs of 8 or 4 bits"):
        load(few)


def test_files_that_are_no_program(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.kgrc"
    with pytest.raises(ProgramError, match="there is no such program file"):
        load(path)
    for content in (b"", b"GIF89a", b"\xff" * 100, struct.pack("<Q", 1 << 62) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ProgramError, match="not a whole program file"):
            load(path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ProgramError, match="a safetensors file, but no program"):
        load(path)


def test_overflow_of_the_accumulator_is_refused_when_compiling():
    net = Net(size=(1, 4, 4))
    name = net.conv("clip", 4, (1, 3, 3), pad=(0, 1, 1))
    program, graph = compiled(net)
    huge = msgspec.structs.replace(program.tasks[0], bias=np.full(4, 1 << 31))
    with pytest.raises(ProgramError, match=rf"{name}: filter \d could reach \d+ in the 32-bit"):
        check(msgspec.structs.replace(program, tasks=(huge,)))
    # and through the compiler, with more weights than a 32-bit accumulator can add up
    wide = Net(size=(1, 1, 1), channels=3)
    first = wide.conv("clip", 140_000, 1, pad=0)
    wide.conv(first, 4, 1, pad=0)
    wide.layers["conv2"].weight[...] = 1
    with pytest.raises(CompileError, match=r"conv2: filter \d could reach \d+ in the 32-bit"):
        compiled(wide)


def test_every_conv_field_is_checked_against_its_shape(program):
    for task in program.tasks:
        if isinstance(task, ConvTask):
            assert task.kept_macs <= task.shape.macs


SAVE = """
import sys
from networks import compiled, small_config
from test_program import small_net
compiled(small_net(), small_config(8))[0].save(sys.argv[1])
"""


def test_the_same_program_gives_the_same_bytes(tmp_path):
    """Saved often in one process (safetensors draws an order each time), loaded, and in others."""
    program = compiled(small_net(), small_config(8))[0]
    path = tmp_path / "0.kgrc"
    found = set()
    for _ in range(20):
        program.save(path)
        found.add(path.read_bytes())
    load(path).save(path)
    found.add(path.read_bytes())
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
        }
        subprocess.run([sys.executable, "-c", SAVE, str(path)], env=environment, check=True)
        found.add(path.read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize(
    ("size", "window", "message"),
    [
        ((1, 1, 1100), dict(kernel=1, stride=(1, 1, 1030)), r"conv1: stride along the width is 10"),
        ((1, 1, 66000), dict(kernel=1, stride=1), r"conv1: width of its input with padding is 660"),
        ((1, 33000, 1), dict(kernel=1, stride=(1, 1024, 1)), r"conv1: stride along the height is"),
    ],
)
def test_what_the_hardware_cannot_count_is_refused_when_it_is_compiled(size, window, message):
    net = Net(size=size)
    net.conv("clip", 4, pad=0, **window)
    with pytest.raises(CompileError, match=message):
        compiled(net, fold=False)


def edited(program, number, **fields):
    tasks = list(program.tasks)
    tasks[number] = msgspec.structs.replace(tasks[number], **fields)
    return msgspec.structs.replace(program, tasks=tuple(tasks))


def test_every_limit_of_the_hardware_is_checked(monkeypatch):
    """Each limit is lowered in turn to what a program just exceeds."""
    program, _ = compiled(small_net(), small_config(), fold=False)
    check(program)
    reasons = {
        ("MAX_TAPS", 26): "conv1: taps of its window .* is 27, accepted are 1 to 26",
        ("MAX_LENGTH", 6): "conv1: height of its input with padding is 7, accepted are 1 to 6",
        ("MAX_STRIDE", 1): "pool6: stride along the depth is 2, accepted are 1 to 1",
        ("MAX_INT32", 60): "conv1: ",
    }
    for (name, limit), message in reasons.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"pynq_kgrc.program.{name}", limit)
            with pytest.raises(ProgramError, match=message):
                check(program)
    with monkeypatch.context() as patch:
        narrow = ITEM_BITS | {"channel_tile": BitField(0, 1)}
        patch.setattr("pynq_kgrc.program.ITEM_BITS", narrow)
        with pytest.raises(
            ProgramError, match=r"channel_tile of its plan is 2, accepted are 0 to 1"
        ):
            check(program)
    place = Slot(program.tasks[1].target.buffer, 3)
    with pytest.raises(ProgramError, match="conv2: channel offset 3 modulo 4 is 3, expected 0"):
        check(edited(program, 1, target=place))
    last = program.tasks[0].shape
    with pytest.raises(ProgramError, match="conv1: own_weights is -1"):
        check(edited(program, 0, shape=replace(last, own_weights=-1)))
