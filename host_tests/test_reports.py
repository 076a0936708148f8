"""Reports of Vitis HLS and Vivado: read, and compared with an estimate.

The samples were written by hand in the format that the tools document. No tool produced them, and
their numbers belong to no design.
"""

import json
import subprocess
import sys

import pytest

from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.accelerator.reports import (
    ChipResources,
    Loop,
    PipelinedLoop,
    TimingSummary,
    build_report,
    check_build,
    compare,
    main,
    pipelined_loops,
    read_asked,
    read_synthesis,
    read_timing,
    read_utilization,
)
from pynq_kgrc.accelerator.resources import estimate_resources
from pynq_kgrc.errors import ConfigError

CSYNTH = """<?xml version="1.0" encoding="UTF-8"?>
<profile>
<ReportVersion><Version>2022.1</Version></ReportVersion>
<UserAssignments>
  <unit>ns</unit><Part>xczu9eg-ffvb1156-2-e</Part><TopModelName>kgrc_run</TopModelName>
  <TargetClockPeriod>6.67</TargetClockPeriod><ClockUncertainty>1.80</ClockUncertainty>
</UserAssignments>
<PerformanceEstimates>
  <SummaryOfTimingAnalysis><EstimatedClockPeriod>4.867</EstimatedClockPeriod>
  </SummaryOfTimingAnalysis>
  <SummaryOfOverallLatency>
    <Best-caseLatency>undef</Best-caseLatency><Worst-caseLatency>undef</Worst-caseLatency>
  </SummaryOfOverallLatency>
  <SummaryOfLoopLatency>
    <tasks><Name>tasks</Name><TripCount>undef</TripCount><Latency>undef</Latency>
      <fields><Name>fields</Name><TripCount>32</TripCount><PipelineII>1</PipelineII>
        <PipelineDepth>3</PipelineDepth></fields>
    </tasks>
  </SummaryOfLoopLatency>
</PerformanceEstimates>
<AreaEstimates>
  <Resources><BRAM_18K>701</BRAM_18K><DSP>1650</DSP><FF>150000</FF><LUT>141000</LUT>
    <URAM>0</URAM></Resources>
  <AvailableResources><BRAM_18K>1824</BRAM_18K></AvailableResources>
</AreaEstimates>
<ModuleInformation>
  <Module><Name>multiply</Name>
    <PerformanceEstimates><SummaryOfLoopLatency>
      <flattened><Name>flattened</Name>
        <TripCount><range><min>4</min><max>4096</max></range></TripCount>
        <PipelineII>2</PipelineII><PipelineDepth>19</PipelineDepth></flattened>
    </SummaryOfLoopLatency></PerformanceEstimates>
  </Module>
</ModuleInformation>
</profile>
"""

UTILIZATION = """
| Tool Version : Vivado v.2022.1
1. CLB Logic
+----------------------------+--------+-------+------------+-----------+-------+
|          Site Type         |  Used  | Fixed | Prohibited | Available | Util% |
+----------------------------+--------+-------+------------+-----------+-------+
| CLB LUTs*                  | 120000 |     0 |          0 |    274080 | 43.78 |
|   LUT as Logic             | 110000 |     0 |          0 |    274080 | 40.13 |
| CLB Registers              | 140000 |     0 |          0 |    548160 | 25.54 |
+----------------------------+--------+-------+------------+-----------+-------+
3. BLOCKRAM
| Block RAM Tile    | 388.5 |     0 |          0 |       912 | 42.60 |
|   RAMB36/FIFO*    |   300 |     0 |          0 |       912 | 32.89 |
4. ARITHMETIC
| DSPs           | 1648 |     0 |          0 |      2520 | 65.40 |
"""

TIMING = """
| Design Timing Summary
| ---------------------

    WNS(ns)      TNS(ns)  TNS Failing Endpoints  TNS Total Endpoints      WHS(ns)      THS(ns)
    -------      -------  ---------------------  -------------------      -------      -------
      0.412        0.000                      0               312345        0.011        0.000

All user specified timing constraints are met.
"""

READERS = {
    "csynth.xml": (read_synthesis, CSYNTH),
    "utilization.rpt": (read_utilization, UTILIZATION),
    "timing.rpt": (read_timing, TIMING),
}


