"""The RTL twin: simulated by Verilator against the HLS sources, synthesized by yosys for DSPs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from networks import Net, compiled, small_config
from test_csim import every_kind

from pynq_kgrc.accelerator import header
from pynq_kgrc.accelerator.header import config_header, verilog_parameters
from pynq_kgrc.accelerator.tiling import MIN_FEATURE_ROWS, REGION_DISTANCE
from pynq_kgrc.backends.csim import source_folder
from pynq_kgrc.backends.image import build_image
from pynq_kgrc.program import ConvTask
from pynq_kgrc.quant import ACCUMULATOR_BITS

RTL = source_folder() / "rtl"
MODULES = ("mac_array", "sum_bank", "region_bank", "dot", "cascade", "delay")
PROCESSES = ("schedule", "compute", "plan", "memory", "decode")
"""HLS sources that the array and its streams need."""
PRODUCTS = {16: 1, 8: 2, 4: 4}
"""Products a DSP48E2."""


def needs(*tools):
    """A mark that skips where one of the tools is not on PATH."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"no {', '.join(missing)} here: `make rtl-tools`; RTL not tested"
    )


simulated = needs("verilator", "make", "g++")
synthesized = needs("yosys")


def run_tool(command, seconds):
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


# ---- the language ---------------------------------------------------------------------------


@simulated
@pytest.mark.parametrize("sparse", [0, 1])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_is_plain_verilog_without_a_warning(bits, sparse):
    """Verilog 2001; widths are converted by the rules of the language."""
    command = ["verilator", "--lint-only", "--default-language", "1364-2001", "-Wall", "-Wno-WIDTH"]
    command += ["-y", str(RTL), "--top-module", "mac_array", f"-GBITS={bits}", f"-GSPARSE={sparse}"]
    command += [f"-GSUM={ACCUMULATOR_BITS[bits]}", f"-GMIN_ROWS={MIN_FEATURE_ROWS}"]
    command += [f"-GREGION_DISTANCE={REGION_DISTANCE}"]
    run_tool([*command, str(RTL / "mac_array.v")], 60)


# ---- simulation -----------------------------------------------------------------------------


def verilate(folder, top, sources, flags=(), rtl=RTL):
    """The program that Verilator makes of module `top` and a bench in C++."""
    command = [
        "verilator",
        "--cc",
        "--exe",
        "--build",
        "-j",
        "2",
        "-O3",
        "-Wno-fatal",
        "-Wno-WIDTH",
    ]
    command += ["--default-language", "1364-2001", "--Mdir", str(folder / "made"), "-y", str(rtl)]
    # the model runs for a second only: a fast build saves more than a fast model
    command += ["-MAKEFLAGS", "OPT_FAST=-O1 OPT_SLOW=-O0 OPT_GLOBAL=-O1"]
    include = " ".join(f"-I{path}" for path in (folder, RTL, source_folder()))
    command += ["-CFLAGS", f"-std=c++17 -DKGRC_PLAIN -Wno-unknown-pragmas {include}"]
    run_tool([*command, "--top-module", top, *flags, *map(str, sources)], 600)
    return folder / "made" / f"V{top}"


DOTS = [(16, 8, 1), *((bits, tn, 1) for bits in (8, 4) for tn in (4, 8, 12))]
DOTS += [(8, 8, 0), (4, 8, 0)]


def dots_module():
    """A module that holds a dot of each kind, with the names that dot_bench.cpp expects."""
    ports, lines = ["clk", "step"], ["  input clk, step;"]
    for bits, tn, packed in DOTS:
        name = f"{bits}_{tn}_{packed}"
        weights, features = (1, 1) if bits == 16 else (2, 2 if bits == 4 else 1)
        kinds = ("valid_in", "w", "x", "valid_out", "out")
        ports += [f"{kind}_{name}" for kind in kinds]
        lines += [
            f"  input valid_in_{name};",
            f"  input [{weights * tn * bits - 1}:0] w_{name};",
            f"  input [{features * tn * bits - 1}:0] x_{name};",
            f"  output valid_out_{name};",
            f"  output [{weights * features * (2 * bits + 8) - 1}:0] out_{name};",
            f"  dot #(.BITS({bits}), .TN({tn}), .PACKED({packed})) dot_{name} (",
            "    .clk(clk), .step(step), .tag_in(1'b0), .tag_out(),",
            "    " + ", ".join(f".{kind}({kind}_{name})" for kind in kinds) + ");",
        ]
    return "\n".join([f"module dots({', '.join(ports)});", *lines, "endmodule\n"])


