"""The C-simulation: codes bit for bit, trips equal to the cost model's, accesses of its banks."""

import ctypes
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from functools import lru_cache

import msgspec
import numpy as np
import pytest
from networks import Net, compiled, random_codes, small_config
from reference import run_program
from test_dot import include_folders

from pynq_kgrc.accelerator import cost, header, tiling
from pynq_kgrc.accelerator.config import PRESETS, preset
from pynq_kgrc.accelerator.header import config_header
from pynq_kgrc.accelerator.plan import ITEM_BITS, BitField, Item, item_words64
from pynq_kgrc.accelerator.resources import estimate_resources
from pynq_kgrc.backends import base, csim, image
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.compiler.network import compile_graph
from pynq_kgrc.compress.patterns import recipe
from pynq_kgrc.errors import DeviceError, ProgramError
from pynq_kgrc.program import ConvTask
from pynq_kgrc.quant import ACCUMULATOR_BITS, code_dtype, unpack_int4
from pynq_kgrc.video import load_clip

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

DESIGNS = [(bits, sparse) for bits in (16, 8, 4) for sparse in (True, False)]
QUICK = ("-O0", "-DKGRC_PLAIN")
"""Quick to build, for small programs."""
PORTS = ("-O2", "-DKGRC_PLAIN", "-DKGRC_PORTS")
LATE = ("-O2", "-DKGRC_PLAIN", "-DKGRC_LATE")
"""Writes to memories come out as late as a pipeline with one trip a clock may let them."""


def every_kind(size=(5, 9, 17)):
    """A network with every kind of task, at sizes of two tiles and one more output."""
    net = Net(size=size)
    stem = net.conv("clip", 9, (1, 7, 7), (1, 2, 2), (0, 3, 3))
    body = net.conv(stem, 17, kept=0.5)
    thin = net.conv(body, 17, (3, 1, 1), (2, 1, 1), (1, 0, 0), kept=1 / 9)
    wide = net.conv(body, 17, 3, (2, 1, 1), 1)
    both = net.add(thin, wide)
    pooled = net.pool(both, (1, 2, 2))
    over = net.pool(pooled, 3, 1, 1)
    mean = net.pool(over, (1, 3, 3), 1, (0, 1, 1), op="average_pool")
    far = net.conv(net.concat(over, mean), 8, 3, 3, (1, 0, 2), pad_after=(0, 2, 1), act="relu6")
    net.dense(far, 11)
    return net


@lru_cache
def program_of(bits, sparse, **numbers):
    return compiled(every_kind(), small_config(bits, sparse, **numbers), fold=False)[0]


def outputs(backend, program, codes):
    backend.load(program)
    backend.write(program.source, codes)
    found = {}
    for i, task in enumerate(program.tasks):
        backend.run(i, i + 1)
        found[task.name] = backend.read(task.target, task.shape.out_channels, task.out_size)
    return found


def assert_costs_agree(backend, program):
    """Every count of the simulation equals the cost model's."""
    for number, task in enumerate(program.tasks):
        reported = backend.status(number)
        assert reported.pop("done") == 1
        assert reported.pop("clocks") == 0, "the C-simulation has no clock"
        assert reported == asdict(cost.task_cost(program.config, program.work(task))), task.name


@pytest.mark.parametrize(("bits", "sparse"), DESIGNS)
def test_trips_macs_and_beats_are_those_of_the_cost_model(bits, sparse):
    program = program_of(bits, sparse)
    kinds = {type(task) for task in program.tasks}
    assert len(kinds) == 2
    assert any(isinstance(t, ConvTask) and t.shortcut is not None for t in program.tasks)
    backend = csim.CSimulation(program.config)
    outputs(backend, program, random_codes(program))
    assert_costs_agree(backend, program)


@pytest.mark.parametrize(("bits", "sparse"), DESIGNS)
def test_no_bank_is_asked_for_more_than_two_accesses_a_trip(bits, sparse):
    """A bank has two ports; the design has more groups, lanes and columns than the small one."""
    program = program_of(bits, sparse, tm=16, pm=16, pk=3, pf=6)
    backend = csim.CSimulation(program.config, PORTS)
    codes = random_codes(program)
    found = outputs(backend, program, codes)
    assert backend._library.kgrc_port_conflicts() == 0
    assert backend._library.kgrc_early_reads() == 0
    wanted = run_program(program, codes)
    for name, codes_ in found.items():
        np.testing.assert_array_equal(codes_, wanted[name], err_msg=name)


