"""Lanes of the processes in Verilog: simulated against numpy, synthesized for the model's LUTs."""

import re

import numpy as np
import pytest
from test_rtl import RTL, needs, run_tool

from pynq_kgrc.accelerator import resources
from pynq_kgrc.quant import ACCUMULATOR_BITS, rshift

simulated = needs("verilator", "make", "g++")
synthesized = needs("yosys")

BENCH = """#include <cstdint>
#include <cstdio>
#include "V{top}.h"
#include "verilated.h"
double sc_time_stamp() {{ return 0; }}
int main(int, char** files) {{
  V{top} top;
  FILE* in = std::fopen(files[1], "rb");
  FILE* out = std::fopen(files[2], "wb");
  uint64_t given[{inputs}];
  while (std::fread(given, 8, {inputs}, in) == {inputs}) {{
    {set}
    top.clk = 0;
    top.eval();
    top.clk = 1;
    top.eval();
    const uint64_t made[] = {{ {get} }};
    std::fwrite(made, 8, {outputs}, out);
  }}
  std::fclose(out);
}}
"""


def simulate(folder, top, values, inputs, outputs, latency, rtl=RTL):
    """The outputs of a module by name, for inputs {name: (width, numbers)}, one of each a clock.

    `outputs` are {name: width}; a negative width is that of a signed number.
    """
    (folder / "bench.cpp").write_text(
        BENCH.format(
            top=top,
            inputs=len(inputs),
            outputs=len(outputs),
            set="\n    ".join(f"top.{name} = given[{i}];" for i, name in enumerate(inputs)),
            get=", ".join(f"uint64_t(top.{name})" for name in outputs),
        )
    )
    columns = []
    for width, numbers in inputs.values():
        mask = np.uint64((1 << width) - 1)
        columns.append(np.asarray(numbers).astype(np.int64).astype(np.uint64) & mask)
    given = np.stack(columns, 1)
    given = np.concatenate([given, np.repeat(given[-1:], latency, 0)])
    given.tofile(folder / "in")
    command = ["verilator", "--cc", "--exe", "--build", "-j", "2", "-Wno-fatal", "-Wno-WIDTH"]
    command += ["--default-language", "1364-2001", "--Mdir", str(folder / "made"), "-y", str(rtl)]
    command += ["-MAKEFLAGS", "OPT_FAST=-O1 OPT_SLOW=-O0 OPT_GLOBAL=-O0", "--top-module", top]
    command += [f"-G{name}={value}" for name, value in values.items()]
    run_tool([*command, str(rtl / f"{top}.v"), str(folder / "bench.cpp")], 300)
    program = str(folder / "made" / f"V{top}")
    run_tool([program, str(folder / "in"), str(folder / "out")], 60)
    made = np.fromfile(folder / "out", np.uint64).reshape(-1, len(outputs))[latency - 1 : -1]
    found = {}
    for i, (name, width) in enumerate(outputs.items()):
        bits = abs(width)
        numbers = (made[:, i] & np.uint64((1 << bits) - 1)).astype(np.int64)
        found[name] = numbers - ((numbers >> (bits - 1)) << bits) if width < 0 else numbers
    return found


def signed(rng, bits, count):
    """Random signed numbers; every eighth is at an end of the range."""
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    numbers = rng.integers(least, most, count, endpoint=True)
    numbers[::8] = rng.choice([least, most], len(numbers[::8]))
    return numbers


def scale_by_numpy(given):
    """docs/equations.md, with integers of Python: no width to overflow."""
    found = []
    for v in zip(*given.values(), strict=True):
        one = dict(zip(given, map(int, v), strict=True))
        half = (1 << one["shift"]) >> 1
        total = ((one["sum"] + one["bias"]) * one["mult"] + half) >> one["shift"]
        if one["add"]:
            half = (1 << one["code_shift"]) >> 1
            moved = one["code"] - one["code_zero"]
            total += (moved * one["code_mult"] + half) >> one["code_shift"]
        found.append(min(max(total + one["zero"], one["low"]), one["high"]))
    return np.array(found)


