"""The checks of the HLS sources: they refuse nothing in them, and each planted fault."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from networks import small_config

from pynq_kgrc.accelerator import resources
from pynq_kgrc.accelerator.config import PRESETS, preset
from pynq_kgrc.accelerator.resources import stream_words

pytest.importorskip("clang.cindex", reason="no libclang: pip install -c constraints.txt libclang")

HLS = Path(__file__).resolve().parents[1] / "hls_src"
sys.path.insert(0, str(HLS / "checks"))

import banks  # noqa: E402
import check  # noqa: E402
import delays  # noqa: E402
import ports  # noqa: E402
import widths  # noqa: E402
from ir import CLANG, CheckError, compile_unit, find_compiler  # noqa: E402

compiled = pytest.mark.skipif(
    find_compiler() is None, reason=f"no {CLANG} here: `make rtl-tools`; HLS sources not checked"
)
parsed = pytest.mark.skipif(
    shutil.which("gcc") is None, reason="no gcc: its headers are needed to parse hls_src"
)

SOURCES = sorted(path.name for path in HLS.glob("*.cpp") if path.name != "timed.cpp")

# P_F = 9 and P_K = 3 are those of 8-zcu102: lanes that are no power of two, three taps a trip
NARROW = dict(tm=8, tn=4, gm=4, pm=4, pk=3, pf=9, beat=4)


@compiled
@pytest.mark.parametrize("name", SOURCES)
def test_the_sources_pass(name, tmp_path):
    unit = compile_unit(HLS, name, small_config(8, **NARROW), tmp_path)
    asked = {
        number
        for number, line in enumerate((HLS / name).read_text("utf-8").splitlines(), 1)
        if re.match(r"#pragma HLS PIPELINE", line)
    }
    # none of the loops has been missed
    assert {loop.line for loop in unit.loops} == asked
    assert check.check_unit(unit) == []


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("design", list(PRESETS))
@pytest.mark.parametrize("name", SOURCES)
def test_the_sources_pass_in_all_designs(name, design, tmp_path):
    config = check.fewer_filters(preset(design))
    assert check.check_unit(compile_unit(HLS, name, config, tmp_path)) == []


@parsed
@pytest.mark.parametrize("design", list(PRESETS))
def test_every_stream_can_be_built(design, tmp_path):
    found = widths.stream_widths(HLS, preset(design), tmp_path)
    text = (HLS / "top.cpp").read_text("utf-8")
    assert set(found) == set(re.findall(r"STREAM variable = (\w+)", text))
    assert widths.check_widths(found, design) == []


GROUPS = {
    "tiles": "tiles_", "items": "items_|item_words",
    "runs of ports": r"(input|shortcut|output)_runs",
    "lengths of runs": r"\w+_lengths", "table words": "scale_words|chunk_indices",
}  # fmt: skip
"""Streams of top.cpp by the name that accelerator/resources.py has for them, where it differs."""


@parsed
@pytest.mark.parametrize("design", ["8-zcu102", "16-dense", "4-sparse"])
def test_resources_count_the_streams_there_are(design, tmp_path):
    config = preset(design)
    found = widths.stream_widths(HLS, config, tmp_path)
    text = (HLS / "top.cpp").read_text("utf-8")
    depths = dict(re.findall(r"STREAM variable = (\w+) depth = (\d+)", text))
    for name, count, bits, depth in stream_words(config):
        group = [each for each in found if re.match(GROUPS.get(name, name), each)]
        assert {int(depths[each]) for each in group} == {depth}, name
        total = sum(found[each] for each in group)
        assert abs(count * bits - total) <= 0.15 * total, (name, count * bits, total)


def test_resources_count_the_processes_there_are():
    (body,) = re.findall(
        r"#pragma HLS DATAFLOW\n(.*?)^}", (HLS / "top.cpp").read_text(), re.S | re.M
    )
    assert len(re.findall(r"^  \w+\(", body, re.M)) == resources.PROCESSES


def test_ports_are_used_in_one_place():
    assert ports.check_requests(HLS) == []


# ---- planted faults --------------------------------------------------------------------------

PROCESS = """#include "design.h"
namespace kgrc {
static Ram<Sum, 64, 4> sums[2][4];
void process(const Word64* memory, int rows, Stream<int>& in, Stream<int>& out) {
#pragma HLS ARRAY_PARTITION variable = sums complete dim = 1
#pragma HLS ARRAY_PARTITION variable = sums complete dim = 2
  int row = 0, left = rows;
  bool half = false;
trips:
  while (left > 0) {
    // II = 1: a counter and a row that wraps around
#pragma HLS PIPELINE II = 1
    const int value = in.read();
    int total = int(memory[left]);
  halves:
    for (int i = 0; i < 2; ++i)
      for (int lane = 0; lane < 4; ++lane) {
#pragma HLS UNROLL
        const Sum old = sums[i][lane].read(row);
        sums[i][lane].write(row, half == i ? Sum(old + value) : Sum(0));
        total += half == i ? 0 : int(old);
      }
    out.write(total);
    half = !half;
    row = row == 63 ? 0 : row + 1;
    --left;
  }
}
}  // namespace kgrc
"""


def faults_of(folder, *changes):
    """What the checks say of PROCESS with (old, new) changed, each found exactly once."""
    text = PROCESS
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} times {old!r}"
        text = text.replace(old, new)
    sources = folder / "planted"
    sources.mkdir(parents=True)
    for path in HLS.glob("*.h"):
        shutil.copy(path, sources)
    (sources / "process.cpp").write_text(text)
    unit = compile_unit(sources, "process.cpp", small_config(8, **NARROW), folder / "made")
    assert [loop.label for loop in unit.loops] == ["trips"]
    return check.check_unit(unit)


@compiled
def test_a_process_without_fault_passes(tmp_path):
    assert faults_of(tmp_path) == []


WRAP = "row = row == 63 ? 0 : row + 1;"
READ = "const Sum old = sums[i][lane].read(row);"


@compiled
@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        # a bank that is named by a value
        (READ, "const Sum old = sums[half][lane].read(row);", "of sums name a bank by a value"),
        (READ, "const Sum old = sums[i][(lane + value) & 3].read(row);", "name a bank by a value"),
        # more addresses than ports
        (READ, "const Sum old = sums[i][lane].read(row) + sums[i][lane].read(row ^ 1);",
         "3 addresses in a bank of sums"),
        # banks that the tool would put into one memory
        ("#pragma HLS ARRAY_PARTITION variable = sums complete dim = 2\n", "\n",
         "sums, an array of banks, is not partitioned whole"),
        # a chain of operators from a trip to the next
        (WRAP, "row = (row + value + 1) % 9;", "the budget at II = 1 is 4.80 ns"),
        (WRAP, "row = row * row * rows + 1;", "the budget at II = 1 is 4.80 ns"),
        (WRAP, "row = sums[0][0].read(row);", "the budget at II = 1 is 4.80 ns"),
        ("const int value = in.read();", "const int value = row > 9 ? in.read() : 0;"
         " if (value > left) row = in.read() + 1;", "the budget at II = 1 is 4.80 ns"),
        # a divider, though nothing waits for it
        ("out.write(total);", "out.write(total % 9);", "1 divisions in a pipelined loop"),
        # an access of a port that some trips leave out
        ("int(memory[left]);", "value > 7 ? int(memory[left]) : 0;",
         "load of memory under a condition"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_refused(old, new, told, tmp_path):
    found = faults_of(tmp_path, (old, new))
    assert any(told in fault for fault in found), found
    assert all(fault.startswith("process.cpp:12: process/trips: ") for fault in found)


@compiled
def test_an_array_that_values_index_has_ports_too(tmp_path):
    """A memory of the process that is no Ram, and the same one in registers."""
    begin = ("int row = 0, left", "int kept[8] = {0};\n  int row = 0, left")
    use = (
        "out.write(total);",
        "for (int i = 0; i < 3; ++i) total += kept[(value + i) & 7];\n"
        "    kept[row & 7] = value;\n    out.write(total);",
    )
    (fault,) = faults_of(tmp_path / "memory", begin, use)
    assert fault == (
        "process.cpp:13: process/trips: 4 addresses in a bank of kept a trip, it has 2 ports and "
        "II = 1"
    )
    partition = "#pragma HLS ARRAY_PARTITION variable = kept complete\n  int row = 0, left"
    registers = (begin[0], begin[1].replace("int row = 0, left", partition))
    assert faults_of(tmp_path / "registers", registers, use) == []


SUMS = """const Sum old = sums[i][lane].read(row);
        sums[i][lane].write(row, half == i ? Sum(old + value) : Sum(0));"""


@compiled
def test_accesses_of_which_a_trip_makes_one_share_a_port(tmp_path):
    """Two reads or two writes of a bank; both in one trip are refused."""
    both = """Sum old = 0;
        if (half) old = sums[i][lane].read(row) + sums[i][lane].read(row ^ 1);
        %sif (value > 3) {
          sums[i][lane].write(total & 63, Sum(value));
          if (value > 9) sums[i][lane].write(value & 63, Sum(0));
        }"""
    assert faults_of(tmp_path / "one", (SUMS, both % "else ")) == []
    (fault,) = faults_of(tmp_path / "both", (SUMS, both % ""))
    assert "4 addresses in a bank of sums" in fault


@compiled
def test_members_of_a_word_take_a_port_together(tmp_path):
    """A bank of pairs: the members at one address are read at once, those of two are not."""
    pairs = (
        "static Ram<Sum, 64, 4> sums[2][4];",
        "struct Pair { Sum code[2]; };\nstatic Ram<Pair, 64, 4> sums[2][4];",
    )
    uses = """Pair pair = sums[i][lane].read(row);
        const Sum old = pair.code[0] + %s.code[1];
        pair.code[0] = half == i ? Sum(old + value) : Sum(0);
        sums[i][lane].write(row, pair);"""
    assert faults_of(tmp_path / "word", pairs, (SUMS, uses % "pair")) == []
    other = "sums[i][lane].read(row ^ 1)"
    (fault,) = faults_of(tmp_path / "words", pairs, (SUMS, uses % other))
    assert "3 addresses in a bank of sums" in fault


@compiled
def test_a_larger_interval_has_a_larger_budget(tmp_path):
    """Three reads of a bank, and a chain of 5 to 9 ns, fit into two cycles."""
    slow = (WRAP, "row = ((row + value) * 3 + left) & 63;\n    if (row > rows) row -= value;")
    faults = faults_of(tmp_path / "1", slow)
    assert len(faults) == 1
    delay = float(re.search(r"([\d.]+) ns from a trip", faults[0])[1])
    assert delays.BUDGET < delay < 2 * delays.BUDGET
    two = ("PIPELINE II = 1", "PIPELINE II = 2")
    third = (READ, "const Sum old = sums[i][lane].read(row) + sums[i][lane].read(row ^ 1);")
    assert faults_of(tmp_path / "2", slow, two, third) == []


@parsed
def test_a_wide_stream_is_refused(tmp_path):
    shutil.copytree(HLS, tmp_path / "src", ignore=shutil.ignore_patterns("rtl", "build"))
    header = tmp_path / "src/design.h"
    text = header.read_text("utf-8")
    assert text.count("struct SumWord {\n") == 1
    wider = "struct SumWord {\n  UInt<3> odd[1400];\n"
    header.write_text(text.replace("struct SumWord {\n", wider), "utf-8")
    before = widths.stream_widths(HLS, preset("8-sparse"), tmp_path / "a")
    found = widths.stream_widths(tmp_path / "src", preset("8-sparse"), tmp_path / "b")
    assert found["sum_words"] == before["sum_words"] + 3 * 1400
    assert any("sum_words" in fault for fault in widths.check_widths(found, "8-sparse"))


def test_requests_elsewhere_are_refused(tmp_path):
    (tmp_path / "port.h").write_text("typedef hls::burst_maxi<int> Port;\n")
    (tmp_path / "memory.cpp").write_text("void f() { port.read_request(0, 1); }\n")
    assert ports.check_requests(tmp_path) == []
    (tmp_path / "post.cpp").write_text("hls::burst_maxi<int> port;\nport.write_request(0, 1);\n")
    assert ports.check_requests(tmp_path) == [
        "post.cpp:1: burst_maxi; use the class MemoryPort of port.h",
        "post.cpp:2: write_request outside of memory.cpp, plan.cpp, port.h",
    ]


# ---- bad input -------------------------------------------------------------------------------


@compiled
def test_a_source_that_does_not_compile_is_named(tmp_path):
    (tmp_path / "odd.cpp").write_text("void f() { no_such_name(); }\n")
    with pytest.raises(CheckError, match=r"odd\.cpp: clang-14 refuses it: .*no_such_name"):
        compile_unit(tmp_path, "odd.cpp", small_config(8), tmp_path / "made")


def test_a_machine_without_the_compiler_says_so(tmp_path, monkeypatch):
    (tmp_path / "odd.cpp").write_text("\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None
    with pytest.raises(CheckError, match="no clang-14 on PATH; on Debian: apt-get install"):
        compile_unit(tmp_path, "odd.cpp", small_config(8), tmp_path / "made")


@compiled
def test_the_command_prints_its_tables_and_what_it_refuses(tmp_path):
    sources = tmp_path / "src"
    sources.mkdir()
    for path in HLS.glob("*.h"):
        shutil.copy(path, sources)
    (sources / "process.cpp").write_text(PROCESS.replace(WRAP, "row = (row + 1) % 9 * left;"))
    (sources / "top.cpp").write_text('#include "design.h"\nkgrc::Stream<int> words("words");\n')
    command = [sys.executable, str(HLS / "checks/check.py"), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=HLS.parent)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^process\.cpp:12: process/trips +1 +[\d.]+ +4\.80$", done.stdout, re.M)
    assert re.search(r"^words +32$", done.stdout, re.M)
    assert "process.cpp:12: process/trips: 1 divisions" in done.stdout
    done = subprocess.run(
        [*command[:2], str(tmp_path / "none")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.strip()) == (
        1,
        f"{tmp_path / 'none'}: no C++ sources there; name the folder hls_src",
    )


def test_constants_and_names_are_read():
    assert banks.split('i64 0, [2 x { i8, "a,b" }] x, i32 3') == [
        *("i64 0", '[2 x { i8, "a,b" }] x', "i32 3"),
    ]
    assert banks.variable_of("@_ZN4kgrcL7sum_ramE") == "sum_ram"
    assert banks.variable_of("@_ZZN4kgrc10make_wordsERKNS_4TaskEE6offset") == "offset"
    assert banks.variable_of("%out.sroa.3") == "out"