def with_sources(monkeypatch, folder, changes):
    """A copy of the HLS sources with some text changed, which the backend then builds."""
    shutil.copytree(csim.source_folder(), folder, ignore=shutil.ignore_patterns("rtl", "scripts"))
    for name, old, new in changes:
        path = folder / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        path.write_text(text.replace(old, new))
    monkeypatch.setenv("KGRC_HLS_SRC", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def with_header(monkeypatch, old, new):
    """config.h with some text changed, as the backend builds with it."""

    def changed(config):
        text = config_header(config)
        assert text.count(old) == 1, f"config.h has {text.count(old)} times {old!r}"
        return text.replace(old, new)

    monkeypatch.setattr(csim, "config_header", changed)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        # one copy of the region for all columns: more than two reads of a bank
        ("compute.cpp", "= region_ram[half][copy][bank]", "= region_ram[half][0][bank]"),
        # a stride of 3 and more without cutting the beat in parts
        ("design.h", "region.stride[2] > 2 ? ceil_div(kPortPositions, 2) : 1", "1"),
    ],
)
def test_a_port_too_few_is_seen(monkeypatch, tmp_path, name, old, new):
    with_sources(monkeypatch, tmp_path / "hls", [(name, old, new)])
    net = Net(size=(2, 4, 40))
    net.conv("clip", 16, (1, 3, 4), (1, 1, 4), 0)
    # folded, the layer would have no stride
    program, _ = compiled(net, small_config(4, tm=16, pm=16, pk=3, pf=4), fold=False)
    backend = csim.CSimulation(program.config, PORTS)
    codes = random_codes(program)
    found = outputs(backend, program, codes)
    # a third word for a bank has no port, and is lost
    wrong = any(
        (found[name] != wanted).any() for name, wanted in run_program(program, codes).items()
    )
    assert wrong or backend._library.kgrc_port_conflicts() > 0


def shortest_blocks():
    """Blocks of four trips, whose sums are handed on in four, and regions that load in one."""
    net = Net(size=(1, 1, 1))
    net.conv("clip", 96, 1, pad=0)
    return compiled(net, small_config(8, tm=16, pm=16, pk=2, pf=3, filter_tiles=1))[0]


TOO_SHORT = [
    # a sum is added to again before it is read, added to and written
    (None, "kMinFeatureRows = 4", "kMinFeatureRows = 1"),
    # a block begins as soon as the sums of the block before the last are handed on
    ("schedule.cpp", "larger(0, kMinFeatureRows + 1 - feature_rows)", "0"),
    # a region is read in the trip after its last write
    (None, "kRegionDistance = 4", "kRegionDistance = 1"),
]
"""Gaps between a write and a read that are shorter than the distances of the memories."""


def with_short_gap(monkeypatch, folder, name, old, new):
    """Sources whose schedule waits less, while the memories keep their distances."""
    changes = [
        ("compute.cpp", "kSumRows, kMinFeatureRows>", "kSumRows, 4>"),
        ("compute.cpp", "kRegionRows, kRegionDistance>", "kRegionRows, 4>"),
    ]
    if name is None:
        with_header(monkeypatch, old, new)
    else:
        changes.append((name, old, new))
    with_sources(monkeypatch, folder, changes)


@pytest.mark.parametrize(("name", "old", "new"), TOO_SHORT)
def test_memories_are_left_alone_long_enough(monkeypatch, tmp_path, name, old, new):
    program = shortest_blocks()
    codes = random_codes(program)
    clean = csim.CSimulation(program.config, PORTS)
    outputs(clean, program, codes)
    assert clean._library.kgrc_early_reads() == 0
    with_short_gap(monkeypatch, tmp_path / "hls", name, old, new)
    backend = csim.CSimulation(program.config, PORTS)
    outputs(backend, program, codes)
    assert backend._library.kgrc_early_reads() > 0
    with pytest.raises(AssertionError):  # the model counts those trips, too
        assert_costs_agree(backend, program)


