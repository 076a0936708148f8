"""The linter of the HLS sources: it finds nothing in them, and every planted fault."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pynq_kgrc.accelerator.config import PRESETS
from pynq_kgrc.backends.csim import SOURCES

pytest.importorskip("clang.cindex", reason="no libclang: pip install -c constraints.txt libclang")

HLS = Path(__file__).resolve().parents[1] / "hls_src"
LINT = HLS / "scripts/lint.py"


def load_script(path):
    """A script of hls_src as a module."""
    spec = importlib.util.spec_from_file_location(f"hls_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


lint = load_script(LINT)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    for tool in ("gcc", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: its headers are needed to parse hls_src")


@pytest.mark.parametrize("design", ["16-dense", "8-sparse", "4-sparse"])
def test_the_sources_have_no_fault(tmp_path, design):
    assert lint.lint(HLS, tmp_path / "design", design) == []


def test_the_lint_sees_the_loops_and_pragmas_there_are(tmp_path):
    parsed = lint.Sources(HLS, tmp_path, "8-sparse")
    names = {f.name for f in parsed.functions.values()}
    assert names >= {lint.TOP, "run_task", "multiply", "pack_output"}
    words = [pragma.directive for pragma in parsed.pragmas]
    text = "".join(path.read_text() for path in HLS.glob("*.[ch]*"))
    assert len(words) == text.count("#pragma HLS ")
    assert words.count("PIPELINE") >= 15
    labels = {loop.label for f in parsed.functions.values() for loop in f.loops}
    assert labels >= {"flattened", "code_words", "taps", "channels"}
    multiply = next(f for f in parsed.functions.values() if f.name == "multiply")
    reads = {f.name for f in lint.reached(parsed, [multiply]).values()}
    assert reads >= {"access_regions", "access_sums", "run", "read", "write"}


def planted(folder, changes):
    """A copy of the sources with (file, old text, new text) changed, each found exactly once."""
    shutil.copytree(HLS, folder, ignore=shutil.ignore_patterns("rtl", "build", "scripts"))
    for name, old, new in changes:
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        (folder / name).write_text(text.replace(old, new))
    return folder


STATEMENTS = {
    "int* p0 = new int[3];": "new",
    "int* p1 = 0; delete p1;": "delete",
    "void* p2 = std::malloc(3);": "heap: malloc",
    "std::free((void*)0);": "heap: free",
    "if (count < 0) throw 1;": "throw",
    "try { (void)count; } catch (...) {}": "try",
    "again: if (count < 0) goto again;": "goto",
    "std::vector<int> list;": "std: std::vector<int>",
    "const Beat* q = 0; const Beat** p3 = &q;": "pointer to a pointer: p3",
    "int places[count];": "array of variable length: places",
    "int (*f)(int, int) = smaller;": "pointer to a function: f",
    "struct Odd { virtual int g() { return 1; } };": "virtual",
}

STATEMENTS_GO_BEFORE = "  const int out[3] = {task[kOutD], task[kOutH], task[kOutW]};\n"
"""A line of list_shortcut in memory.cpp, behind `count`."""


def test_constructs_that_cannot_be_synthesized_are_found(tmp_path):
    """A fault is found at the line of each statement."""
    include = '#include <cstdlib>\n#include <vector>\n#include "design.h"'
    changes = [
        ("memory.cpp", '#include "design.h"', include),
        (
            "memory.cpp",
            STATEMENTS_GO_BEFORE,
            "\n".join(STATEMENTS) + "\n" + STATEMENTS_GO_BEFORE,
        ),
    ]
    sources = planted(tmp_path / "src", changes)
    first = (sources / "memory.cpp").read_text().splitlines().index(next(iter(STATEMENTS))) + 1
    wanted = [f"memory.cpp:{first + i}: {text}" for i, text in enumerate(STATEMENTS.values())]
    found = lint.lint(sources, tmp_path / "design")
    assert sorted(found) == sorted(wanted)


SLIPS = {
    "bounds": [
        (
            "pool.cpp",
            "      lanes:\n        for (int lane = 0; lane < kPortPositions; ++lane)\n",
            "      lanes:\n        for (int lane = 0; lane < width; ++lane)\n",
            "pool.cpp: unrolled, but its bounds are not constant",
        ),
        (
            # without a pragma, in a pipelined loop
            "decode.cpp",
            "for (int n = 0; n < kTn; ++n)\n            out.vector",
            "for (int n = 0; n < parts; ++n)\n            out.vector",
            "decode.cpp: unrolled, but its bounds are not constant",
        ),
        (
            # in a function that a pipelined loop calls
            "pool.cpp",
            "narrow:\n  for (int i = 0; i < kPortPositions * kTn; ++i) {\n#pragma HLS UNROLL",
            "narrow:\n  for (int i = 0; i < part; ++i) {",
            "pool.cpp: unrolled, but its bounds are not constant",
        ),
        (
            "dot.h",
            "const Int<27> weights = Int<27>(w[1][n]) * (1 << 18) + Int<27>(w[0][n]);",
            "Int<27> weights = 0; for (int i = 0; i < int(w[1][n]); ++i) weights += w[0][n];",
            "dot.h: unrolled, but its bounds are not constant",
        ),
    ],
    "calls": [
        ("top.cpp", "#pragma HLS DATAFLOW\n", "", "top.cpp: no DATAFLOW"),
        (
            "design.h",
            "inline int smaller(int a, int b) { return a < b ? a : b; }",
            "inline int smaller(int a, int b) { return a < b ? a : smaller(b, a); }",
            "design.h: recursion: smaller",
        ),
        (
            "dot.h",
            "struct DotDirect {\n  enum",
            "struct DotDirect {\n  static int deep(int a) { return a ? deep(a - 1) : 0; }\n  enum",
            "dot.h: recursion: deep",
        ),
    ],
    "directives": [
        (
            "compute.cpp",
            "#pragma HLS DEPENDENCE variable = sum_ram inter RAW distance = kMinFeatureRows true",
            "#pragma omp parallel",
            "compute.cpp: omp parallel: no such directive",
        ),
        (
            "compute.cpp",
            "#pragma HLS PIPELINE II = 1\n    KGRC_TRIP();\n    for",
            "#pragma HLS PIPE II = 1\n    KGRC_TRIP();\n    for",
            "compute.cpp: PIPE: no such directive",
        ),
        (
            "compute.cpp",
            "variable = region_ram complete dim = 1",
            "variables = region_ram complete dim = 1",
            "compute.cpp: ARRAY_PARTITION: no option variables",
        ),
        (
            "compute.cpp",
            "#pragma HLS ARRAY_PARTITION variable = sum_ram complete dim = 3\n",
            "#pragma HLS AGGREGATE variable = sum_ram\n",
            "compute.cpp: AGGREGATE: no such directive",
        ),
        (
            "pool.cpp",
            "ARRAY_PARTITION variable = kept complete dim = 1",
            "ARRAY_PARTITION variable = keep complete dim = 1",
            "pool.cpp: ARRAY_PARTITION: no variable keep",
        ),
        (
            "top.cpp",
            "variable = task.field complete",
            "variable = task.fields complete",
            "top.cpp: ARRAY_PARTITION: no variable task",
        ),
        (
            "plan.cpp",
            "  TileSpan span;\n  const UInt<kLengthBits> number[3]",
            "  TileSpan span;\n#pragma HLS UNROLL\n  const UInt<kLengthBits> number[3]",
            "plan.cpp: UNROLL: outside of a loop",
        ),
        (
            "ram.h",
            "namespace kgrc {\n\n#if",
            "#pragma HLS INLINE\nnamespace kgrc {\n\n#if",
            "ram.h: INLINE: outside of a function",
        ),
    ],
    "dependences": [
        (
            "compute.cpp",
            "region_ram inter RAW distance = kRegionDistance true",
            "region_ram inter RAW distance = 5 true",
            "compute.cpp: DEPENDENCE: region_ram keeps a RAW distance of 4",
        ),
        (
            "compute.cpp",
            "sum_ram inter RAW distance = kMinFeatureRows true",
            "sum_ram inter false",
            "compute.cpp: DEPENDENCE: sum_ram keeps a RAW distance of 4",
        ),
        (
            "compute.cpp",
            "variable = sum_ram intra RAW false",
            "variable = trips intra RAW false",
            "compute.cpp: DEPENDENCE: trips is no Ram",
        ),
    ],
    "pipelines": [
        (
            "pool.cpp",
            "  code_words:\n",
            "",
            "pool.cpp: PIPELINE: the loop has no label",
        ),
        (
            "post.cpp",
            "      // II = 1: a word does not depend on another\n",
            "      // a word does not depend on another\n",
            "post.cpp: PIPELINE: no comment says II = and why",
        ),
        (
            "post.cpp",
            "    // II = 1: a 64-bit word a trip; the filters",
            "    // II = 2: a 64-bit word a trip; the filters",
            "post.cpp: PIPELINE: no comment says II = and why",
        ),
    ],
    "interfaces": [
        (
            "top.cpp",
            "#pragma HLS INTERFACE s_axilite port = return\n",
            "",
            "top.cpp: kgrc_run: return has no s_axilite",
        ),
        (
            "top.cpp",
            "s_axilite port = digest",
            "s_axilite port = digests",
            "top.cpp: INTERFACE: no port digests",
            "top.cpp: kgrc_run: digest has no s_axilite",
        ),
        (
            "top.cpp",
            "#pragma HLS DATAFLOW\n",
            "#pragma HLS DATAFLOW\n#pragma HLS INTERFACE s_axilite port = items\n",
            "top.cpp: INTERFACE: not in kgrc_run",
        ),
        (
            "top.cpp",
            "bundle = maps_shortcut depth",
            "depth",
            "top.cpp: INTERFACE: shortcut lacks bundle",
        ),
        (
            "top.cpp",
            "bundle = maps_in1",
            "bundle = maps_in0",
            "top.cpp: INTERFACE: input1 shares the bundle maps_in0 with input0",
        ),
    ],
    "dataflow": [
        (
            "top.cpp",
            "  read_indices(task, indices, chunk_indices, report.index_words);\n",
            "",
            "top.cpp: DATAFLOW: chunk_indices joins ['make_words'], not two processes",
        ),
        (
            "top.cpp",
            "#pragma HLS STREAM variable = code_words depth = 64\n",
            "",
            "top.cpp: DATAFLOW: code_words has no depth",
        ),
    ],
}


@pytest.mark.parametrize("rule", SLIPS)
def test_planted_faults_are_found_and_nothing_else(tmp_path, rule):
    sources = planted(tmp_path / "src", [slip[:3] for slip in SLIPS[rule]])
    found = [re.sub(r":\d+:", ":", fault) for fault in lint.lint(sources, tmp_path / "design")]
    assert sorted(found) == sorted(fault for slip in SLIPS[rule] for fault in slip[3:])


def test_a_memory_port_without_m_axi_is_found(tmp_path):
    text = (HLS / "top.cpp").read_text()
    (pragma,) = re.findall(r"^#pragma HLS INTERFACE m_axi port = items .*\\\n.*\n", text, re.M)
    found = lint.lint(planted(tmp_path / "src", [("top.cpp", pragma, "")]), tmp_path / "design")
    assert [re.sub(r":\d+:", ":", fault) for fault in found] == [
        "top.cpp: kgrc_run: items has no m_axi"
    ]


def run_script(*arguments):
    command = [sys.executable, str(LINT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_linter_runs_by_hand(tmp_path):
    done = run_script(HLS, "--design", "4-dense")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    sources = planted(tmp_path / "src", [("top.cpp", "s_axilite port = items", "s_axilite")])
    text = (sources / "top.cpp").read_text().splitlines()
    pragma = text.index("#pragma HLS INTERFACE s_axilite") + 1
    kernel = next(i for i, line in enumerate(text, 1) if "void kgrc_run(" in line)
    done = run_script(sources)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"top.cpp:{pragma}: INTERFACE: no port None",
        f"top.cpp:{kernel}: kgrc_run: items has no s_axilite",
    ]
    done = run_script(tmp_path)
    assert done.returncode == 2
    assert "no top.cpp, plan.cpp, memory.cpp" in done.stderr
    done = run_script(HLS, "--design", "12-sparse")
    assert done.returncode == 1
    assert "no accelerator named '12-sparse'; there are 16-dense" in done.stderr


ALLOWED = {"memcpy", "memset", "memmove", "memcmp"}
"""gcc replaces loops and copies of structs by calls of these; the sources do not call them."""


def undefined_symbols(sources, folder, design):
    """The undefined symbols of the linked objects, compiled as for synthesis."""
    folder.mkdir(exist_ok=True)
    flags = lint.synthesis_flags(sources, folder, design)
    whole = folder / "whole.o"
    command = ["g++", *flags, "-O2", "-fno-pie", "-fno-stack-protector", "-Wno-unknown-pragmas"]
    command += ["-r", "-nostdlib", *(str(sources / name) for name in SOURCES), "-o", str(whole)]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run(
        ["nm", "-uC", str(whole)], check=True, capture_output=True, text=True, timeout=60
    )
    return {line.split()[-1] for line in done.stdout.splitlines() if line.strip()}


def test_the_objects_need_nothing_from_a_library(tmp_path):
    for design in ("16-dense", "8-sparse"):
        assert undefined_symbols(HLS, tmp_path / design, design) <= ALLOWED


@pytest.mark.parametrize(
    ("statement", "symbol"),
    [("if (count < 0) throw 1;", "__cxa_throw"), ("if (count < 0) std::abort();", "abort")],
)
def test_a_library_call_is_seen_in_the_objects(tmp_path, statement, symbol):
    include = '#include <cstdlib>\n#include "design.h"'
    changes = [
        ("memory.cpp", '#include "design.h"', include),
        ("memory.cpp", STATEMENTS_GO_BEFORE, f"  {statement}\n{STATEMENTS_GO_BEFORE}"),
    ]
    sources = planted(tmp_path / "src", changes)
    assert symbol in undefined_symbols(sources, tmp_path / "design", "8-sparse")


def test_every_design_has_a_header_that_parses(tmp_path):
    for design in PRESETS:
        (tmp_path / design).mkdir()
        flags = lint.synthesis_flags(HLS, tmp_path / design, design)
        command = ["g++", *flags, "-fsyntax-only", "-Wno-unknown-pragmas", str(HLS / "plan.cpp")]
        subprocess.run(command, check=True, timeout=120)