@pytest.fixture
def folder(tmp_path):
    for name, (_, text) in READERS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_synthesis_report_is_read(folder):
    found = read_synthesis(folder / "csynth.xml")
    assert (found.version, found.top, found.part) == ("2022.1", "kgrc_run", "xczu9eg-ffvb1156-2-e")
    assert (found.target_ns, found.estimated_ns, found.latency) == (6.67, 4.867, None)
    assert found.resources == ChipResources(dsp=1650, bram36=350.5, uram=0, lut=141000, ff=150000)
    assert found.loops == (
        Loop("kgrc_run", "tasks", None, None, None),
        Loop("kgrc_run", "fields", (32, 32), 1, 3),
        Loop("multiply", "flattened", (4, 4096), 2, 19),
    )


def test_a_known_latency_and_the_older_name_of_dsps_are_read(tmp_path):
    text = CSYNTH.replace("<DSP>1650</DSP>", "<DSP48E>7</DSP48E>")
    text = text.replace(
        "<Best-caseLatency>undef</Best-caseLatency><Worst-caseLatency>undef</Worst-caseLatency>",
        "<Best-caseLatency>20</Best-caseLatency><Worst-caseLatency>30</Worst-caseLatency>",
    )
    (tmp_path / "a.xml").write_text(text)
    found = read_synthesis(tmp_path / "a.xml")
    assert found.latency == (20, 30)
    assert found.resources.dsp == 7


def test_utilization_and_timing_are_read(folder):
    assert read_utilization(folder / "utilization.rpt") == ChipResources(
        dsp=1648, bram36=388.5, uram=0, lut=120000, ff=140000
    )
    assert read_timing(folder / "timing.rpt") == TimingSummary(0.412, 0.011, met=True)


@pytest.mark.parametrize(("slack", "worse"), [("0.412", "-0.001"), ("0.011", "-0.001")])
def test_timing_with_a_negative_slack_is_not_met(folder, slack, worse):
    (folder / "timing.rpt").write_text(TIMING.replace(slack, worse))
    assert not read_timing(folder / "timing.rpt").met


@pytest.mark.parametrize(
    ("name", "old", "new", "field"),
    [
        ("csynth.xml", "</profile>", "", "not XML"),
        ("csynth.xml", "<Version>2022.1</Version>", "", "ReportVersion/Version"),
        ("csynth.xml", "<TopModelName>kgrc_run</TopModelName>", "", "TopModelName"),
        ("csynth.xml", "<EstimatedClockPeriod>4.867", "<EstimatedClockPeriod>4,867", "Estimated"),
        ("csynth.xml", "<TargetClockPeriod>6.67", "<TargetClockPeriod>nan", "TargetClockPeriod"),
        ("csynth.xml", "<DSP>1650</DSP>", "", "Resources/DSP"),
        ("csynth.xml", "<BRAM_18K>701</BRAM_18K>", "<BRAM_18K/>", "BRAM_18K"),
        ("csynth.xml", "<Best-caseLatency>undef</Best-caseLatency>", "", "Best-caseLatency"),
        ("csynth.xml", "<PipelineII>2", "<PipelineII>two", "PipelineII"),
        ("csynth.xml", "<PipelineII>2", "<PipelineII>-2", "PipelineII"),
        ("csynth.xml", "<Name>multiply</Name>", "", "Name"),
        ("utilization.rpt", "| CLB LUTs*  ", "| LUTs  ", "LUTs"),
        ("utilization.rpt", "| 388.5 |", "| much |", "Block RAM Tile"),
        ("utilization.rpt", "| DSPs ", "| DSP ", "DSPs"),
        ("timing.rpt", "WNS(ns)", "slack", "WNS(ns)"),
        ("timing.rpt", "WHS(ns)", "hold", "WHS(ns)"),
        ("timing.rpt", "0.412 ", "NA ", "WNS(ns)"),
        ("timing.rpt", TIMING[TIMING.index("      0.412") :], "", "WNS(ns)"),
    ],
)
def test_the_error_of_a_damaged_report_names_file_and_field(folder, name, old, new, field):
    read, text = READERS[name]
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as refused:
        read(folder / name)
    assert str(folder / name) in str(refused.value)
    assert field in str(refused.value)


@pytest.mark.parametrize("name", READERS)
def test_a_missing_report_or_one_that_is_not_text_is_refused(tmp_path, name):
    read = READERS[name][0]
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / name)


SOURCE = """
static void helper(int a) {}
void multiply(const Task& task,
              long& trips) {
outer:
  for (int i = 0; i < 3; ++i)
  flattened:
    for (int j = 0; j < 3; ++j) {
      // II = 1: because
#pragma HLS PIPELINE II = 1 style = flp
    }
plain:
  for (int i = 0; i < 3; ++i) helper(i);
}
extern "C" void kgrc_run(int first) {
fields:
  for (int i = 0; i < 3; ++i) {
#pragma HLS PIPELINE II = kWords
  }
}
"""


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "hls_src"
    folder.mkdir()
    (folder / "a.cpp").write_text(SOURCE)
    (folder / "config.h").write_text("enum Design {\n  kWords = 2,\n};\n")
    return folder