def simulate_dots(folder, rtl=RTL):
    (folder / "dots.v").write_text(dots_module())
    variants = " ".join(f"X({bits}, {tn}, {packed})" for bits, tn, packed in DOTS)
    (folder / "variants.h").write_text(f"#define VARIANTS(X) {variants}\n")
    program = verilate(folder, "dots", [folder / "dots.v", RTL / "dot_bench.cpp"], rtl=rtl)
    return subprocess.run([str(program), "1", "20000"], capture_output=True, text=True, timeout=120)


@simulated
def test_dot_is_the_dot_of_the_hls_header(tmp_path):
    done = simulate_dots(tmp_path)
    assert done.returncode == 0, done.stdout


class Bench:
    """The array of a program's design in Verilog and in C++, and the memory of the program."""

    def __init__(self, folder, program, rtl=RTL, **changed):
        config, image = program.config, build_image(program)
        self.program, self.folder = program, folder
        (folder / "config.h").write_text(config_header(config))
        image.weights.tofile(folder / "weights")
        image.tables.tofile(folder / "tables")
        # every byte is a valid code
        maps = np.random.default_rng(0).integers(0, 256, program.arena_bytes + 4096, np.uint8)
        maps[: maps.size // 64 * 64].tofile(folder / "maps")
        values = verilog_parameters(config) | changed
        sources = [rtl / "mac_array.v", RTL / "array_bench.cpp"]
        sources += [source_folder() / f"{name}.cpp" for name in PROCESSES]
        flags = [f"-G{name}={value}" for name, value in values.items()]
        self.built = verilate(folder, "mac_array", sources, flags, rtl)

    def run(self, seed=1, stall=0, extreme=False):
        """The exit status and the lines (task, trips, trips in C++, clocks, words of sums)."""
        files = [str(self.folder / name) for name in ("maps", "weights", "tables")]
        counts = [len(self.program.tasks), seed, stall, int(extreme)]
        done = subprocess.run(
            [str(self.built), *files, *map(str, counts)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout.splitlines()


def assert_twins(bench):
    """The same sums in the same trips, also when streams stall at random."""
    config = bench.program.config
    latency = min(config.tn, 8) + 11
    convolutions = [i for i, task in enumerate(bench.program.tasks) if isinstance(task, ConvTask)]
    for seed, stall, extreme in ((1, 0, False), (2, 0, True), (3, 2, True), (4, 6, False)):
        status, lines = bench.run(seed, stall, extreme)
        assert status == 0, lines
        rows = [tuple(map(int, line.split())) for line in lines]
        assert [row[0] for row in rows] == convolutions
        for number, trips, trips_in_c, clocks, words in rows:
            assert words > 0, number
            assert trips == trips_in_c, number
            if stall == 0:
                assert clocks == trips + latency, number
            else:  # a stream that is late need not be waited for
                assert clocks >= trips + latency, number
        if stall:
            assert sum(row[3] for row in rows) > sum(row[1] + latency for row in rows)


def small_program():
    """A small design, and tasks that access its banks as often as they allow."""
    net = Net(size=(2, 5, 9))
    stem = net.conv("clip", 9, 3, (1, 2, 2), kept=0.5)
    far = net.conv(stem, 17, (1, 3, 4), (1, 1, 3), (0, 1, 1))
    nothing = net.conv(far, 40, 1, 1, 0, kept=0.0)
    codes = net.dense(net.conv(nothing, 4, 3, kept=1 / 9), 4)
    # blocks of four trips, whose sums are handed on in four: the shortest there are
    net.conv(codes, 70, 1, 1, 0)
    config = small_config(8, tm=16, pm=16, pk=2, pf=3, filter_tiles=1)
    return compiled(net, config)[0]


VERILATED = """#pragma once
#include <cstddef>
template <std::size_t kWords>
struct VlWide {
  unsigned word[kWords];
  unsigned& operator[](std::size_t i) { return word[i]; }
  const unsigned& operator[](std::size_t i) const { return word[i]; }
};
"""
ARRAY_PORTS = """#include <verilated.h>
struct Vmac_array {
  unsigned clk, rst, start, busy, words_of_item, item_count, region_count, trips;
  unsigned tile_valid, tile_ready, item_valid, item_ready, region_valid, region_ready;
  unsigned word_valid, word_ready, sums_valid, sums_ready;
  VlWide<64> tile, item, region, word, sums;
  void eval();
};
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the bench is not compiled")
def test_the_bench_calls_the_hls_sources_as_they_are(tmp_path):
    """Without Verilator, so that it is seen at once when a process gets other streams."""
    (tmp_path / "config.h").write_text(config_header(small_config(8)))
    (tmp_path / "verilated.h").write_text(VERILATED)
    (tmp_path / "Vmac_array.h").write_text(ARRAY_PORTS)
    command = ["g++", "-std=c++17", "-fsyntax-only", "-DKGRC_PLAIN", "-Wno-unknown-pragmas"]
    command += [f"-I{path}" for path in (tmp_path, RTL, source_folder())]
    run_tool([*command, str(RTL / "array_bench.cpp")], 120)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_array_is_the_array_of_the_hls_source(bits, sparse, tmp_path):
    program = compiled(every_kind(), small_config(bits, sparse))[0]
    assert_twins(Bench(tmp_path, program))


@simulated
@pytest.mark.slow
def test_more_groups_lanes_and_shortest_blocks(tmp_path):
    assert_twins(Bench(tmp_path, small_program()))


def changed_rtl(folder, name, old, new):
    """The Verilog with some text changed."""
    shutil.copytree(RTL, folder)
    text = (folder / name).read_text()
    assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
    (folder / name).write_text(text.replace(old, new))
    return folder


@simulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        # a sum that is asked for while it is being cleared
        ("mac_array.v", ": MIN_ROWS + 1 - rows_drained", ": 0", "sum"),
        # a region bank with one port to write: strides put two positions of a beat into one
        ("mac_array.v", "            b = a;\n", "            b = 1'b0;\n", "sum"),
        # stalls: a word taken although the trip had to wait for another stream
        ("mac_array.v", "assign word_ready = go && take_word", "assign word_ready = take_word", ""),
    ],
)
def test_a_fault_in_the_array_is_seen(tmp_path, name, old, new, told):
    rtl = changed_rtl(tmp_path / "rtl", name, old, new)
    bench = Bench(tmp_path, small_program(), rtl)
    status, lines = bench.run(stall=3, extreme=True)
    assert status == 1
    assert told in lines[-1]


@simulated
@pytest.mark.slow
def test_three_trips_between_two_accesses_to_a_sum_are_too_few(tmp_path):
    """The sum would be read before it is written."""
    bench = Bench(tmp_path, small_program(), MIN_ROWS=MIN_FEATURE_ROWS - 1)
    status, lines = bench.run(stall=3, extreme=True)
    assert status == 1
    assert "sum" in lines[-1]


@simulated
@pytest.mark.slow
def test_a_region_that_is_read_too_soon_costs_other_trips(tmp_path):
    """The memories of the twin would bear it: a region is written in the stage that reads it."""
    with pytest.raises(AssertionError):
        assert_twins(Bench(tmp_path, small_program(), REGION_DISTANCE=REGION_DISTANCE - 1))


def test_verilog_and_c_get_the_same_constants(monkeypatch):
    """The Verilog has no usable value of its own: its defaults are 0."""
    monkeypatch.setattr(header, "MIN_FEATURE_ROWS", 7)
    monkeypatch.setattr(header, "REGION_DISTANCE", 6)
    monkeypatch.setitem(ACCUMULATOR_BITS, 8, 40)
    config = small_config(8)
    values = verilog_parameters(config)
    assert (values["MIN_ROWS"], values["REGION_DISTANCE"], values["SUM"]) == (7, 6, 40)
    assert "kMinFeatureRows = 7," in config_header(config)
    assert "kRegionDistance = 6," in config_header(config)
    assert "kSumBits = 40," in config_header(config)
    text = (RTL / "mac_array.v").read_text("utf-8")
    assert re.findall(r"\b(?:SUM|MIN_ROWS|REGION_DISTANCE) = (\w+)", text) == ["0"] * 3


# ---- synthesis ------------------------------------------------------------------------------

# What synth_xilinx does itself, but with a DSP for a product of any width.
EACH_IN_A_DSP = """
synth_xilinx -family xcup -noiopad -top {top} -run begin:map_dsp
techmap -map +/mul2dsp.v -map +/xilinx/xcu_dsp_map.v -D DSP_A_MAXWIDTH=27 -D DSP_B_MAXWIDTH=18 \
-D DSP_A_MINWIDTH=2 -D DSP_B_MINWIDTH=2 -D DSP_Y_MINWIDTH=2 -D DSP_NAME=$__MUL27X18
select a:mul2dsp
setattr -unset mul2dsp
select -clear
chtype -set $mul t:$__soft_mul
synth_xilinx -family xcup -noiopad -top {top} -run coarse:
"""


def synthesize(folder, top, values, each=False):
    """Cells by type, of the whole hierarchy."""
    if top == "mac_array":
        values = values | {"SUM": ACCUMULATOR_BITS[values["BITS"]], "MIN_ROWS": MIN_FEATURE_ROWS}
        values["REGION_DISTANCE"] = REGION_DISTANCE
    report = folder / "report"
    sources = " ".join(str(RTL / f"{name}.v") for name in MODULES)
    sets = " ".join(f"-set {name} {value}" for name, value in values.items())
    plain = "synth_xilinx -family xcup -noiopad -top {top}\n"
    script = f"read_verilog -defer {sources}\nchparam {sets} {top}\n"
    script += (EACH_IN_A_DSP if each else plain).format(top=top)
    (folder / "script.ys").write_text(f"{script}tee -q -o {report} stat -top {top}\n")
    run_tool(["yosys", "-q", "-s", str(folder / "script.ys")], 3500)
    whole = report.read_text().split("Number of cells:")[-1]
    return {name: int(count) for name, count in re.findall(r"^\s+(\w+)\s+(\d+)$", whole, re.M)}


COUNTED = ("DSP48E2", "RAMB18E2", "RAMB36E2")


def table():
    """The rows of hls_src/rtl/README.md: (module, parameters, whether forced), products, counts."""
    rows = []
    for line in (RTL / "README.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = re.fullmatch(r"`(dot|mac_array)((?: \w+=\d+)+)`(, each in a DSP)?", cells[0])
        if found:
            values = {k: int(v) for k, v in (pair.split("=") for pair in found[2].split())}
            counts = tuple(int(cell) for cell in cells[1:])
            rows.append((found[1], values, bool(found[3]), counts[0], counts[1:]))
    return rows


def rows_for_test():
    for top, values, each, _, counts in table():
        name = "-".join([top, *(f"{k}{v}" for k, v in values.items()), *["each"] * each])
        quick = top == "dot" and values["BITS"] < 16 and values["PACKED"]
        marks = [] if quick else [pytest.mark.slow, pytest.mark.timeout(3600)]
        yield pytest.param(top, values, each, counts, id=name, marks=marks)


@synthesized
@pytest.mark.parametrize(("top", "values", "each", "counts"), list(rows_for_test()))
def test_the_readme_has_the_counts_that_yosys_finds(top, values, each, counts, tmp_path):
    cells = synthesize(tmp_path, top, values, each)
    assert tuple(cells.get(name, 0) for name in COUNTED) == counts


def products_of(top, values):
    """Products per step."""
    if top == "dot":
        return PRODUCTS[values["BITS"]] * values["TN"]
    return values["PM"] * values["PK"] * values["PF"] * values["TN"]


def test_two_and_four_products_a_dsp():
    """The table's counts are those of packing; the test above compares them with yosys's."""
    rows = table()
    assert {(row[0], row[1]["BITS"]) for row in rows} >= {("dot", 16), ("dot", 8), ("dot", 4)}
    for top, values, each, products, (dsps, *_) in rows:
        assert products == products_of(top, values)
        if values.get("PACKED", 1):
            assert dsps == products // PRODUCTS[values["BITS"]]
        elif each or values["BITS"] == 8:
            assert dsps == products


def test_tools_can_be_had():
    """The make target that the reason of a skip names exists."""
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text("utf-8")
    assert re.search(r"^rtl-tools:", makefile, re.M)
    assert re.search(r"^test-all:.*rtl-tools", makefile, re.M)


def test_a_machine_without_the_tools_skips(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    mark = needs("verilator", "yosys")
    assert mark.args == (True,)
    assert "make rtl-tools" in mark.kwargs["reason"]
