"""The timed simulation: codes as emulated at every timing, times that arithmetic gives, deadlocks.

The first half checks the clocks of timed.cpp on networks of two processes, the second half the
accelerator's own sources.
"""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from networks import Net, compiled, random_codes, small_config
from reference import run_program
from test_csim import DESIGNS, QUICK, assert_costs_agree, outputs, program_of, with_sources

from pynq_kgrc.accelerator.boards import REFERENCE
from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.analysis.simulation import report_simulation, simulate_tasks, task_numbers
from pynq_kgrc.backends import csim
from pynq_kgrc.backends.base import open_backend
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.backends.timed import SETUPS, TimedSimulation, Timing, timed_source
from pynq_kgrc.cli import main
from pynq_kgrc.compiler.network import compile_graph
from pynq_kgrc.compress.patterns import recipe
from pynq_kgrc.errors import ConfigError, DeviceError
from pynq_kgrc.video import load_clip

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

# ---- networks of two processes -----------------------------------------------------------------

NETWORKS = """
#include "timed.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
using namespace kgrc;
namespace kgrc {
void port_requested(int port, long beats, int beat_bytes, bool writes);
void port_moved(int port, bool writes);
void port_responded(int port);
}
extern "C" void kgrc_timed_set(const char*, double);
extern "C" const char* kgrc_timed_report();

static void produce(Stream<int>& out, int first, int count, int ii) {
  KGRC_LOOP(ii, false) for (int i = 0; i < count; ++i) {
    KGRC_TRIP();
    out.write(first + i);
  }
}
static void consume(Stream<int>& in, int first, int count, int ii) {
  KGRC_LOOP(ii, false) for (int i = 0; i < count; ++i) {
    KGRC_TRIP();
    if (in.read() != first + i) throw std::runtime_error("a word is lost");
  }
}
// Passes words on through a pipeline.
static void pass(Stream<int>& in, Stream<int>& out, int count) {
  KGRC_LOOP(1, false) for (int i = 0; i < count; ++i) {
    KGRC_TRIP();
    out.write(in.read());
  }
}
// Writes a word only after the one before has come back.
static void echo(Stream<int>& out, Stream<int>& back, int count) {
  for (int i = 0; i < count; ++i) {
    out.write(i);
    if (back.read() != i) throw std::runtime_error("a word is lost");
  }
}
static void read_memory(int port, int requests, int beats, int ahead) {
  int asked = 0;
  for (int i = 0; i < requests; ++i) {
    for (; asked < requests && asked < i + ahead; ++asked) port_requested(port, beats, 16, false);
    KGRC_LOOP(1, false) for (int beat = 0; beat < beats; ++beat) {
      KGRC_TRIP();
      port_moved(port, false);
    }
  }
}
static void write_memory(int port, int requests, int beats) {
  for (int i = 0; i < requests; ++i) {
    port_requested(port, beats, 16, true);
    KGRC_LOOP(1, false) for (int beat = 0; beat < beats; ++beat) {
      KGRC_TRIP();
      port_moved(port, true);
    }
    port_responded(port);
  }
}

int main(int count, char** words) {
  int number[4] = {};
  int given = 0;
  for (int i = 2; i < count; ++i) {
    char* const value = std::strchr(words[i], '=');
    if (value) {
      *value = 0;
      kgrc_timed_set(words[i], std::atof(value + 1));
    } else {
      number[given++] = std::atoi(words[i]);
    }
  }
  const std::string name = words[1];
  Stream<int> a("a"), b("b");
  a.set_depth(4);
  b.set_depth(4);
  if (name == "chain") {  // words, II of the writer, II of the reader
    start_process("writer", [&] { produce(a, 0, number[0], number[1]); });
    start_process("reader", [&] { consume(a, 0, number[0], number[2]); });
  } else if (name == "cross") {  // words in the stream that is read last
    start_process("writer", [&] { produce(a, 0, number[0], 1); produce(b, 0, 1, 1); });
    start_process("reader", [&] { consume(b, 0, 1, 1); consume(a, 0, number[0], 1); });
  } else if (name == "echo") {  // words
    start_process("asks", [&] { echo(a, b, number[0]); });
    start_process("answers", [&] { pass(a, b, number[0]); });
  } else if (name == "read") {  // ports, requests, beats of each, requests ahead
    for (int port = 0; port < number[0]; ++port)
      start_process(port ? "second" : "first",
                    [&, port] { read_memory(port, number[1], number[2], number[3]); });
  } else if (name == "write") {  // requests, beats of each
    start_process("writer", [&] { write_memory(0, number[0], number[1]); });
  } else if (name == "fails") {
    start_process("writer", [&] { produce(a, 0, 9, 1); });
    start_process("reader", [&] { consume(a, 1, 9, 1); });
  }
  try {
    run_processes();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts(kgrc_timed_report());
}
"""

