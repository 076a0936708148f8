"""The native backend: on each set of vector instructions the codes are those of the emulation.

The battery of test_backends.py runs it, too, with the instructions of this processor.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from networks import Net, compiled, random_codes, small_config

from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.backends import cores
from pynq_kgrc.backends.base import Counters
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.backends.native import library
from pynq_kgrc.backends.native.backend import Native
from pynq_kgrc.errors import DeviceError, ProgramError
from pynq_kgrc.program import KgrcWeights, Shortcut, load
from pynq_kgrc.runtime import Session

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    library.built_library() is None and not library.has_compiler(), reason="no C compiler"
)


@pytest.fixture(params=library.INSTRUCTIONS)
def instructions(request):
    """Each set that this processor has."""
    library.load_library()  # kernels that do not compile are a failure
    try:
        library.choose_instructions(request.param)
    except DeviceError as error:
        pytest.skip(str(error))
    return request.param


def outputs(backend, program, codes):
    """The codes that each task writes, by its name, and the counters without times."""
    try:
        backend.load(program)
        backend.write(program.source, codes)
        found, counters = {}, []
        for number, task in enumerate(program.tasks):
            counters += backend.run(number, number + 1)
            found[task.name] = backend.read(task.target, task.shape.out_channels, task.out_size)
    finally:
        backend.close()
    return found, [dataclasses.replace(each, seconds=0.0) for each in counters]


def assert_as_emulation(program, instructions, threads=1, codes=None):
    codes = random_codes(program) if codes is None else codes
    wanted, counted = outputs(Emulation(program.config, cores=1), program, codes)
    native = Native(program.config, threads, instructions)
    found, counters = outputs(native, program, codes)
    assert counters == counted and isinstance(counters[0], Counters)
    for name, whole in wanted.items():
        assert found[name].dtype == whole.dtype
        np.testing.assert_array_equal(found[name], whole, err_msg=name)
    return wanted


def random_net(seed):
    """Convolutions, pools, adds and concats at random."""
    net = Net(size=(4, 9, 10), seed=seed)
    rng = np.random.default_rng(seed)
    last = "clip"
    for _ in range(int(rng.integers(2, 6))):
        size = net.layers[last].size
        kernel = [int(rng.integers(1, min(4, s) + 1)) for s in size]
        pads = [int(rng.integers(0, k)) for k in kernel], [int(rng.integers(0, k)) for k in kernel]
        stride = [int(rng.choice([1, 1, 2, 3])) for _ in kernel]
        kind = rng.choice(["conv", "conv", "max", "mean", "add", "cat", "fused"])
        filters, act = int(rng.integers(1, 27)), str(rng.choice(["none", "relu", "relu6"]))
        kept = float(rng.choice([1.0, 0.5, 0.2]))
        if kind == "conv":
            last = net.conv(last, filters, kernel, stride, *pads, act=act, kept=kept)
        elif kind == "fused":
            last = net.conv(last, filters, 3, act=act, kept=kept)
            last = net.pool(last, (1, 2, 2) if min(size[1:]) > 1 else 1)
        elif kind in ("max", "mean"):
            op = "average_pool" if kind == "mean" else "max_pool"
            last = net.pool(last, kernel, stride, op=op)
        else:
            one = net.conv(last, filters, 1, pad=0, act="none")
            other = net.conv(last, filters if kind == "add" else 5, act="none")
            last = net.add(one, other, act=act) if kind == "add" else net.concat(one, other)
    net.conv(last, 3, net.layers[last].size, 1, 0)
    return net


DESIGNS = {
    "small": {},
    "wide": dict(tm=16, tn=8, gm=16, pm=8, tk=9, pk=3),
    "odd": dict(tm=24, tn=4, gm=6, pm=8, tk=4, pk=2),
}


def check_random(seed, instructions):
    bits = (16, 8, 4)[seed % 3]
    config = small_config(bits, seed % 5 > 0, **list(DESIGNS.values())[seed % 7 % 3])
    if not config.sparse:
        config = small_config(bits, False)
    program, _ = compiled(random_net(seed), config)
    assert_as_emulation(program, instructions, threads=1 + seed % 3)


@pytest.mark.parametrize("start", range(0, 24, 8))
def test_random_programs(instructions, start):
    for seed in range(start, start + 8):
        check_random(seed, instructions)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("start", range(1000, 3000, 500))
def test_two_thousand_random_programs(instructions, start):
    for seed in range(start, start + 500):
        check_random(seed, instructions)


def one_layer(filters, channels, size, weight, bits=8, codes=None, **fields):
    """A program of one convolution with these weights, and input codes."""
    net = Net(size=size, channels=channels)
    net.conv("clip", filters, name="conv")
    program, _ = compiled(net, small_config(bits), fold=False)
    (task,) = program.tasks
    p, q, t, kr, gn, kc = task.weights.values.shape
    values = np.resize(weight, (p, q, t, kr, gn, kc)).astype(task.weights.values.dtype)
    weights = KgrcWeights(values, task.weights.rows, task.weights.cols, task.weights.enabled)
    task = msgspec.structs.replace(task, weights=weights, bias=task.bias * 0, **fields)
    program = msgspec.structs.replace(program, tasks=(task,), labels=())
    given = random_codes(program)
    if codes is not None:
        given[...] = codes
    return program, given


def test_sums_that_wrap_on_the_way(instructions):
    """Operands are 128 larger where they are unsigned: 2^32 is passed, the last sum is right."""
    program, codes = one_layer(
        *(3, 4096, (3, 3, 3), 127), codes=127, shift=np.full(3, 39, np.uint8), hi=127, lo=-128
    )
    wanted = assert_as_emulation(program, instructions, codes=codes)
    assert 40 < wanted["conv"][0, 1, 1, 1] < 127
    assert 4096 * 27 * 127 * 255 > 1 << 31
    assert_as_emulation(program, instructions, codes=-codes - 1)
    (task,) = program.tasks
    task = msgspec.structs.replace(task, shift=np.full(3, 32, np.uint8))
    assert_as_emulation(msgspec.structs.replace(program, tasks=(task,)), instructions, codes=codes)


@pytest.mark.parametrize("value", [1, 8191, -8191])
def test_long_sums_of_more_steps_than_their_halves_hold(instructions, value):
    """At 16 bits a sum is held as two numbers, which tell it for 65,535 steps at most."""
    net = Net(size=(7, 7, 8), channels=400)
    net.conv("clip", 2, kernel=7, pad=0, name="conv")
    program, _ = compiled(net, small_config(16, tk=9), fold=False)
    (task,) = program.tasks
    assert 400 // 2 * 343 > 65_535
    weights = msgspec.structs.replace(task.weights, values=np.full_like(task.weights.values, value))
    shift = np.full(2, 16 if value == 1 else 46, np.uint8)
    changed = msgspec.structs.replace(
        task, weights=weights, bias=task.bias * 0, shift=shift, lo=-32768, hi=32767
    )
    extreme = msgspec.structs.replace(program, tasks=(changed,))
    codes = random_codes(extreme)
    if value == 1:  # each pair is -1: the low half of all sums is as large as it can be
        codes[::2], codes[1::2] = -1, 0
    else:
        codes[:200] = -32768
    assert_as_emulation(extreme, instructions, codes=codes)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_shift_and_multiplier(instructions, bits):
    """Shifts of 16 to 48 are computed in vectors, the others one by one."""
    rng = np.random.default_rng(0)
    for shifts in (np.arange(64).clip(0, 62), rng.integers(16, 49, 64)):
        mult = rng.integers(1 << 14, 1 << 15, 64).astype(np.int32)
        mult[::9] = 0
        limit = (1 << (bits - 1)) - 1
        program, codes = one_layer(
            *(64, 5, (2, 3, 4), rng.integers(-limit, limit + 1, 999)),
            bits=bits, shift=shifts.astype(np.uint8), mult=mult, lo=-limit, hi=limit,
        )  # fmt: skip
        assert_as_emulation(program, instructions, codes=codes)


@pytest.mark.parametrize(
    ("zero", "shift"), [(3, 0), (-128, 14), (127, 30), (5, 31), (-129, 20), (-(1 << 15), 62)]
)
def test_shortcuts_of_every_scale(instructions, zero, shift):
    net = Net(size=(3, 6, 7))
    first = net.conv("clip", 9)
    net.add(net.conv(first, 9, act="none"), first)
    program, _ = compiled(net)
    first, task = program.tasks
    shortcut = Shortcut(task.shortcut.source, zero, 30_001, shift)
    changed = msgspec.structs.replace(task, shortcut=shortcut)
    assert_as_emulation(msgspec.structs.replace(program, tasks=(first, changed)), instructions)


@pytest.mark.parametrize("threads", [2, 5])
def test_more_threads_than_jobs(instructions, threads):
    net = Net(size=(2, 3, 3))
    net.dense(net.conv("clip", 20), 9)
    program, _ = compiled(net)
    assert_as_emulation(program, instructions, threads)


def test_the_shipped_program(instructions):
    (path,) = (ROOT / "pynq_kgrc" / "programs").glob("*.kgrc")
    assert_as_emulation(load(path), instructions, threads=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("network", "pattern"), [("c3d", "kgrc"), ("r2plus1d_18", "dense"),
                                                  ("r2plus1d_18", "kgrc")])  # fmt: skip
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_whole_networks(instructions, network, pattern, bits):
    pytest.importorskip("torch", reason="no torch: whole networks not tested")
    from test_networks import seeded_graph

    from pynq_kgrc.compiler.network import compile_graph
    from pynq_kgrc.compress.patterns import recipe

    graph = seeded_graph(network)
    clip = graph.clip
    shape = (clip.frames, clip.height, clip.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    rates = {} if pattern == "dense" else recipe(network, pattern)
    program = compile_graph(graph, [frames], preset(f"{bits}-sparse"), rates, "minmax")
    assert_as_emulation(program, instructions, 2, program.encode_clip(frames))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.network
def test_i3d(instructions, i3d):
    _, program = i3d
    assert_as_emulation(program, instructions, 2)


# ---- refusals, the library ---------------------------------------------------------------------


def test_a_design_of_other_vectors_is_refused():
    with pytest.raises(DeviceError, match=r"T_N is 2; the native backend takes multiples of 4"):
        Native(small_config(16, tn=2))


def test_a_program_that_could_overflow_is_refused():
    program, _ = one_layer(2, 6000, (3, 3, 3), 127)
    backend = Native(program.config)
    with pytest.raises(ProgramError, match=r"conv: filter 0 could reach \d+ in the 32-bit"):
        backend.load(program)
    backend.close()


def test_instructions_by_name(monkeypatch):
    config = small_config()
    monkeypatch.setenv(library.VARIABLE, "plain")
    assert Native(config).instructions == "plain"
    with pytest.raises(DeviceError, match="no vector instructions 'mmx'; there are vnni, avx2"):
        Native(config, instructions="mmx")


def test_instructions_that_this_processor_lacks(monkeypatch):
    class Lacking:
        def kgrc_instructions(self, name):
            return None

    monkeypatch.setattr(library, "load_library", Lacking)
    with pytest.raises(DeviceError, match=r"this processor \(.*\) has no vnni instructions"):
        library.choose_instructions("vnni")


def test_a_library_of_other_sources_is_not_used(monkeypatch, tmp_path):
    """One that an older release built would compute something else."""
    kernels = tmp_path / "kernels"
    shutil.copytree(library.KERNELS, kernels)
    (tmp_path / "_kernels.so").write_bytes(library.find_library().read_bytes())
    monkeypatch.setattr(library, "KERNELS", kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert library.built_library() == tmp_path / "_kernels.so"
    with (kernels / "crew.c").open("a") as file:
        file.write("/* changed */\n")
    assert library.built_library() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"not built, and there is no C compiler \(gcc\)"):
        library.find_library()


def test_a_compiler_that_refuses(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no such standard' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(library, "built_library", lambda: None)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DeviceError, match="refuses the kernels in C:\nno such standard"):
        library.find_library()
    assert not list((tmp_path / "pynq_kgrc" / "native").iterdir())


@pytest.mark.parametrize(
    ("file", "text", "wanted"),
    [
        ("cpu.max", "150000 100000\n", 2),
        ("cpu.max", "max 100000\n", 64),
        ("cpu.max", "1000 100000\n", 1),
        ("cpu.max", "", 64),
        ("cpu/cpu.cfs_quota_us", "300000\n", 3),
        ("cpu/cpu.cfs_quota_us", "-1\n", 64),
        (None, "", 64),
    ],
)
def test_the_cores_of_a_container(monkeypatch, tmp_path, file, text, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    if file:
        (tmp_path / file).write_text(text)
    assert cores.available_cores() == wanted


def test_threads_end_with_the_backend():
    """Closed, collected or loaded anew: no thread is left behind."""
    program, _ = compiled(random_net(1))

    def threads_become(count):
        for _ in range(200):  # Python's threads of `load` are gone a moment after they are joined
            if len(list(Path("/proc/self/task").iterdir())) == count:
                return True
            time.sleep(0.02)
        return False

    before = len(list(Path("/proc/self/task").iterdir()))
    backend = Native(program.config, cores=3)
    for _ in range(3):
        backend.load(program)
        assert threads_become(before + 2)
    backend.close()
    assert threads_become(before)
    backend = Native(program.config, cores=3)
    backend.load(program)
    del backend
    assert threads_become(before)


def test_auto_is_native_where_it_is_built(monkeypatch):
    from pynq_kgrc.backends import chosen

    monkeypatch.delenv("PYNQ_KGRC_BACKEND", raising=False)
    monkeypatch.delenv("XILINX_XRT", raising=False)
    monkeypatch.setattr(chosen, "is_board", lambda: False)
    library.find_library()
    program, _ = compiled(random_net(2))
    with Session(program, "auto") as session:
        assert session.backend_name == "native"


# ---- sanitizers --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["address", "undefined", "thread"])
def test_sanitizers(kind, tmp_path, monkeypatch):
    """Random programs on every set of instructions, with accesses, shifts and races checked."""
    preloaded = {"address": "libasan", "undefined": "libubsan", "thread": "libtsan"}[kind] + ".so"
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc: not tested")
    done = subprocess.run(
        [compiler, f"-print-file-name={preloaded}"], capture_output=True, text=True, timeout=60
    )
    runtime = Path(done.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip(f"gcc has no {preloaded}: not tested")
    built = tmp_path / "kernels.so"
    flags = ("-std=gnu11", "-O1", "-g", "-pthread", f"-fsanitize={kind}")
    monkeypatch.setattr(library, "BUILD_SECONDS", 1800)  # the checks are many times the code
    library._build((*flags, "-fno-sanitize-recover=all"), built)
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "host_tests")!r})
        from pynq_kgrc.backends.native import library
        library.find_library = lambda: Path({str(built)!r})
        import test_native
        for name in library.INSTRUCTIONS:
            if library.load_library().kgrc_instructions(name.encode()):
                for seed in range(21):
                    test_native.check_random(seed, name)
        print("all equal")
        """
    )
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=3000,
        env={**os.environ, **options, "PYTHONPATH": path, "LD_PRELOAD": str(runtime)},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip() == "all equal"