def assert_late_writes_change_nothing(program):
    backend = csim.CSimulation(program.config, LATE)
    codes = random_codes(program)
    found = outputs(backend, program, codes)
    for name, wanted in run_program(program, codes).items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.parametrize(("bits", "sparse"), DESIGNS)
def test_late_writes_change_nothing(bits, sparse):
    assert_late_writes_change_nothing(program_of(bits, sparse))


def test_late_writes_change_nothing_where_gaps_are_shortest():
    assert_late_writes_change_nothing(shortest_blocks())


@pytest.mark.parametrize(("name", "old", "new"), TOO_SHORT)
def test_a_gap_too_short_gives_wrong_codes_where_writes_are_late(
    monkeypatch, tmp_path, name, old, new
):
    program = shortest_blocks()
    with_short_gap(monkeypatch, tmp_path / "hls", name, old, new)
    backend = csim.CSimulation(program.config, LATE)
    codes = random_codes(program)
    found = outputs(backend, program, codes)
    wanted = run_program(program, codes)
    assert any((found[name] != codes).any() for name, codes in wanted.items())


@pytest.mark.parametrize(("bits", "sparse"), DESIGNS)
def test_packed_multipliers_give_the_same_codes(bits, sparse):
    program = program_of(bits, sparse)
    codes = random_codes(program)
    packed = outputs(csim.CSimulation(program.config), program, codes)
    direct = csim.CSimulation(program.config, ("-O2", "-DKGRC_PLAIN", "-DKGRC_DIRECT"))
    for name, found in outputs(direct, program, codes).items():
        np.testing.assert_array_equal(found, packed[name], err_msg=name)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_synthesis_without_packing_is_refused(bits, tmp_path):
    """At 16 bits a product takes a DSP anyway."""
    (tmp_path / "config.h").write_text(config_header(small_config(bits)))
    (tmp_path / "hls_stream.h").write_text(STREAM)
    (tmp_path / "hls_burst_maxi.h").write_text(BURST)
    command = ["g++", "-std=c++14", "-fsyntax-only", "-w", "-DKGRC_PLAIN", "-D__SYNTHESIS__"]
    command += ["-I", str(tmp_path), str(csim.source_folder() / "compute.cpp")]
    for flags, refused in ((), False), (("-DKGRC_DIRECT",), bits < 16):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
        assert ("each product of 8 or 4 bits takes a DSP" in done.stderr) == refused
        assert (done.returncode != 0) == refused


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_both_sets_of_types_give_the_same_codes(bits):
    flags = include_folders().get("ap_int")
    if flags is None:
        pytest.skip("the headers of ap_int are not here: pip install --no-deps hls4ml")
    program = program_of(bits, True)
    codes = random_codes(program)
    plain = outputs(csim.CSimulation(program.config), program, codes)
    wide = csim.CSimulation(program.config, ("-O1", *flags))
    for name, found in outputs(wide, program, codes).items():
        np.testing.assert_array_equal(found, plain[name], err_msg=name)


STREAM = """
namespace hls {
template <class Value>
struct stream {
  Value cell;
  void write(const Value& value) { cell = value; }
  Value read() { return cell; }
};
}
"""
"""A stand-in for the vendor's header."""

BURST = """
template <int>
struct ap_uint;
namespace hls {
template <class>
struct burst_maxi {};
}
"""
"""Another: the array names the types of ports and uses none."""