SETTINGS = {
    "latency": 0,
    "port_bytes": 1e6,
    "ddr_bytes": 1e6,
    "outstanding": 16,
    "burst_beats": 64,
    "depth": 0,
    "flush": 0,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs a network of NETWORKS: its report, or the text of its error."""
    folder = tmp_path_factory.mktemp("timed")
    (folder / "main.cpp").write_text(NETWORKS)
    sources = csim.source_folder()
    command = ["g++", "-std=c++14", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{sources}"]
    command += [str(folder / "main.cpp"), str(sources / "timed.cpp"), "-o", str(folder / "main")]
    subprocess.run(command, check=True, timeout=300)

    def run(name, *numbers, **settings):
        chosen = {**SETTINGS, **{key.replace("__", "."): v for key, v in settings.items()}}
        words = [*map(str, numbers), *(f"{key}={value}" for key, value in chosen.items())]
        done = subprocess.run(
            [str(folder / "main"), name, *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode in (0, 1), done
        return done.stdout.strip() if done.returncode else json.loads(done.stdout)

    return run


def waits_of(report, process):
    (found,) = (each for each in report["processes"] if each["name"] == process)
    return {(wait["on"], wait["why"]): wait["cycles"] for wait in found["waits"]}


@pytest.mark.parametrize(("writes", "reads"), [(1, 1), (3, 1), (1, 3), (4, 2)])
def test_the_slower_of_two_processes_sets_the_time(two, writes, reads):
    report = two("chain", 1000, writes, reads)
    slow = max(writes, reads)
    assert 1000 * slow <= report["cycles"] <= 1000 * slow + 10
    empty = waits_of(report, "reader").get(("a", "empty"), 0)
    full = waits_of(report, "writer").get(("a", "full"), 0)
    assert empty == pytest.approx(1000 * (slow - reads), abs=10)
    assert full == pytest.approx(1000 * (slow - writes), abs=10 * slow)
    (a, _) = report["streams"]
    assert a["most"] == (4 if writes < reads else 1)


def test_a_shallow_stream_slows_down(two):
    """A place is free a cycle after it was read, a word there a cycle after it was written."""
    cycles = [two("chain", 1000, 1, 1, stream__a=depth)["cycles"] for depth in (1, 2, 4)]
    assert cycles[0] == pytest.approx(2000, abs=5)
    assert cycles[1] == cycles[2] == pytest.approx(1000, abs=5)


def test_a_deep_pipeline_ends_later_by_its_depth(two):
    base = two("chain", 1000, 1, 1)["cycles"]
    for settings, more in (
        ({"depth": 30}, 60),
        ({"depth": 30, "depth__reader": 7}, 37),
        ({"depth": 30, "flush": 1}, 60),
    ):
        assert two("chain", 1000, 1, 1, **settings)["cycles"] == base + more, settings


def test_words_stay_in_a_pipeline_that_does_not_flush(two):
    """Words that come back only as more go in never come back; those of a flushing one do."""
    assert two("echo", 50, flush=1)["cycles"] < 200
    report = two("echo", 50, depth=20, flush=1)
    assert report["cycles"] == pytest.approx(50 * 22, rel=0.05)
    text = two("echo", 50, depth=20)
    assert text == (
        "deadlock: asks waits for a word of b since cycle 0; "
        "answers waits for a word of a since cycle 2"
    )


def test_a_stream_that_is_too_short_for_its_network_is_named(two):
    assert two("cross", 4)["cycles"] > 0
    text = two("cross", 5)
    assert text.startswith("deadlock: writer waits for room in a")
    assert "reader waits for a word of b" in text
    assert two("cross", 5, stream__a=5)["cycles"] > 0
    # words that are in the pipeline are not in the stream yet
    assert isinstance(two("cross", 5, depth=50), str)


def test_what_a_process_throws_is_passed_on(two):
    assert two("fails") == "a word is lost"


def test_a_port_takes_its_bytes_a_cycle(two):
    beats = 100 * 64
    for port_bytes in (16, 8, 12.8):
        report = two("read", 1, 100, 64, 16, port_bytes=port_bytes, latency=70)
        assert report["cycles"] == pytest.approx(beats * 16 / port_bytes + 70, rel=0.02)
        report = two("write", 1, beats, port_bytes=port_bytes, latency=70)
        assert report["cycles"] == pytest.approx(beats * 16 / port_bytes + 70, rel=0.02)
    assert report["ports"] == [
        {"number": 0, "writes": True, "beats": beats, "beat_bytes": 16, "requests": 1}
    ]


def test_two_ports_share_the_memory(two):
    alone = two("read", 1, 100, 64, 16, port_bytes=16, ddr_bytes=16)["cycles"]
    both = two("read", 2, 100, 64, 16, port_bytes=16, ddr_bytes=16)["cycles"]
    assert both == pytest.approx(2 * alone, rel=0.02)
    roomy = two("read", 2, 100, 64, 16, port_bytes=16, ddr_bytes=32)["cycles"]
    assert roomy == pytest.approx(alone, rel=0.02)


def test_requests_ahead_hide_latency(two):
    """Requests of 4 beats, one after the other or ahead; a port has so many under way at most."""
    serial = two("read", 1, 200, 4, 1, latency=70)["cycles"]
    assert serial == pytest.approx(200 * 74, rel=0.03)
    ahead = two("read", 1, 200, 4, 200, latency=70, outstanding=4)["cycles"]
    assert ahead == pytest.approx(200 / 4 * 74, rel=0.1)
    wide = two("read", 1, 200, 4, 200, latency=70, outstanding=100)["cycles"]
    assert wide == pytest.approx(200 * 4 + 70, rel=0.05)
    written = two("write", 200, 4, latency=70)["cycles"]  # each waits for its response
    assert written == pytest.approx(200 * 74, rel=0.03)


# ---- what the pragmas say ----------------------------------------------------------------------


def test_pragmas_become_code():
    text = """
static Tile make_tile(const Task& task, int d) {
  return Tile();
}
void run(const Task& task) {
#pragma HLS DATAFLOW
  Stream<int> a("a");
#pragma HLS STREAM variable = a depth = 40
  copy(task,
       a);
  take(a);
  copy(task, b);
}
rows:
  for (int i = 0; i < 9; ++i) {
    // II = 1
#pragma HLS PIPELINE II = kMany style = flp
    KGRC_TRIP();
  }
"""
    lines = timed_source(text).split("\n")
    assert len(lines) == len(text.split("\n"))
    assert lines[1].endswith('{ KGRC_SPEND("make_tile");')
    assert lines[7] == "a.set_depth(40);"
    assert lines[8] == '  start_process("copy_0", [&] { copy(task,'
    assert lines[9] == "       a); });"
    assert lines[10] == '  start_process("take", [&] { take(a); });'
    assert lines[11] == '  start_process("copy_1", [&] { copy(task, b); }); run_processes();'
    assert lines[13] == "rows: KGRC_LOOP(kMany, true)"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("rows:\n", "", "no label before its loop"),
        (" II = 2", "", "no II = NUMBER"),
        ("  copy(a);\n", "", "no call of a process"),
    ],
)
def test_a_pragma_that_cannot_be_read_is_refused(old, new, found):
    text = "void f() {\n#pragma HLS DATAFLOW\n  copy(a);\n}\nrows:\n  while (more) {\n"
    text += "#pragma HLS PIPELINE II = 2\n  }\n"
    timed_source(text)
    assert old in text
    with pytest.raises(DeviceError, match=found):
        timed_source(text.replace(old, new))


def test_every_pipelined_loop_and_stream_of_the_sources_is_timed():
    """Each PIPELINE and STREAM pragma is read, and each loop that counts trips is pipelined."""
    for path in csim.source_folder().glob("*.cpp"):
        if path.name == "timed.cpp":
            continue
        text = path.read_text()
        timed = timed_source(text)
        assert timed.count(" KGRC_LOOP(") == text.count("#pragma HLS PIPELINE"), path.name
        assert timed.count(".set_depth(") == text.count("#pragma HLS STREAM"), path.name
        simulated = re.sub(r"#ifdef __SYNTHESIS__\n.*?\n#(else|endif)", "", text, flags=re.DOTALL)
        loops = simulated.count("#pragma HLS PIPELINE")
        assert simulated.count("KGRC_TRIP();") == loops, path.name


# ---- the accelerator ---------------------------------------------------------------------------

TIMINGS = {
    "default": Timing(),
    "shallow": Timing(depth=10, latency=40),
    "deep": Timing(depth=60, latency=100),
    "deeper": Timing(depth=100),
    "flushing": Timing(depth=100, flush=True),
    "slow memory": Timing(port_bytes=2, ddr_bytes=4, outstanding=1, latency=300),
}


@pytest.mark.parametrize(("bits", "sparse"), DESIGNS)
def test_codes_and_counts_are_those_of_the_emulation_at_every_timing(bits, sparse):
    program = program_of(bits, sparse)
    codes = random_codes(program)
    wanted = run_program(program, codes)
    backend = TimedSimulation(program.config, flags=QUICK)
    for name, timing in TIMINGS.items():
        backend.timing = timing
        for task, found in outputs(backend, program, codes).items():
            np.testing.assert_array_equal(found, wanted[task], err_msg=f"{name}, {task}")
        assert_costs_agree(backend, program)


@pytest.fixture(scope="module")
def simulation():
    program = program_of(8, True)
    backend = TimedSimulation(program.config, flags=QUICK)
    backend.load(program)
    return backend


def cycles(backend, **settings):
    """The cycles of each task."""
    backend.timing = replace(Timing(), **settings)
    numbers = range(len(backend.program.tasks))
    return [backend.run(n, n + 1)[0].cycles for n in numbers]


def test_it_is_a_backend(simulation):
    program = simulation.program
    backend = open_backend("timed", program.config)
    backend.load(program)
    backend.write(program.source, random_codes(program))
    found = [each.cycles for each in backend.run()]
    assert found == cycles(simulation)  # they do not depend on codes
    with pytest.raises(DeviceError, match="task 3 has no simulated time"):
        TimedSimulation(program.config, flags=QUICK).task_time(3)


def test_more_latency_and_depth_are_never_faster(simulation):
    for name, values in (("latency", (0, 40, 70, 100, 400)), ("depth", (0, 10, 40, 100))):
        found = [cycles(simulation, **{name: value}) for value in values]
        for before, after in pairwise(found):
            assert all(a <= b for a, b in zip(before, after, strict=True)), name
        assert sum(found[-1]) > sum(found[0])
    for name, values in (("port_bytes", (1000, 25.6, 4)), ("outstanding", (16, 4, 1))):
        found = [cycles(simulation, **{name: value}) for value in values]
        for before, after in pairwise(found):
            assert all(a <= b for a, b in zip(before, after, strict=True)), name


@pytest.mark.parametrize("name", SETUPS)
def test_a_setup_is_counted_for_each_tile(simulation, name):
    free = dict.fromkeys(SETUPS, 0)
    fast = cycles(simulation, setups=free)
    found = cycles(simulation, setups=free | {name: 100_000})
    for number, task in enumerate(simulation.program.tasks):
        work = simulation.program.work(task)
        tiles = np.prod([-(-o // t) for o, t in zip(work.out_size, work.tile, strict=True)])
        # three processes describe regions, each for the next; the plan goes ahead alone
        after = 2 if name == "make_region" else 0
        setups = (found[number] - fast[number]) / 100_000
        assert 0.9 * tiles <= setups <= 1.1 * (tiles + after)


# ---- the time model of accelerator/latency.py ---------------------------------------------------


def assert_modelled(backend, least=0.01):
    """Task and sum are modelled within 10 and 5 %, tasks of less than 1 % of the time left out."""
    program = backend.program
    numbers = range(len(program.tasks))
    found = [backend.task_time(number).cycles for number in numbers]
    modelled = [task_time(program.config, program.work(task)).cycles for task in program.tasks]
    for task, count, model in zip(program.tasks, found, modelled, strict=True):
        if count > least * sum(found):
            assert model == pytest.approx(count, rel=0.1), task.name
    assert sum(modelled) == pytest.approx(sum(found), rel=0.05)


def test_every_kind_of_task_takes_as_long_as_modelled(simulation):
    cycles(simulation)
    assert_modelled(simulation, 0)


def test_short_rows_and_many_small_tiles_take_as_long_as_modelled():
    """Rows of one beat: a port has as many requests under way as its list of runs allows."""
    net = Net(size=(8, 20, 40), channels=48)
    net.conv(net.conv("clip", 16, (3, 1, 1), 1, (1, 0, 0)), 8, 1, (1, 2, 2), 0)
    config = small_config(8, True)
    program, _ = compiled(net, config, fold=False)
    assert program.work(program.tasks[0]).tile[2] == config.port_positions
    backend = TimedSimulation(config, flags=QUICK)
    backend.load(program)
    cycles(backend)
    assert_modelled(backend)
    # a memory so far away that the requests under way set the time
    far = 400
    (slow, _) = cycles(backend, latency=far)
    memory = replace(REFERENCE, latency=float(far))
    modelled = task_time(config, program.work(program.tasks[0]), memory).cycles
    assert modelled == pytest.approx(slow, rel=0.1)
    assert slow > 2 * modelled_time(program, 0)


def test_a_fully_connected_layer_of_short_items_takes_as_long_as_modelled():
    """Items of four trips: the schedule, which takes four cycles for each run, sets the time."""
    config = small_config(8, False, filter_tiles=5)
    net = Net(size=(1, 1, 1), channels=200)
    net.dense("clip", 160)
    program, _ = compiled(net, config, fold=False)
    backend = TimedSimulation(config, flags=QUICK)
    backend.load(program)
    cycles(backend)
    assert_modelled(backend)
    time = backend.task_time(0)
    assert time.cycles > 1.1 * time.process("multiply").trips


def modelled_time(program, number):
    return task_time(program.config, program.work(program.tasks[number])).cycles


def test_the_simulated_times_of_the_documentation_are_as_modelled():
    path = csim.source_folder().parent / "benchmarks" / "results" / "latency.json"
    rows = json.loads(path.read_text("utf-8"))["rows"]
    simulated = [row for row in rows if row["simulated"]]
    assert len(simulated) >= 15
    for row in simulated:
        assert row["modelled"]["70"] == pytest.approx(row["simulated"], rel=0.05), row["design"]


def test_a_narrow_memory_sets_the_time():
    """A fully connected layer waits for its weights: its bytes by the rate of port or memory."""
    net = Net(size=(2, 4, 4), channels=48)
    net.dense("clip", 90)
    program, _ = compiled(net, small_config(8, True))
    backend = TimedSimulation(program.config, flags=QUICK)
    backend.load(program)
    for settings in ({"port_bytes": 2.0}, {"port_bytes": 0.5}, {"ddr_bytes": 3.0}):
        cycles(backend, **settings)
        time = backend.task_time(len(program.tasks) - 1)
        moved = [port.beats * port.beat_bytes for port in time.ports]
        ((name, rate),) = settings.items()
        wanted = (max(moved) if name == "port_bytes" else sum(moved)) / rate
        assert wanted > 20_000
        assert wanted <= time.cycles <= 1.02 * wanted + 2 * 70 + 1060


def test_where_the_time_goes_adds_up(simulation):
    cycles(simulation)
    time = simulation.task_time(1)
    names = [process.name for process in time.processes]
    assert len(set(names)) == len(names)
    assert {"multiply", "read_plan", "scale"} <= set(names)
    for process in time.processes:
        assert process.busy >= process.trips
        waited = sum(sum(cycles) for cycles in process.timeline.values())
        assert waited == pytest.approx(process.waited)
        assert process.end <= time.cycles
    for stream in time.streams:
        assert stream.most <= stream.depth
    used = {stream.name: stream for stream in time.streams}
    assert used["region_words"].words > 100
    array = time.process("multiply")
    assert array.trips == simulation.status(1)["array"]
    with pytest.raises(ConfigError, match=r"no process 'divide'; there are .*multiply"):
        time.process("divide")


def test_streams_that_are_too_short_for_the_design_are_named(monkeypatch, tmp_path):
    """The depth comes from the pragma: with one word in each stream the processes hang."""
    text = (csim.source_folder() / "top.cpp").read_text()
    pragmas = re.findall(r"#pragma HLS STREAM variable = \w+ depth = \d+\n", text)
    changes = [("top.cpp", each, re.sub(r"= \d+", "= 1", each)) for each in pragmas]
    with_sources(monkeypatch, tmp_path / "hls", changes)
    program = program_of(8, True)
    backend = TimedSimulation(program.config, flags=QUICK)
    backend.load(program)
    with pytest.raises(DeviceError, match=r"task \d+: deadlock: .*multiply waits for .* since"):
        backend.run()
    backend.timing = Timing(streams={each.split()[5]: 64 for each in pragmas})
    backend.load(program)
    backend.run()


def test_deep_pipelines_do_not_starve_the_array():
    """Many channel tiles: the list of input runs waits for items while the array waits for it."""
    net = Net(size=(1, 4, 4), channels=256)
    net.conv("clip", 40, (1, 3, 3), 1, (0, 1, 1))
    program, _ = compiled(net, small_config(8, True, filter_tiles=2))
    backend = TimedSimulation(program.config, flags=QUICK)
    backend.load(program)
    for depth in (10, 40, 100):
        backend.timing = Timing(depth=depth)
        backend.run()


def test_a_stream_without_a_pragma_is_refused(monkeypatch, tmp_path):
    text = (csim.source_folder() / "top.cpp").read_text()
    pragma = re.search(r"#pragma HLS STREAM variable = sum_words depth = \d+\n", text)[0]
    with_sources(monkeypatch, tmp_path / "hls", [("top.cpp", pragma, "")])
    program = program_of(8, True)
    backend = TimedSimulation(program.config, flags=QUICK)
    backend.load(program)
    with pytest.raises(DeviceError, match="the stream sum_words has no depth"):
        backend.run()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"latency": -1}, "latency=-1: use 0"),
        ({"port_bytes": 0}, "port_bytes=0: use a number above 0"),
        ({"ddr_bytes": float("nan")}, "ddr_bytes=nan"),
        ({"outstanding": 0}, "outstanding=0: use 1 to 256"),
        ({"depth": 1001}, "depth=1001: use 0 to 1000"),
        ({"streams": {"sums": 0}}, "streams: sums=0: use 1"),
        ({"setups": {"make_pie": 1}}, "setups of make_pie: use make_tile, make_region"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        Timing(**settings)


def test_settings_of_what_is_not_there_are_refused(simulation):
    for settings, text in (
        ({"streams": {"summs": 3}}, "no stream summs; there are .*sum_words"),
        ({"depths": {"multipy": 3}}, "no process multipy; there are .*multiply"),
    ):
        simulation.timing = Timing(**settings)
        with pytest.raises(DeviceError, match=text):
            simulation.run(0, 1)


def test_a_report_sums_its_tasks(simulation):
    program = simulation.program
    simulation.timing = Timing(clock_mhz=100)
    tasks = list(simulate_tasks(simulation, range(len(program.tasks))))
    report = report_simulation(program, simulation.timing, tasks)
    assert report.whole_ms == pytest.approx(sum(cycles(simulation)) / 100e3)
    convolutions = [each for each in tasks if each.convolution]
    assert 0 < len(convolutions) < len(tasks)
    assert report.convolutions_ms == pytest.approx(sum(each.ms for each in convolutions))
    assert "simulated, not measured" in report.figures
    names = [task.name for task in program.tasks]
    assert task_numbers(program, [names[2], "0"]) == [0, 2]
    for wrong in ("no-task", str(len(names)), "\u0661"):
        with pytest.raises(ConfigError, match="has no task"):
            task_numbers(program, [wrong])


def test_the_command_prints_a_table_json_and_a_picture(tmp_path, capsys):
    program = program_of(8, True)
    program.save(tmp_path / "small.kgrc")
    command = ["simulate", str(tmp_path / "small.kgrc")]
    picture = tmp_path / "picture.png"
    assert main([*command, "--latency=40", "--details", f"--plot={picture}"]) == 0
    printed = capsys.readouterr().out
    for task in program.tasks:
        assert re.search(rf"^{task.name} +\d+\.\d+ +\d+\.\d+ +\d+%", printed, re.MULTILINE)
    assert "simulated, not measured" in printed
    assert "latency 40 cycles" in printed
    assert re.search(r"sum_words +held +\d+ of +\d+ words", printed)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--json", "--tasks", "conv2", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in report["tasks"]] == ["conv2", program.tasks[4].name]
    assert report["whole_ms"] == pytest.approx(sum(task["ms"] for task in report["tasks"]))
    assert report["timing"]["latency"] == 70
    assert main([*command, "--tasks", "conv99"]) == 2
    assert "no task 'conv99'; use a number" in capsys.readouterr().err


# ---- whole networks ----------------------------------------------------------------------------


def assert_as_emulated_at_all_depths(program, codes):
    """Codes of every task as emulated; no deadlock with pipelines of 10 to 100 cycles."""
    emulation = Emulation(program.config)
    wanted = outputs(emulation, program, codes)
    emulation.close()
    backend = TimedSimulation(program.config)
    for timing in (Timing(depth=10), Timing(), Timing(depth=100)):
        backend.timing = timing
        for name, found in outputs(backend, program, codes).items():
            np.testing.assert_array_equal(found, wanted[name], err_msg=name)
        if timing == Timing():
            assert_modelled(backend)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("network", ["c3d", "r2plus1d_18"])
def test_whole_networks(network, example_clips):
    from test_networks import seeded_graph

    graph = seeded_graph(network)
    clips = sorted((example_clips / "calibration").glob("*.avi"))
    frames = [load_clip(path, graph.clip).frames for path in clips[:1]]
    program = compile_graph(graph, frames, preset("8-zcu102"), recipe(network, "kgrc"))
    assert_as_emulated_at_all_depths(program, program.encode_clip(frames[0]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.network
def test_whole_i3d(i3d, example_clips):
    _, program = i3d
    (path, *_) = sorted((example_clips / "calibration").glob("*.avi"))
    codes = program.encode_clip(load_clip(path, program.clip).frames)
    assert_as_emulated_at_all_depths(program, codes)