@simulated
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_lane_of_scale_is_the_equation(bits, tmp_path):
    rng, count, sums = np.random.default_rng(bits), 2000, ACCUMULATOR_BITS[bits]
    shift, code_shift = rng.integers(0, 63, (2, count))
    shift[:100] = code_shift[50:150] = 0
    low, high = np.sort(signed(rng, 16, 2 * count).reshape(2, count), 0)
    # sums and shifts that go together, so that most results lie within the clamp
    sum_ = signed(rng, sums, count) >> np.maximum(0, sums - shift).clip(0, sums - 1)
    given = {
        "sum": sum_, "bias": signed(rng, sums, count), "mult": rng.integers(0, 1 << 15, count),
        "shift": shift, "add": rng.integers(0, 2, count), "code": signed(rng, bits, count),
        "code_zero": signed(rng, bits, count), "code_mult": rng.integers(0, 1 << 15, count),
        "code_shift": code_shift, "zero": signed(rng, 16, count), "low": low, "high": high,
    }  # fmt: skip
    given["bias"][count // 2 :] >>= sums // 2
    widths = [sums, sums, 15, 6, 1, bits, bits, 15, 6, 16, 16, 16]
    # each for four clocks: the scales stand still while a sum passes
    inputs = {name: (w, given[name].repeat(4)) for name, w in zip(given, widths, strict=True)}
    values = {"SUM": sums, "CODE": bits}
    found = simulate(tmp_path, "scale_lane", values, inputs, {"out": -16}, 4)["out"][::4]
    wanted = scale_by_numpy(given)
    np.testing.assert_array_equal(found, wanted)
    within = (wanted > low) & (wanted < high)
    assert within.mean() > 0.1
    # the same rounding as the emulation's
    one = rshift(given["sum"][:50] + 0, given["shift"][:50])
    assert one.tolist() == [
        (int(v) + ((1 << int(s)) >> 1)) >> int(s)
        for v, s in zip(given["sum"][:50], given["shift"][:50], strict=True)
    ]


@simulated
@pytest.mark.parametrize("pf", [8, 9])
def test_a_lane_of_place_is_a_sum_of_places(pf, tmp_path):
    rng, count, bank = np.random.default_rng(pf), 4000, (pf - 1).bit_length()
    banks, rows = rng.integers(0, pf, (2, count)), rng.integers(0, 512, (2, count))
    given = {
        "line_bank": (bank, banks[0]), "lane_bank": (bank, banks[1]),
        "line_row": (10, rows[0]), "lane_row": (10, rows[1]),
        "along": (11, rng.integers(-20, 60, count)), "width": (10, rng.integers(1, 50, count)),
        "kept": (1, rng.integers(0, 2, count)), "inside": (1, rng.integers(0, 2, count)),
        "position": (11, rng.integers(-20, 60, count)),
        "map_width": (10, rng.integers(1, 50, count)),
        "beat": (32, rng.integers(0, 1 << 32, count)),
        "fill": (32, rng.integers(0, 1 << 32, count)),
    }  # fmt: skip
    values = {"PF": pf, "BANK": bank, "VECTOR": 32}
    outputs = {"valid": 1, "bank": bank, "row": 10, "codes": 32}
    found = simulate(tmp_path, "place_lane", values, given, outputs, 2)
    at = {name: numbers for name, (_, numbers) in given.items()}
    address = (rows * pf + banks).sum(0)
    np.testing.assert_array_equal(found["bank"], address % pf)
    np.testing.assert_array_equal(found["row"], address // pf)
    valid = at["kept"] & (at["along"] >= 0) & (at["along"] < at["width"])
    np.testing.assert_array_equal(found["valid"], valid)
    known = (at["inside"] == 1) & (at["position"] >= 0) & (at["position"] < at["map_width"])
    np.testing.assert_array_equal(found["codes"], np.where(known, at["beat"], at["fill"]))
    assert 0.1 < known.mean() < 0.9


def pool_by_python(given):
    kept = np.zeros(512, np.int64)
    found = []
    for mine, starts, row, code in zip(*given, strict=True):
        if mine:
            kept[row] = code if starts else max(kept[row], code)
        found.append(kept[row])
    return np.array(found)


def pool_inputs(rows):
    rng, count = np.random.default_rng(rows), 6000
    mine, row = rng.integers(0, 4, count) > 0, rng.integers(0, rows, count)
    # every row begins before it is read
    mine[:rows], row[:rows] = True, np.arange(rows)
    starts = rng.integers(0, 4, count) == 0
    starts[:rows] = True
    return mine, starts, row, signed(rng, 16, count)


def simulate_pool(folder, rows, rtl=RTL):
    given = pool_inputs(rows)
    inputs = dict(zip(("mine", "starts", "row", "code"), zip((1, 1, 9, 16), given, strict=True),
                      strict=True))  # fmt: skip
    found = simulate(folder, "pool_lane", {}, inputs, {"largest": -16}, 2, rtl)
    mine = given[0]
    return found["largest"][mine], pool_by_python(given)[mine]


@simulated
@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_a_lane_of_a_pool_has_no_hazard(rows, tmp_path):
    """Rows that come again in the next trips: the memory has not been written yet."""
    found, wanted = simulate_pool(tmp_path, rows)
    np.testing.assert_array_equal(found, wanted)


@simulated
@pytest.mark.parametrize("register", ["mine2 && row2 == row1 ? largest :", "mine3 && row3 == row1"])
def test_a_pool_without_a_bypass_is_seen(register, tmp_path):
    """The hazard of the pools of earlier sources: stale maxima."""
    text = (RTL / "pool_lane.v").read_text("utf-8")
    assert text.count(register) == 1
    rtl = tmp_path / "rtl"
    rtl.mkdir()
    gone = "" if register.endswith(":") else "1'b0"
    (rtl / "pool_lane.v").write_text(text.replace(register, gone))
    found, wanted = simulate_pool(tmp_path, 3, rtl)
    assert (found != wanted).mean() > 0.01


@simulated
@pytest.mark.parametrize("pf", [4, 9])
def test_lanes_of_a_region_turn_to_banks_and_back(pf, tmp_path):
    rng, count, bank, row, vector = np.random.default_rng(pf), 2000, 4, 5, 4
    shift, back, tap = rng.integers(0, pf, count), rng.integers(0, pf, count), 3
    lanes = rng.integers(0, 12, (count, pf))
    halves = rng.integers(0, 1 << vector, (2, count, pf))
    half = rng.integers(0, 2, count)

    def joined(numbers, bits):
        return sum(numbers[:, i] << (i * bits) for i in range(pf))

    given = {
        "shift": (bank, shift), "shift_back": (bank, back),
        "tap_row": (row, np.full(count, tap)), "lane_rows": (pf * row, joined(lanes, row)),
        "first_half": (pf * vector, joined(halves[0], vector)),
        "second_half": (pf * vector, joined(halves[1], vector)), "half": (1, half),
    }  # fmt: skip
    values = {"PF": pf, "BANK": bank, "ROW": row, "VECTOR": vector}
    outputs = {"bank_rows": pf * row, "inputs": pf * vector}
    found = simulate(tmp_path, "region_lanes", values, given, outputs, 2)
    # a shift goes with what entered a clock before it
    for t in range(count - 1):
        rows = [0] * pf
        for lane in range(pf):
            at = lane + int(shift[t + 1])
            rows[at % pf] = int(lanes[t, lane]) + tap + at // pf
        read = halves[half[t], t]
        turned = [int(read[(lane + back[t + 1]) % pf]) for lane in range(pf)]
        assert found["bank_rows"][t] == sum(v << (i * row) for i, v in enumerate(rows)), t
        assert found["inputs"][t] == sum(v << (i * vector) for i, v in enumerate(turned)), t


@simulated
def test_fields_of_cascades_are_their_products(tmp_path):
    rng, count = np.random.default_rng(0), 4000
    low, high = signed(rng, 18, count), signed(rng, 17, count)
    given = {"cascades": (36, (high << 18) + low)}
    found = simulate(tmp_path, "dot_total", {"COLUMNS": 1}, given, {"low": -26, "high": -26}, 1)
    np.testing.assert_array_equal(found["low"], low)
    np.testing.assert_array_equal(found["high"], high)


# ---- synthesis -------------------------------------------------------------------------------

LUTS = re.compile(r"LUT\d|SRL|RAM\d+[MX]")

MODELLED = {
    "scale_lane": lambda v: resources.scale_lane_luts(v["SUM"], v["CODE"]),
    "place_lane": lambda v: resources.place_lane_luts(v["PF"], v["VECTOR"]),
    "pool_lane": lambda v: resources.pool_lane_luts(v["ROW"]),
    "region_lanes": lambda v: resources.region_lanes_luts(v["PF"], v["VECTOR"]),
    "region_load": lambda v: resources.region_load_luts(v["POSITIONS"], v["VECTOR"]),
    "sum_lane": lambda v: resources.sum_lane_luts(v["SUM"], v["TOTAL"], v["ROWS"]),
    "dot_total": lambda v: resources.dot_total_luts(8, v["COLUMNS"]),
}
"""By module: the LUTs that accelerator/resources.py counts for a lane."""


def table():
    """Rows of hls_src/rtl/README.md: (module, parameters, LUTs, DSPs, modelled LUTs)."""
    for line in (RTL / "README.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = re.fullmatch(r"`(\w+)((?: \w+=\d+)+)`", cells[0])
        if found and found[1] in MODELLED:
            values = {k: int(v) for k, v in (pair.split("=") for pair in found[2].split())}
            yield (found[1], values, *map(int, cells[1:]))


ROWS = list(table())


def synthesize_lane(folder, top, values):
    """(LUTs, DSP48E2s) as yosys maps a module without the wide multiplexers of a slice."""
    report = folder / "report"
    sets = " ".join(f"-set {name} {value}" for name, value in values.items())
    (folder / "script.ys").write_text(
        f"read_verilog -defer {RTL / top}.v\nchparam {sets} {top}\n"
        f"synth_xilinx -family xcup -noiopad -nowidelut -flatten -top {top}\n"
        f"tee -q -o {report} stat -top {top}\n"
    )
    run_tool(["yosys", "-q", "-s", str(folder / "script.ys")], 600)
    cells = {k: int(v) for k, v in re.findall(r"^\s+(\w+)\s+(\d+)$", report.read_text(), re.M)}
    luts = sum(count for name, count in cells.items() if LUTS.match(name))
    return luts, cells.get("DSP48E2", 0)


def name_of(row):
    return "-".join([row[0], *(f"{k}{v}" for k, v in row[1].items())])


def test_every_lane_has_a_twin():
    assert {row[0] for row in ROWS} == set(MODELLED)
    named = {name[:-5] for name in dir(resources) if name.endswith("_luts")}
    assert named == set(MODELLED)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_model_counts_what_yosys_counts(row):
    """Within 15 %, and the table shows it; the test below holds the table to yosys."""
    module, values, luts, dsps, modelled = row
    assert MODELLED[module](values) == modelled
    assert abs(modelled / luts - 1) <= 0.15
    if module == "scale_lane":
        assert resources.DSP_PER_SCALE[values["CODE"]] == dsps


@synthesized
@pytest.mark.parametrize(
    "row",
    [
        row if i < 2 or row[0] == "pool_lane" else pytest.param(row, marks=pytest.mark.slow)
        for i, row in enumerate(ROWS)
    ],
    ids=[name_of(row) for row in ROWS],
)
def test_the_table_of_lanes_is_yosys_s(row, tmp_path):
    module, values, luts, dsps, _ = row
    assert synthesize_lane(tmp_path, module, values) == (luts, dsps)


@synthesized
def test_a_wider_lane_is_seen(tmp_path):
    """A planted fault: a lane of scale() with the 64-bit bias of earlier sources."""
    luts, dsps = synthesize_lane(tmp_path, "scale_lane", {"SUM": 63, "CODE": 8})
    assert luts > 1.15 * resources.scale_lane_luts(32, 8)
    assert dsps > resources.DSP_PER_SCALE[8]