SANITIZED = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "design.h"
using namespace kgrc;
extern "C" const char* kgrc_simulate(void* const*, const uint64_t*, Word64*, int, int);
static std::vector<char> file(const char* name) {
  std::FILE* in = std::fopen(name, "rb");
  std::fseek(in, 0, SEEK_END);
  std::vector<char> bytes(std::ftell(in));
  std::rewind(in);
  if (std::fread(bytes.data(), 1, bytes.size(), in) != bytes.size()) std::abort();
  std::fclose(in);
  return bytes;
}
int main(int, char** names) {
  std::vector<char> maps = file(names[1]), weights = file(names[2]), tables = file(names[3]);
  const int tasks = std::atoi(names[4]);
  std::vector<char> status(tasks * kStatusWords * sizeof(Word64));
  Word64 digest;
  void* memory[kPorts];
  uint64_t bytes[kPorts];
  for (int port = 0; port < kPorts; ++port) {
    std::vector<char>& of = port < kPortWeights0  ? maps
                            : port < kPortTables ? weights
                            : port < kPortStatus ? tables
                                                 : status;
    memory[port] = of.data();
    bytes[port] = of.size();
  }
  if (const char* fault = kgrc_simulate(memory, bytes, &digest, 0, tasks)) {
    std::puts(fault);
    return 1;
  }
  std::FILE* out = std::fopen(names[5], "wb");
  std::fwrite(maps.data(), 1, maps.size(), out);
  std::fclose(out);
}
"""


@pytest.mark.parametrize(("bits", "sparse"), [(8, True), (4, False)])
def test_sanitizers_find_nothing(bits, sparse, tmp_path):
    """The buffers are exactly as large as the driver's, so that a read past their end is seen."""
    program = program_of(bits, sparse)
    backend = csim.CSimulation(program.config)
    codes = random_codes(program)
    backend.load(program)
    backend.write(program.source, codes)
    arrays = (backend._maps, backend._image.weights, backend._image.tables)
    for name, array in zip(("maps", "weights", "tables"), arrays, strict=True):
        array.tofile(tmp_path / name)
    (tmp_path / "config.h").write_text(config_header(program.config))
    (tmp_path / "main.cpp").write_text(SANITIZED)
    folder = csim.source_folder()
    checks = "-fsanitize=address,undefined"
    command = ["g++", "-std=c++14", "-O1", "-g", checks, "-fno-sanitize-recover=all"]
    command += ["-DKGRC_PLAIN", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-Wno-unused-label", "-I", str(tmp_path), "-I", str(folder)]
    command += [str(folder / source) for source in csim.SOURCES]
    command += [str(tmp_path / "main.cpp"), "-o", str(tmp_path / "main")]
    subprocess.run(command, check=True, timeout=300)
    files = [str(tmp_path / name) for name in ("maps", "weights", "tables")]
    done = subprocess.run(
        [str(tmp_path / "main"), *files, str(len(program.tasks)), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    backend.run()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out", np.uint8), backend._maps)


@pytest.mark.parametrize("pf", [9, 10])
def test_lanes_need_not_be_a_power_of_two(pf):
    assert_follows(program_of(8, True, pf=pf, beat=8))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "8-kv260")) for name in PRESETS],
)
def test_every_published_design_builds(name, tmp_path):
    """A small program on each design of table V, and on ours."""
    config = preset(name)
    net = Net(size=(3, 15, 17), channels=3)
    first = net.conv("clip", 70, kept=1.0 if not config.sparse else 0.4)
    net.dense(net.pool(first, (1, 2, 2)), 5)
    program, _ = compiled(net, config)
    codes = random_codes(program)
    backend = csim.CSimulation(config)
    found = outputs(backend, program, codes)
    assert_costs_agree(backend, program)
    emulation = Emulation(config)
    for task_name, wanted in outputs(emulation, program, codes).items():
        np.testing.assert_array_equal(found[task_name], wanted, err_msg=task_name)
    emulation.close()


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("kPm = 4", "kPm = 3", "P_M has to share out over the T_M / G_M groups of a tile"),
        ("kTm = 8", "kTm = 10", "has to be made of whole kernel groups"),
        ("kPk = 3", "kPk = 10", "P_K cannot exceed the taps of a tile"),
        ("kBits = 8", "kBits = 5", "a code has 16, 8 or 4 bits"),
    ],
)
def test_bad_tilings_do_not_compile(monkeypatch, tmp_path, old, new, text):
    config = small_config(8)
    with_header(monkeypatch, old, new)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DeviceError, match=text):
        csim.build_library(config)
    assert not list(tmp_path.rglob("*.so"))


# ---- what Python and C++ share: changed in its one home, the other side follows ----------------


def assert_follows(program):
    """The C-simulation, built with the present constants, gives the same codes and counts."""
    codes = random_codes(program)
    backend = csim.CSimulation(program.config, QUICK)
    found = outputs(backend, program, codes)
    for name, wanted in run_program(program, codes).items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    assert_costs_agree(backend, program)