ASKED = {("multiply", "flattened"): 1, ("kgrc_run", "fields"): 2}


def test_what_the_sources_ask_for_is_read(sources):
    assert read_asked(sources, sources / "config.h") == ASKED


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("fields:\n", "", r"a.cpp:17: PIPELINE with II = 2 in the loop without label"),
        ("kWords", "kOther", r"a.cpp:18: PIPELINE with II = kOther in the loop fields"),
        ("PIPELINE II = 1", "PIPELINE", r"a.cpp:10: PIPELINE with II = nothing"),
        ("PIPELINE", "UNROLL", "no .cpp with a PIPELINE pragma"),
    ],
)
def test_a_pragma_that_asks_for_nothing_clear_is_refused(sources, old, new, says):
    (sources / "a.cpp").write_text(SOURCE.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        read_asked(sources, sources / "config.h")


def loops_of(tmp_path, text, asked=ASKED):
    (tmp_path / "csynth.xml").write_text(text)
    return pipelined_loops(read_synthesis(tmp_path / "csynth.xml"), asked)


FAST = CSYNTH.replace("<PipelineII>2<", "<PipelineII>1<")
"""The report with the II that the sources ask for."""


def test_the_loops_of_a_report_stand_beside_those_of_the_sources(tmp_path):
    assert loops_of(tmp_path, FAST) == [
        PipelinedLoop("kgrc_run/fields", 2, 1, True),
        PipelinedLoop("multiply/flattened", 1, 1, True),
    ]
    # as the tool names the module of a loop, and a nest that it has made one loop of
    text = FAST.replace("<Name>multiply</Name>", "<Name>multiply_Pipeline_outer_flattened</Name>")
    text = text.replace("<Name>flattened</Name>", "<Name>outer_flattened</Name>")
    found = loops_of(tmp_path, text)[1]
    assert found.name == "multiply_Pipeline_outer_flattened/outer_flattened"
    assert (found.asked, found.reached) == (1, 1)
    # the longest label; loops of another function; a loop that the report lacks
    asked = {
        ("multiply", "flattened"): 1,
        ("multiply", "x_flattened"): 3,
        ("scale", "words"): 9,
    }
    rows = loops_of(tmp_path, FAST.replace("<Name>flattened<", "<Name>x_flattened<"), asked)
    assert {row.name: row.asked for row in rows if row.found} == {
        "kgrc_run/fields": None,
        "multiply/x_flattened": 3,
    }
    assert [row for row in rows if not row.found] == [
        PipelinedLoop("multiply/flattened", 1, None, False),
        PipelinedLoop("scale/words", 9, None, False),
    ]
    # a function that is inlined has no module of its own
    asked = {("read_runs", "flattened"): 1, ("kgrc_run", "fields"): 2}
    assert [row.fault for row in loops_of(tmp_path, CSYNTH, asked)] == [
        "",
        "multiply/flattened: II = 2, II = 1 was asked for",
    ]


MET = TimingSummary(0.412, 0.011, met=True)


def test_a_build_is_refused_with_all_its_faults(tmp_path):
    check_build(loops_of(tmp_path, FAST), MET)
    # an II smaller than asked for, and a loop that the tool pipelined by itself, are no faults
    check_build(loops_of(tmp_path, FAST, {("multiply", "flattened"): 1}), MET)
    with pytest.raises(ConfigError, match=r"multiply/flattened: II = 2, II = 1 was asked for"):
        check_build(loops_of(tmp_path, CSYNTH), MET)
    text = CSYNTH.replace("<PipelineII>2</PipelineII>", "")
    with pytest.raises(ConfigError, match=r"flattened: not pipelined, II = 1 was asked for"):
        check_build(loops_of(tmp_path, text), MET)
    with pytest.raises(ConfigError, match="none of the loops that the sources pipeline"):
        check_build(loops_of(tmp_path, FAST, {("scale", "filters"): 1}), MET)
    slow = TimingSummary(-1.25, -0.02, met=False)
    with pytest.raises(ConfigError) as refused:
        check_build(loops_of(tmp_path, CSYNTH), slow)
    assert str(refused.value).splitlines() == [
        "the build is refused:",
        "  multiply/flattened: II = 2, II = 1 was asked for",
        "  the clock is not met: the worst slack of setup (WNS) is -1.25 ns",
        "  the clock is not met: the worst slack of hold (WHS) is -0.02 ns",
    ]


def test_the_command_checks_a_build(folder, sources, capsys):
    (folder / "config.h").write_text((sources / "config.h").read_text())
    reports = folder / "reports"
    reports.mkdir()
    for name in READERS:
        (folder / name).rename(reports / name)
    with pytest.raises(ConfigError, match="II = 2, II = 1 was asked for"):
        main([str(reports), "--check", str(sources)])
    assert "II = 2   multiply/flattened" in capsys.readouterr().out, "the report is shown as well"
    (reports / "csynth.xml").write_text(FAST)
    main([str(reports), "--check", str(sources)])
    (reports / "timing.rpt").write_text(TIMING.replace("0.412", "-0.001"))
    with pytest.raises(ConfigError, match="WNS"):
        main([str(reports), "--check", str(sources), "--json"])
    main([str(reports)])


def test_the_page_of_a_build_has_resources_intervals_and_slacks(folder):
    synthesis = read_synthesis(folder / "csynth.xml")
    placed = read_utilization(folder / "utilization.rpt")
    rows = compare(ChipResources(dsp=1642), synthesis.resources, placed)
    loops = pipelined_loops(synthesis, {**ASKED, ("scale", "filters"): 1})
    page = build_report("A build", synthesis, loops, rows, MET, ("board: none",))
    for line in (
        "# A build",
        "- board: none",
        "- clock: 6.67 ns asked for, 4.867 ns estimated by Vitis HLS 2022.1 before placement",
        "- worst slack after placement and routing: 0.412 ns (setup), 0.011 ns (hold); met",
        "| dsp | 1642 | 1650 | 1648 | -0.4% |",
        "| ff | - | 150000 | 140000 | - |",
        "| multiply/flattened | 1 | 2 |",
        "| scale/filters | 1 | not in the report |",
    ):
        assert line in page.splitlines()
    assert "after placement" not in build_report("A", synthesis, loops, rows, None)


def test_the_estimate_is_compared_with_the_latest_report(folder):
    synthesized = read_synthesis(folder / "csynth.xml").resources
    rows = {row.resource: row for row in compare(ChipResources(dsp=1642, lut=136000), synthesized)}
    assert rows["dsp"].error == pytest.approx(1642 / 1650 - 1)
    assert (rows["ff"].estimated, rows["ff"].error) == (None, None)
    assert rows["uram"].error is None
    placed = read_utilization(folder / "utilization.rpt")
    rows = {row.resource: row for row in compare(ChipResources(dsp=1642), synthesized, placed)}
    assert rows["dsp"].error == pytest.approx(1642 / 1648 - 1)


def test_the_command_prints_the_reports_that_exist(folder, capsys):
    main([str(folder), "--estimate", "dsp=1642", "lut=136000"])
    out = capsys.readouterr().out
    assert "II = 2   multiply/flattened" in out
    assert "timing met: worst slack 0.412 ns (setup), 0.011 ns (hold)" in out
    assert "-0.4%" in out
    main([str(folder), "--design", "8-sparse", "--estimate", "lut=1", "--json"])
    rows = {row["resource"]: row for row in json.loads(capsys.readouterr().out)["resources"]}
    assert rows["dsp"]["estimated"] == estimate_resources(preset("8-sparse")).dsp
    assert rows["lut"]["estimated"] == 1
    (folder / "csynth.xml").unlink()
    (folder / "timing.rpt").write_text(TIMING.replace("0.412", "-1.25"))
    main([str(folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["synthesis"] is None
    assert found["timing"] == {"setup_ns": -1.25, "hold_ns": 0.011, "met": False}
    assert found["resources"][0] == {
        "resource": "dsp",
        "estimated": None,
        "synthesized": None,
        "placed": 1648.0,
        "error": None,
    }


def test_the_command_names_the_reports_that_are_missing(tmp_path):
    command = [sys.executable, "-m", "pynq_kgrc.accelerator.reports", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    wanted = f"{tmp_path}: there is none of csynth.xml, utilization.rpt, timing.rpt"
    assert done.stderr.strip() == wanted


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ("bram18=3", "'bram18' is not a resource; there are dsp, bram36, uram, lut, ff"),
        ("dsp=many", "'many' of dsp is not a number; use the form dsp=1642"),
    ],
)
def test_a_bad_estimate_is_refused(folder, capsys, estimate, text):
    with pytest.raises(SystemExit):
        main([str(folder), "--estimate", estimate])
    assert text in capsys.readouterr().err