@pytest.fixture
def shared(monkeypatch, tmp_path):
    """A compiled program, its tiles chosen, with a cache of libraries of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = program_of(8, True)
    for task in program.tasks:
        program.work(task)
    return program


def test_status_words_follow(monkeypatch, shared):
    """In reverse order; the C++ names them as Python does, and does not build with other names."""
    assert set(header.STATUS) == {"done", "clocks", *(field.name for field in fields(cost.Cost))}
    order = header.STATUS[::-1]
    for module in (header, csim, base):
        monkeypatch.setattr(module, "STATUS", order)
    assert_follows(shared)
    monkeypatch.setattr(csim, "STATUS", order[::-1])
    with pytest.raises(AssertionError):
        assert_follows(shared)
    monkeypatch.setattr(header, "STATUS", tuple(s.replace("store", "pool") for s in order))
    with pytest.raises(DeviceError, match="kStatusStore"):
        csim.build_library(shared.config, QUICK)


def test_the_bits_of_items_follow(monkeypatch, shared):
    bits = {"channel_tile": 40, "held_tile": 56, "mask": 24, "new_region": 3, "end_block": 0}
    bits["vectors"] = 5
    assert bits.keys() == ITEM_BITS.keys()
    for name, first in bits.items():
        monkeypatch.setitem(ITEM_BITS, name, BitField(first, ITEM_BITS[name].width))
    assert_follows(shared)


def test_the_bits_of_scales_follow(monkeypatch, shared):
    changed = {"mult": BitField(30, 16), "shift": BitField(1, 8)}
    monkeypatch.setattr(header, "SCALE_BITS", changed)
    with pytest.raises(AssertionError):  # only the C++ has changed
        assert_follows(shared)
    monkeypatch.setattr(image, "SCALE_BITS", changed)
    assert_follows(shared)


def test_the_least_trips_between_two_accesses_to_a_sum_follow(monkeypatch, shared):
    monkeypatch.setattr(header, "MIN_FEATURE_ROWS", 6)
    with pytest.raises(AssertionError, match="array"):  # only the C++ has changed
        assert_follows(shared)
    for module in (tiling, cost):
        monkeypatch.setattr(module, "MIN_FEATURE_ROWS", 6)
    assert_follows(shared)


def test_the_trips_from_a_region_s_last_write_to_its_first_read_follow(monkeypatch, shared):
    monkeypatch.setattr(header, "REGION_DISTANCE", 9)
    with pytest.raises(AssertionError, match="array"):  # only the C++ has changed
        assert_follows(shared)
    monkeypatch.setattr(cost, "REGION_DISTANCE", 9)
    assert_follows(shared)


def test_the_width_of_sums_follows(monkeypatch, shared):
    """Sums of 16 bits overflow; the resources that are estimated change, too."""
    before = estimate_resources(preset("8-sparse"))
    monkeypatch.setattr(image, "ACCUMULATOR_BITS", dict(ACCUMULATOR_BITS))  # biases fit
    monkeypatch.setitem(ACCUMULATOR_BITS, 8, 16)
    with pytest.raises(AssertionError, match="conv"):
        assert_follows(shared)
    monkeypatch.setattr(image, "ACCUMULATOR_BITS", ACCUMULATOR_BITS)
    with pytest.raises(ProgramError, match=r"a bias of -?\d+ does not fit the 16 bits"):
        assert_follows(shared)
    monkeypatch.setitem(ACCUMULATOR_BITS, 8, 48)
    assert_follows(shared)
    assert estimate_resources(preset("8-sparse")).bram36 > before.bram36


def test_a_number_that_does_not_fit_its_bits_is_refused():
    item = Item(3, 300, 255, 5, True, False, 0)
    (word64,) = item_words64([item])
    assert {n: int(f.get(word64)) for n, f in ITEM_BITS.items()} == {
        n: int(getattr(item, n)) for n in ITEM_BITS
    }
    for held_tile in (256, -1):
        with pytest.raises(ProgramError, match=rf"held_tile={held_tile} does not .*; use 0 to 255"):
            item_words64([item, Item(3, 300, held_tile, 5, True, False, 0)])


def test_a_field_that_does_not_fit_its_bits_is_refused():
    program = program_of(8, True)
    tasks = [msgspec.structs.replace(program.tasks[0], hi=1 << 31), *program.tasks[1:]]
    with pytest.raises(ProgramError, match=r"conv1: high=2147483648 does not fit the 32 bits"):
        image.build_image(msgspec.structs.replace(program, tasks=tuple(tasks)))


# ---- what goes wrong ---------------------------------------------------------------------------


def test_a_process_that_waits_for_ever_is_named(monkeypatch, tmp_path):
    change = ("decode.cpp", "region_words.write(out);", "if (!out.last) region_words.write(out);")
    with_sources(monkeypatch, tmp_path / "hls", [change])
    program = program_of(8, True)
    backend = csim.CSimulation(program.config, QUICK)
    backend.load(program)
    with pytest.raises(DeviceError, match="task 0: the stream region_words is empty where it is"):
        backend.run()


@pytest.mark.parametrize("stride", [(3, 1, 2), (1, 3, 1), (2, 2, 2)])
def test_rows_between_windows_are_not_requested(stride):
    """Kernels smaller than their strides, in several tiles and regions, with padding."""
    net = Net(size=(7, 11, 13), channels=9)
    net.conv("clip", 17, (1, 2, 1), stride, (0, 1, 0))
    program, _ = compiled(net, small_config(8))
    codes = random_codes(program)
    backend = csim.CSimulation(program.config)
    found = outputs(backend, program, codes)
    for name, wanted in run_program(program, codes).items():
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    assert_costs_agree(backend, program)
    (task,) = program.tasks
    assert program.work(task).tile != task.out_size


ASK = "may_ask = ahead < kRunsAhead - 1 && waiting < kRequestsAhead - 1;"
READ, WRITE = (f"maps.{way}_request(int(run.first), int(run.beats))" for way in ("read", "write"))
WAITING = "if (waiting == kRequestsAhead) maps.write_response();\n        else ++waiting;"
RESPONSES = "responses:\n  for (int i = 0; i < waiting; ++i) maps.write_response();\n"


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        # the beats of a run are taken before the run is requested
        (f"        {READ};\n", "", "input0: read without a request"),
        (READ, READ.replace("int(run.beats)", "0"), "input0: a request of no beats"),
        (READ, READ.replace("int(run.first)", "int(run.first) - 1"), "input0: .* passes the end"),
        (
            READ,
            READ.replace("int(run.beats)", "1 + int(run.beats)"),
            "input0: requested beats were",
        ),
        (ASK, ASK.replace(" && waiting < kRequestsAhead", ""), "shortcut: more than 16 requests"),
        (WRITE + ";\n", "", "output: written without a request"),
        (WRITE, WRITE.replace("int(run.first)", "1 << 30"), "output: .* passes the end of its mem"),
        (
            WRITE,
            WRITE.replace("int(run.beats)", "1 + int(run.beats)"),
            "output: no write has ended",
        ),
        (WAITING, "++waiting;", "output: more than 16 requests at a time"),
        (RESPONSES, "", "output: responses to writes were not taken"),
        (RESPONSES, RESPONSES.replace("i < waiting", "i <= waiting"), "output: no write has ended"),
        # a run that is never written, at the very end
        (
            RESPONSES,
            RESPONSES + "  maps.write_request(0, 1);\n",
            "output: requested beats were not",
        ),
    ],
)
def test_a_port_that_is_misused_is_named(monkeypatch, tmp_path, old, new, text):
    """Faults of the protocol that hardware would answer by hanging, or by a bus error."""
    with_sources(monkeypatch, tmp_path / "hls", [("memory.cpp", old, new)])
    program = program_of(8, True)
    backend = csim.CSimulation(program.config, QUICK)
    with pytest.raises(DeviceError, match=text):
        outputs(backend, program, random_codes(program))


def test_memory_that_ends_too_early_is_named():
    """The address of a run past the end of each port's memory, in the order of use."""
    program = program_of(8, True)
    backend = csim.CSimulation(program.config)
    for name, text in (("tables", "indices"), ("weights", "weights[01]"), ("maps", "output|input")):
        backend.load(program)
        image = backend._image
        if name == "maps":
            backend._maps = backend._maps[:64]
        else:
            shorter = {name: getattr(image, name)[: getattr(image, name).size // 2]}
            backend._image = replace(image, **shorter)
        with pytest.raises(DeviceError, match=f"the port .*({text}).* passes the end of its mem"):
            backend.run()


@pytest.mark.parametrize(("bits", "sparse"), [(8, True), (16, False)])
def test_runs_are_as_long_as_the_map_lets_them_be(bits, sparse):
    """A region's whole planes are a run each, a tile that is a whole map is a single one."""
    net = Net(size=(6, 8, 8), channels=8)
    net.dense(net.conv("clip", 16), 5)
    program, _ = compiled(net, small_config(bits, sparse, td=6, th=8, tw=8))
    backend = csim.CSimulation(program.config)
    outputs(backend, program, random_codes(program))
    first, last = program.tasks
    regions = sum(item.new_region for item in program.work(first).items)
    assert program.work(first).tile == (6, 8, 8), "a single tile"
    assert backend.status(0)["input_requests"] == regions * 6, "a plane is one run"
    assert backend.status(0)["output_requests"] == 1, "so is the whole map"
    assert backend.status(0)["weight_requests"] == 2
    assert backend.status(1)["output_requests"] == 1
    assert last.shape.taps == 6 * 8 * 8


BURST_MAXI = """
#pragma once
#include <ap_int.h>
#include <algorithm>
#include <cassert>
#include <cstdio>
#include <deque>
#include <map>
namespace hls {
struct Run {
  size_t next, end;
};
// The most runs that were under way at a time; printed when the program ends.
struct Most {
  size_t reads = 0, responses = 0;
  ~Most() { std::printf("%zu reads, %zu writes under way\\n", reads, responses); }
};
static Most most;
// What UG1399, "Using Manual Burst", says of the class: the state is the memory's, not the copy's.
template <class Value>
class burst_maxi {
 public:
  burst_maxi(Value* memory) : memory(memory) { open() = Open(); }
  void read_request(size_t first, unsigned count) {
    assert(count > 0);
    open().reads.push_back(Run{first, first + count});
    most.reads = std::max(most.reads, open().reads.size());
  }
  Value read() { return memory[next(open().reads)]; }
  void write_request(size_t first, unsigned count) {
    assert(count > 0 && open().reads.empty());
    open().writes.push_back(Run{first, first + count});
    most.responses = std::max(most.responses, ++open().responses);
  }
  void write(const Value& value) { memory[next(open().writes)] = value; }
  void write_response() {
    assert(open().responses > open().writes.size());
    --open().responses;
  }

 private:
  struct Open {
    std::deque<Run> reads, writes;
    size_t responses = 0;
  };
  static size_t next(std::deque<Run>& runs) {
    assert(!runs.empty());
    const size_t place = runs.front().next++;
    if (runs.front().next == runs.front().end) runs.pop_front();
    return place;
  }
  Open& open() {
    static std::map<void*, Open> all;
    return all[memory];
  }
  Value* memory;
};
}  // namespace hls
"""


@pytest.mark.parametrize("design", ["8-sparse", "4-dense"])
def test_the_ports_of_the_vendor_carry_the_same_beats(tmp_path, design):
    """The sources as Vitis HLS simulates them, with a stand-in for its class of ports.

    Requests run ahead of the beats: more than half of those that a port may have are under way.
    """
    flags = include_folders().get("ap_int")
    if flags is None:
        pytest.skip("the headers of ap_int are not here: pip install --no-deps hls4ml")
    folder = csim.source_folder()
    (tmp_path / "config.h").write_text(config_header(preset(design)))
    (tmp_path / "hls_burst_maxi.h").write_text(BURST_MAXI)
    vectors = [sys.executable, str(folder / "scripts/vectors.py"), "--design", design]
    subprocess.run([*vectors, "-o", str(tmp_path / "vectors")], check=True, timeout=300)
    command = ["g++", "-std=c++14", "-O1", "-w", "-DKGRC_VITIS", *flags, f"-I{tmp_path}"]
    command += [f"-I{folder}", str(folder / "scripts/bench.cpp")]
    command += [str(folder / name) for name in csim.SOURCES]
    subprocess.run([*command, "-o", str(tmp_path / "bench")], check=True, timeout=300)
    done = subprocess.run(
        [str(tmp_path / "bench"), str(tmp_path / "vectors")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 tasks, 0 differences" in done.stdout
    # one static object for each source that includes the header; that of memory.cpp counts
    counts = re.findall(r"(\d+) reads, (\d+) writes under way", done.stdout)
    most = [max(map(int, each)) for each in zip(*counts, strict=True)]
    assert all(header.REQUESTS_AHEAD // 2 < number <= header.REQUESTS_AHEAD for number in most)


def test_a_machine_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DeviceError, match=r"no C\+\+ compiler"):
        csim.build_library(small_config(8))
    monkeypatch.setenv("KGRC_HLS_SRC", str(tmp_path))
    with pytest.raises(DeviceError, match="no HLS sources there"):
        csim.build_library(small_config(8))


def test_a_library_of_another_design_is_refused(monkeypatch):
    program = program_of(8, True)
    backend = csim.CSimulation(program.config)
    other = small_config(8, pf=6)
    backend._library = ctypes.CDLL(str(csim.build_library(other)))
    backend._library.kgrc_simulate.restype = ctypes.c_char_p
    backend.load(program)
    backend._image.tables[:] = 0  # tasks without work
    with pytest.raises(DeviceError, match="the library is of design"):
        backend._call(0, 0)


def assert_as_emulated(program, codes):
    """Every task's codes equal the emulation's, and every count the cost model's."""
    backend, emulation = csim.CSimulation(program.config), Emulation(program.config)
    wanted = outputs(emulation, program, codes)
    emulation.close()
    for name, found in outputs(backend, program, codes).items():
        np.testing.assert_array_equal(found, wanted[name], err_msg=name)
    assert_costs_agree(backend, program)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["c3d", "r2plus1d_18"])
@pytest.mark.parametrize("pattern", ["dense", "kgrc"])
def test_whole_networks(network, pattern, example_clips):
    """Every task of the real networks at 8 bits."""
    from test_networks import seeded_graph

    graph = seeded_graph(network)
    clips = sorted((example_clips / "calibration").glob("*.avi"))
    frames = [load_clip(path, graph.clip).frames for path in clips[:1]]
    rates = {} if pattern == "dense" else recipe(network, pattern)
    program = compile_graph(graph, frames, preset("8-sparse"), rates)
    assert_as_emulated(program, program.encode_clip(frames[0]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.network
def test_whole_i3d(i3d, example_clips):
    """The pretrained network: concats, pools of its own, 64 frames of 224x224."""
    _, program = i3d
    (path, *_) = sorted((example_clips / "calibration").glob("*.avi"))
    codes = program.encode_clip(load_clip(path, program.clip).frames)
    assert_as_emulated(program, codes)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_map_in_memory_code_by_code(bits, channels_last, monkeypatch):
    """Vectors of T_N channels, rows of whole beats; the padding is zero whatever memory held."""
    dirty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(dirty(shape).shape, 5, dtype))
    config = small_config(bits)
    rng = np.random.default_rng(bits)
    for channels, width in ((3, 5), (2 * config.tn, 8), (config.tn + 3, 7)):
        codes = rng.integers(-8, 8, (channels, 2, 3, width)).astype(code_dtype(bits))
        if channels_last:
            codes = np.ascontiguousarray(codes.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
        raw = image.encode_map(config, codes, bits)
        assert raw.nbytes == image.map_bytes(config, channels, (2, 3, width), bits)
        count = raw.nbytes * 8 // bits
        found = unpack_int4(raw, count) if bits == 4 else raw.view(code_dtype(bits))
        row = tiling.beats_of_row(config, width) * config.port_positions
        vectors = -(-channels // config.tn)
        wanted = np.zeros((vectors, 2, 3, row, config.tn), int)
        for c, d, h, w in np.ndindex(codes.shape):
            wanted[c // config.tn, d, h, w, c % config.tn] = codes[c, d, h, w]
        np.testing.assert_array_equal(found, wanted.ravel())
