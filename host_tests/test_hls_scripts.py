"""From the HLS sources to an overlay: config.h, the C test bench, the Makefile and the Tcl files.

Vitis HLS and Vivado are not installed. Their Tcl runs in tclsh with stubs for the tools' commands:
that shows errors of syntax, the order of the calls and their arguments, but nothing of what the
tools would make of them.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pynq_kgrc.accelerator import header
from pynq_kgrc.accelerator.boards import BOARDS, board, board_of_design, overlay_name
from pynq_kgrc.accelerator.build import build_settings
from pynq_kgrc.accelerator.build import main as print_settings
from pynq_kgrc.accelerator.config import PRESETS, preset, write_design
from pynq_kgrc.accelerator.header import (
    ADDRESSES,
    MANAGER,
    OTHER_PORT,
    REGISTERS,
    STATUS,
    VLNV,
    memory_ports,
)
from pynq_kgrc.accelerator.reports import read_asked
from pynq_kgrc.backends.board.overlays import read_overlay, write_manifests
from pynq_kgrc.backends.csim import SOURCES
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.program import ConvTask

HLS = Path(__file__).resolve().parents[1] / "hls_src"
TOP = (HLS / "top.cpp").read_text()
BUNDLES = dict(re.findall(r"m_axi port = (\w+) .*bundle = (\w+)", TOP))
"""Memory port of the kernel -> its AXI master."""

needs_tclsh = pytest.mark.skipif(
    shutil.which("tclsh") is None, reason="no tclsh: the Tcl files are not run"
)
needs_make = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("g++")), reason="no make or no g++"
)


# ---- config.h --------------------------------------------------------------------------------


def test_the_header_in_the_repository_is_not_stale():
    renew = "python -m pynq_kgrc.accelerator.header --design 8-sparse -o hls_src/config.h"
    found = (HLS / "config.h").read_text()
    assert found == header.config_header(preset("8-sparse")), f"config.h is stale; renew: {renew}"


def test_a_header_is_printed_or_written_if_its_text_changes(tmp_path, capsys):
    header.main(["--design", "4-dense"])
    text = capsys.readouterr().out
    assert text == header.config_header(preset("4-dense"))
    path = tmp_path / "config.h"
    header.main(["--design", "4-dense", "-o", str(path)])
    assert path.read_text() == text
    before = path.stat()
    header.main(["--design", "4-dense", "-o", str(path)])
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    header.main(["--design", "8-dense", "-o", str(path)])
    assert path.read_text() == header.config_header(preset("8-dense"))
    assert [p.name for p in tmp_path.iterdir()] == ["config.h"], "nothing is left beside it"
    with pytest.raises(ConfigError, match="no accelerator named '12-sparse'; there are 16-dense"):
        header.main(["--design", "12-sparse"])
    write_design(preset("16-sparse"), tmp_path / "mine.json")
    header.main(["--design", str(tmp_path / "mine.json")])
    assert capsys.readouterr().out == header.config_header(preset("16-sparse"))


# ---- what more than one file says ------------------------------------------------------------


def variable(name):
    """A variable of the Makefile."""
    text = (HLS / "Makefile").read_text().replace("\\\n", " ")
    found = re.search(rf"^{name}\s*[:?]?=\s*(.*)$", text, re.MULTILINE)
    return found[1].split()


def test_the_makefile_knows_the_designs_the_sources_and_the_board():
    assert variable("DESIGNS") == list(PRESETS)
    assert variable("SOURCES") == list(SOURCES)
    others = {"config.h", "timed.h", "timed.cpp"}  # made for a design; of the timed simulation
    assert variable("HEADERS") == sorted({p.name for p in HLS.glob("*.h")} - others)
    assert variable("BOARDS") == list(BOARDS)
    assert variable("FREE") == [name for name, each in BOARDS.items() if each.free_tools]
    assert set(SOURCES) == {p.name for p in HLS.glob("*.cpp")} - others
    listed = re.search(r"foreach name \{(.*?)\}", (HLS / "scripts/hls.tcl").read_text(), re.DOTALL)
    assert listed[1].split() == list(SOURCES)


def test_the_bench_is_as_deep_as_the_ports():
    depths = set(re.findall(r"m_axi .* depth = (\d+)", TOP))
    assert len(re.findall(r"m_axi .* depth = ", TOP)) == len(ADDRESSES)
    depth = re.search(r"kDepth = (\d+);", (HLS / "scripts/bench.cpp").read_text())
    assert depths == {depth[1]}
    signature = r"void kgrc_run\((.*?)\)"
    declared = re.search(signature, (HLS / "scripts/bench.cpp").read_text(), re.DOTALL)
    defined = re.search(signature, TOP, re.DOTALL)
    assert declared[1].split() == defined[1].split()


def test_the_scripts_export_what_the_driver_looks_for():
    vendor, library, name, version = VLNV.split(":")
    export = (HLS / "scripts/hls.tcl").read_text()
    for option in (
        f"-vendor {vendor}",
        f"-library {library}",
        f"-ipname {name} -version {version}",
    ):
        assert option in export
    assert (
        f"make_cell {name}_0 {vendor}:{library}:{name}" in (HLS / "scripts/overlay.tcl").read_text()
    )


def test_every_memory_port_of_the_kernel_has_one_port_of_the_system(monkeypatch, capsys):
    found = memory_ports()
    assert sorted(port for ports in found.values() for port in ports) == sorted(ADDRESSES)
    assert set(BUNDLES) == set(ADDRESSES)
    for port in ("HPC0", "HP0", "HP2"):
        assert len(found[port]) == 1, "the fast ports carry one of the kernel's"
    homes = {}
    for system, ports in found.items():
        for port in ports:
            assert homes.setdefault(BUNDLES[port], system) == system, "a master has one slave"
    two = ("input0", "input1", "shortcut", "output", "weights0", "weights1", "tables", "status")
    monkeypatch.setattr(header, "ADDRESSES", two)
    assert memory_ports() == {
        "HPC0": ("input0",),
        "HPC1": ("input1",),
        "HP0": ("weights0",),
        "HP1": ("weights1",),
        "HP2": ("output",),
        OTHER_PORT: ("shortcut", "tables", "status"),
    }
    print_settings(["--design", "8-kv260", "--board", "kv260"])
    assert capsys.readouterr().out == (
        "KGRC_BOARD=kv260 KGRC_PART=xck26-sfvc784-2LV-c KGRC_BOARD_PART=xilinx.com:kv260_som "
        "KGRC_PORTS='HPC0 {input0} HPC1 {input1} HP3 {shortcut tables status} HP2 {output} "
        "HP0 {weights0} HP1 {weights1}' KGRC_URAM='region,memory ports'\n"
    )
    fewer = replace(board("kv260"), ports=("HPC0", "HPC1", "HP0", "HP1"))
    with pytest.raises(ConfigError, match="kv260 has no port HP3, HP2 to memory; there are HPC0"):
        build_settings(preset("8-kv260"), fewer)
    with pytest.raises(ConfigError, match="zcu102 is only modelled: it has no board_part"):
        build_settings(preset("8-kv260"), replace(board("zcu102"), board_part=""))
    monkeypatch.setattr(header, "ADDRESSES", ("input2",))
    with pytest.raises(ConfigError, match="input2: OWN_PORTS has 2 for input"):
        memory_ports()


# ---- the C test bench ------------------------------------------------------------------------


def make(*targets, **variables):
    """Run make in hls_src."""
    command = ["make", "-C", str(HLS), f"PYTHON={sys.executable}", *map(str, targets)]
    command += [f"{name}={value}" for name, value in variables.items()]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def run_bench(folder, *arguments):
    command = [str(folder / "bench-plain"), str(folder / "vectors.bin"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The test bench of a dense design, and its vectors, whose first group is not enabled."""
    folder = tmp_path_factory.mktemp("csim")
    done = make("csim-8-dense", TYPES="plain", BUILD=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 tasks, 0 differences" in done.stdout
    return folder


def changed(built, folder, change):
    """The build folder with its vectors changed."""
    shutil.copytree(built / "8-dense", folder)
    words = np.fromfile(folder / "vectors.bin", "<u8")
    change(words).tofile(folder / "vectors.bin")
    return folder


def task_at(words, number):
    """Index of a task's first word: its status; place, size, output and mask follow."""
    at = 6 + int(words[3:6].sum())
    for _ in range(number):
        at += len(STATUS) + 2 + 2 * int(words[at + len(STATUS) + 1])
    return at


@needs_make
def test_a_second_make_does_nothing(built):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    done = make("csim-8-dense", TYPES="plain", BUILD=built)
    assert done.returncode == 0
    assert "differences" not in done.stdout
    assert "g++" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


@needs_make
def test_the_header_in_the_source_folder_is_on_no_include_path(tmp_path):
    shutil.copytree(HLS, tmp_path / "hls_src")
    for package in ("pynq_kgrc", "overlays"):
        (tmp_path / package).symlink_to(HLS.parent / package)
    (tmp_path / "hls_src/config.h").write_text("#error the design of another build\n")
    target = tmp_path / "build/8-dense/bench-plain"
    command = ["make", "-C", str(tmp_path / "hls_src"), f"PYTHON={sys.executable}", str(target)]
    command += [f"BUILD={tmp_path / 'build'}", "CXXFLAGS=-O0 -fsyntax-only"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@needs_make
def test_a_stale_header_in_the_build_folder_is_renewed(tmp_path):
    path = tmp_path / "8-dense/config.h"
    path.parent.mkdir()
    path.write_text(header.config_header(preset("8-sparse")))
    assert make(path, BUILD=tmp_path).returncode == 0
    assert path.read_text() == header.config_header(preset("8-dense"))


@pytest.mark.parametrize("design", ["8-dense", "8-sparse"])
def test_the_vectors_have_one_of_everything(design):
    vectors = load_script("vectors")
    program = vectors.random_program(preset(design), 0)
    tasks = program.tasks
    convolutions = [task for task in tasks if isinstance(task, ConvTask)]
    assert len(convolutions) == len(tasks) - 1
    enabled = [task.weights.enabled for task in convolutions]
    assert any(not first[0] and first.any() for first in enabled), "a first group is off"
    kept = {task.weights.kept for task in convolutions}
    assert len(kept) > 2
    assert ((4, 3) in kept) == program.config.sparse
    assert any(task.pool is not None for task in convolutions)
    assert any(task.shortcut is not None for task in convolutions)
    assert any(task.shape.stride == (2, 2, 2) for task in convolutions)
    assert any(task.shape.filters > program.config.tm for task in convolutions)
    assert any(program.work(task).tile != task.out_size for task in convolutions), "tiles"
    assert program.buffers[program.target.buffer].bits == 16


@needs_make
@pytest.mark.parametrize("number", range(7))
def test_a_flipped_byte_of_an_expected_output_is_seen(built, tmp_path, number):
    def flip(words):
        at = task_at(words, number)
        size, codes_at = int(words[at + len(STATUS) + 1]), at + len(STATUS) + 2
        codes, known = words[codes_at:][:size], words[codes_at + size :][:size]
        last = np.flatnonzero(known)[-1]
        codes[last] ^= known[last] & np.uint64(0xFF)
        return words

    done = run_bench(changed(built, tmp_path / "b", flip))
    assert done.returncode == 1
    assert f"apart: task {number}: word" in done.stdout
    assert ("together" in done.stdout) == (number == 6)
    # the padding of a map is not compared
    done = run_bench(changed(built, tmp_path / "c", lambda words: fill_up(words, number)))
    assert done.returncode == 0, done.stdout


def fill_up(words, number):
    at = task_at(words, number)
    size, codes_at = int(words[at + len(STATUS) + 1]), at + len(STATUS) + 2
    words[codes_at:][:size] |= ~words[codes_at + size :][:size]
    return words


@needs_make
def test_make_fails_when_an_expected_byte_is_flipped(built, tmp_path):
    def flip(words):
        words[task_at(words, 0) + len(STATUS) + 2] ^= np.uint64(1)
        return words

    changed(built, tmp_path / "8-dense", flip)
    done = make("csim-8-dense", TYPES="plain", BUILD=tmp_path)
    assert done.returncode != 0
    assert "1 differences" in done.stdout
    assert make("csim-8-dense", TYPES="plain", BUILD=tmp_path).returncode != 0


@needs_make
def test_a_status_word_that_differs_is_seen(built, tmp_path):
    def count(words):
        words[task_at(words, 2) + 1] += np.uint64(1)
        return words

    done = run_bench(changed(built, tmp_path / "b", count))
    assert done.returncode == 1
    assert "apart: task 2: status word 1 is" in done.stdout
    assert "together: task 2: status word 1 is" in done.stdout
    assert "together" not in run_bench(tmp_path / "b", "apart").stdout


@needs_make
def test_clock_cycles_are_at_least_the_trips_of_the_array(built, tmp_path):
    """In co-simulation the kernel counts them; here the vectors ask for another count than 0."""

    def ask(words):
        words[task_at(words, 2) + STATUS.index("clocks")] = np.uint64(1)
        return words

    done = run_bench(changed(built, tmp_path / "b", ask))
    assert done.returncode == 1
    place = STATUS.index("clocks")
    assert f"apart: task 2: status word {place} is 0, not 1" in done.stdout


@needs_make
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda words: words[:-1], "cut short or too long"),
        (lambda words: np.append(words, words[:1]), "cut short or too long"),
        (lambda words: words[:3], "not a file of vectors"),
        (lambda words: words[1:], "not a file of vectors"),
        (lambda words: words ^ (np.arange(words.size) == 1).astype("<u8"), "made for the design"),
        (lambda words: words + (np.arange(words.size) == 3).astype("<u8") * 2**60, "cut short"),
    ],
)
def test_damaged_vectors_are_refused(built, tmp_path, change, says):
    done = run_bench(changed(built, tmp_path / "b", change))
    assert done.returncode == 2
    assert says in done.stdout


@needs_make
@pytest.mark.slow
@pytest.mark.parametrize("design", PRESETS)
def test_the_c_simulation_of_every_design_in_both_types(tmp_path, design):
    done = make(f"csim-{design}", BUILD=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("7 tasks, 0 differences") == 2


# ---- the counter of clock cycles, as synthesis sees it ------------------------------------------

TOKEN_COMES = """
#pragma once
namespace hls {
template <class Value>
class stream {
 public:
  explicit stream(const char*) : polls(0) {}
  bool read_nb(Value&) { return ++polls == 1000; }
  void write(const Value&) {}
  Value read() { return Value(); }
  bool empty() const { return false; }
  long polls;
};
}
"""
"""A stand-in for the vendor's header, in which the token comes in cycle 1000."""

COUNT = """
#include "design.h"
int main() {
  kgrc::Stream<bool> done("done");
  long clocks = -1;
  kgrc::count_clocks(done, clocks);
  return clocks == 1000 && done.polls == 1000 ? 0 : 1;
}
"""


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, HLS / f"scripts/{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_make
@pytest.mark.parametrize("fault", [None, ("++count;", "count += 2;"), ("while (!ended)", "if (1)")])
def test_clock_cycles_are_counted_until_the_token_comes(tmp_path, fault):
    pytest.importorskip("clang", reason="no libclang: no stand-ins for the vendor's headers")
    flags = load_script("lint").synthesis_flags(HLS, tmp_path, "8-sparse")
    (tmp_path / "hls_stream.h").write_text(TOKEN_COMES)
    (tmp_path / "main.cpp").write_text(COUNT)
    text = (HLS / "clock.cpp").read_text()
    (tmp_path / "clock.cpp").write_text(text if fault is None else text.replace(*fault))
    command = ["g++", *flags, "-Wno-unknown-pragmas", "-o", str(tmp_path / "main")]
    command += [str(tmp_path / name) for name in ("main.cpp", "clock.cpp")]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([str(tmp_path / "main")], timeout=60)
    assert (done.returncode == 0) == (fault is None)


# ---- the Tcl files, with the tools' commands stubbed ------------------------------------------

COMMANDS = """
add_files apply_bd_automation assign_bd_address config_compile config_interface
connect_bd_intf_net connect_bd_net
cosim_design create_bd_cell create_bd_design create_clock create_project csim_design csynth_design
current_fileset current_project export_design generate_target get_bd_addr_segs get_bd_addr_spaces
get_bd_cells get_bd_intf_pins get_bd_pins get_board_parts get_files get_ipdefs get_property
get_runs launch_runs make_wrapper open_project open_run open_solution report_timing_summary
report_utilization save_bd_design set_clock_uncertainty set_param set_part set_property set_top
update_compile_order update_ip_catalog validate_bd_design version wait_on_run xhub::get_xstores
"""
"""Commands of Vitis HLS and of Vivado that the stub takes (UG1399, UG835)."""

STUB = r"""
# Logs the commands of the tools, and returns what a tool might return.
proc unknown {name args} {
  if {$name ni $::env(STUB_COMMANDS)} {
    error "invalid command name \"$name\""
  }
  set log [open $::env(STUB_LOG) a]
  puts $log [string map {\n " "} [join [linsert $args 0 $name] \t]]
  close $log
  switch -glob -- "$name $args" {
    "get_ipdefs *missing*" {return {}}
    "get_ipdefs *" {
      set kind [string range [lindex $args end] 0 end-2]
      if {[string match *$::env(STUB_LACKS)* $kind]} {return {}}
      return [list $kind:1.9 $kind:1.10]
    }
    "get_board_parts *" {
      return [expr {$::env(STUB_LACKS) eq "board" ? {} : $::env(STUB_BOARDS)}]
    }
    "get_bd_addr_spaces kgrc_run_0/*" {return {kgrc_run_0/Data_m_axi_weights}}
    "get_bd_addr_segs -of_objects *" {
      return [expr {$::env(STUB_LACKS) eq "memory" ? "a/DDR_LOW" : "a/DDR_LOW a/DDR_HIGH"}]
    }
    "get_property PROGRESS *" {return [expr {$::env(STUB_LACKS) eq "progress" ? "40%" : "100%"}]}
    "get_property STATS.*" {return $::env(STUB_SLACK)}
    "report_timing_summary *" {make_file [lindex $args end] $::env(STUB_TIMING)}
    "report_utilization *" {make_file [lindex $args end] $::env(STUB_UTILIZATION)}
    "get_property DIRECTORY *" {return vivado/kgrc.runs/impl_1}
    "version *" {return 2022.1}
    "csynth_design *" {make_file hls/solution/syn/report/csynth.xml $::env(STUB_REPORT)}
    "cosim_design *" {make_file hls/solution/sim/report/kgrc_run_cosim.rpt pass}
    "export_design *" {make_file hls/solution/impl/ip/component.xml ip}
    "launch_runs *" {
      make_file vivado/kgrc.runs/impl_1/kgrc_wrapper.bit bits
      make_file vivado/kgrc.gen/sources_1/bd/kgrc/hw_handoff/kgrc.hwh $::env(STUB_HANDOFF)
    }
    "get_bd_* *" - "create_bd_cell *" {return [lindex $args end]}
  }
}
proc make_file {path text} {
  file mkdir [file dirname $path]
  set file [open $path w]
  puts $file $text
  close $file
}
source [lindex $argv end]
"""

BOARD_PARTS = """xilinx.com:zcu102-es2:part0:1.0 xilinx.com:zcu102:part0:3.4
xilinx.com:k26c:part0:1.4
xilinx.com:kv260_som:part0:1.4 xilinx.com:zcu104:part0:1.1 xilinx.com:zcu106:part0:2.6
avnet.com:Ultra96v2:part0:1.2"""
"""Names as in github.com/Xilinx/XilinxBoardStore."""

LOOPS = "".join(
    f"<Module><Name>{function}</Name><PerformanceEstimates><SummaryOfLoopLatency><{label}>"
    f"<Name>{label}</Name><TripCount>undef</TripCount><PipelineII>{asked}</PipelineII>"
    f"<PipelineDepth>9</PipelineDepth></{label}></SummaryOfLoopLatency></PerformanceEstimates>"
    f"</Module>"
    for (function, label), asked in read_asked(HLS, HLS / "config.h").items()
)

REPORT = f"""<profile><ReportVersion><Version>2022.1</Version></ReportVersion><UserAssignments>
<Part>p</Part><TopModelName>kgrc_run</TopModelName><TargetClockPeriod>6.67</TargetClockPeriod>
</UserAssignments><PerformanceEstimates><SummaryOfTimingAnalysis>
<EstimatedClockPeriod>5</EstimatedClockPeriod></SummaryOfTimingAnalysis><SummaryOfOverallLatency>
<Best-caseLatency>undef</Best-caseLatency><Worst-caseLatency>undef</Worst-caseLatency>
</SummaryOfOverallLatency></PerformanceEstimates><AreaEstimates><Resources><BRAM_18K>1</BRAM_18K>
<DSP>1</DSP><FF>1</FF><LUT>1</LUT><URAM>0</URAM></Resources></AreaEstimates><ModuleInformation>
{LOOPS}</ModuleInformation></profile>"""
"""A report written by hand, with the parts that the manifest needs."""

TIMING = """    WNS(ns)      TNS(ns)      WHS(ns)
    -------      -------      -------
      0.412        0.000        0.011
"""

UTILIZATION = """| CLB LUTs* | 120000 |
| CLB Registers | 140000 |
| Block RAM Tile | 388.5 |
| DSPs | 1648 |
"""


def handoff(names=tuple(REGISTERS)):
    """A .hwh written by hand, with the parts that the manifest's check reads."""
    registers = "".join(f'<REGISTER NAME="{name}"/>' for name in names)
    kernel = f'<MODULE VLNV="{VLNV}">{registers}</MODULE>'
    managers = f'<MODULE VLNV="{MANAGER}"/>' * len(memory_ports())
    return f"<EDKSYSTEM>{kernel}{managers}</EDKSYSTEM>"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """The stubs and the settings of the Makefile; gives the path of the log."""
    (tmp_path / "stub.tcl").write_text(STUB)
    settings = {
        "KGRC_SOURCES": str(HLS),
        "KGRC_PART": "a-part",
        "KGRC_CLOCK_MHZ": "150",
        "KGRC_BOARD": "zcu102",
        "KGRC_BOARD_PART": "xilinx.com:zcu102",
        "KGRC_URAM": "nothing",
        "KGRC_JOBS": "3",
        "KGRC_PORT_CLOCK_MHZ": "300",
        "KGRC_PORTS": " ".join(f"{s} {{{' '.join(p)}}}" for s, p in memory_ports().items()),
        "KGRC_STEP": "build",
        "STUB_TIMING": TIMING,
        "STUB_UTILIZATION": UTILIZATION,
        "STUB_LOG": str(tmp_path / "log"),
        "STUB_COMMANDS": COMMANDS,
        "STUB_LACKS": "nothing",
        "STUB_BOARDS": BOARD_PARTS,
        "STUB_SLACK": "0.1",
        "STUB_REPORT": REPORT,
        "STUB_HANDOFF": handoff(),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "log"


def source(script, folder, stub):
    folder.mkdir(exist_ok=True)
    command = ["tclsh", str(stub), str(script)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def calls_of(log):
    return [line.split("\t") for line in log.read_text().splitlines()]


def with_name(calls, *names):
    return [call[1:] for call in calls if call[0] in names]


@needs_tclsh
def test_the_calls_of_vitis_hls_come_in_order(tools, tmp_path, monkeypatch):
    build = str(tmp_path / "build")
    flags = f"-std=c++14 -DKGRC_VITIS -I{build}"
    bench = ["-tb", str(HLS / "scripts/bench.cpp"), "-cflags", f"{flags} -Wno-unknown-pragmas"]
    again = [["open_project", "hls"], ["open_solution", "solution"]]
    wanted = {
        "synthesize": [
            ["open_project", "-reset", "hls"],
            ["set_top", "kgrc_run"],
            *(["add_files", str(HLS / name), "-cflags", flags] for name in SOURCES),
            ["add_files", *bench],
            ["open_solution", "-reset", "solution", "-flow_target", "vivado"],
            ["set_part", "a-part"],
            ["create_clock", "-period", "6.667", "-name", "default"],
            ["set_clock_uncertainty", "27%", "default"],
            ["config_compile", "-pipeline_style", "flp"],
            ["csim_design", "-O", "-argv", f"{build}/vectors.bin"],
            ["csynth_design"],
        ],
        "cosimulate": [
            *again,
            ["cosim_design", "-rtl", "verilog", "-argv", f"{build}/vectors.bin apart"],
        ],
        "export": [
            *again,
            [
                *("export_design", "-rtl", "verilog", "-format", "ip_catalog"),
                *("-vendor", "pynq-kgrc", "-library", "hls"),
                *("-ipname", "kgrc_run", "-version", "1.0"),
            ],
        ],
    }
    made = {
        "synthesize": "reports/csynth.xml",
        "cosimulate": "reports/kgrc_run_cosim.rpt",
        "export": "ip/component.xml",
    }
    for step, calls in wanted.items():
        monkeypatch.setenv("KGRC_STEP", step)
        tools.unlink(missing_ok=True)
        done = source(HLS / "scripts/hls.tcl", tmp_path / "build", tmp_path / "stub.tcl")
        assert (done.returncode, done.stderr) == (0, "")
        assert calls_of(tools) == calls
        assert (tmp_path / "build" / made[step]).is_file()


@needs_tclsh
@pytest.mark.parametrize(
    ("uram", "flag", "buffers"),
    [("nothing", False, False), ("region", True, False), ("region,memory ports", True, True)],
)
def test_memories_go_to_ultraram_where_the_board_asks_for_it(
    tools, tmp_path, monkeypatch, uram, flag, buffers
):
    monkeypatch.setenv("KGRC_STEP", "synthesize")
    monkeypatch.setenv("KGRC_URAM", uram)
    done = source(HLS / "scripts/hls.tcl", tmp_path / "build", tmp_path / "stub.tcl")
    assert (done.returncode, done.stderr) == (0, "")
    calls = calls_of(tools)
    files = with_name(calls, "add_files")
    assert {"-DKGRC_REGION_URAM" in call[-1].split() for call in files} == {flag}
    found = with_name(calls, "config_interface")
    assert found == ([["-m_axi_buffer_impl", "uram"]] if buffers else [])
    pragma = r"#ifdef KGRC_REGION_URAM\n.*\n#pragma HLS BIND_STORAGE variable = region_ram"
    assert re.search(pragma, (HLS / "compute.cpp").read_text())


@needs_tclsh
def test_the_block_design_is_complete(tools, tmp_path):
    build = tmp_path / "build"
    (build / "ip").mkdir(parents=True)
    done = source(HLS / "scripts/overlay.tcl", build, tmp_path / "stub.tcl")
    assert (done.returncode, done.stderr) == (0, "")
    calls = calls_of(tools)
    assert with_name(calls, "create_project") == [["-force", "kgrc", "vivado", "-part", "a-part"]]
    assert ["set_property", "board_part", "xilinx.com:zcu102:part0:3.4", ""] in calls
    # the newest of each kind; the kernel by its exported name
    cells = {call[-1]: call[3] for call in with_name(calls, "create_bd_cell")}
    assert cells["kgrc_run_0"] == VLNV.replace(":1.0", ":1.10")
    assert all(kind.endswith(":1.10") for kind in cells.values())

    def settings_of(cell):
        found = [c[2].split() for c in calls if c[0] == "set_property" and c[-1] == cell]
        words = [word for setting in found for word in setting]
        return dict(zip(words[::2], words[1::2], strict=True))

    settings = settings_of("ps")
    assert settings["CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ"] == "150"
    assert settings["CONFIG.PSU__CRL_APB__PL1_REF_CTRL__FREQMHZ"] == "300"
    assert settings["CONFIG.PSU__FPGA_PL1_ENABLE"] == settings["CONFIG.PSU__USE__IRQ0"] == "1"
    ports = memory_ports()
    for number, port in enumerate(("HPC0", "HPC1", "HP0", "HP1", "HP2", "HP3")):
        used = settings[f"CONFIG.PSU__USE__S_AXI_GP{number}"]
        assert used == str(int(port in ports))
        assert settings.get(f"CONFIG.PSU__SAXIGP{number}__DATA_WIDTH") == (
            "128" if port in ports else None
        )

    # every master of the kernel goes through a smartconnect and a shutdown manager to its port
    wires = [tuple(call) for call in with_name(calls, "connect_bd_intf_net")]
    slaves = [b for _, b in wires]
    assert len(set(slaves)) == len(slaves)
    masters = [a for a, _ in wires]
    assert len(set(masters)) == len(masters)
    assert {a for a in masters if a.startswith("kgrc_run_0/")} == {
        f"kgrc_run_0/m_axi_{bundle}" for bundle in BUNDLES.values()
    }
    for port, memory in ports.items():
        join, manager = f"smartconnect_{port}", f"shutdown_{port}"
        assert cells[manager] == MANAGER.replace(":1.0", ":1.10")
        assert (f"{join}/M00_AXI", f"{manager}/S_AXI") in wires
        assert (f"{manager}/M_AXI", f"ps/S_AXI_{port}_FPD") in wires
        joined = {a for a, b in wires if b.startswith(f"{join}/S")}
        assert joined == {f"kgrc_run_0/m_axi_{BUNDLES[each]}" for each in memory}
        assert settings_of(join) == {
            "CONFIG.NUM_SI": str(len(joined)),
            "CONFIG.NUM_MI": "1",
            "CONFIG.NUM_CLKS": "2",
        }
        found = settings_of(manager)
        assert (found["CONFIG.RP_IS_MASTER"], found["CONFIG.CTRL_INTERFACE_TYPE"]) == ("true", "1")
        assert found["CONFIG.DP_AXI_DATA_WIDTH"] == "128"
    control = {b for a, b in wires if a.startswith("smartconnect_control/M")}
    assert control == {
        *("kgrc_run_0/s_axi_control", "axi_intc_0/s_axi"),
        *(f"shutdown_{port}/S_AXI_CTRL" for port in ports),
    }
    assert settings_of("smartconnect_control")["CONFIG.NUM_MI"] == str(len(control))

    nets = {tuple(call) for call in with_name(calls, "connect_bd_net")}
    assert nets >= {
        ("kgrc_run_0/interrupt", "xlconcat_0/In0"),
        ("xlconcat_0/dout", "axi_intc_0/intr"),
        ("axi_intc_0/irq", "ps/pl_ps_irq0"),
    }
    driven = [b for _, b in nets]
    assert len(set(driven)) == len(driven), "a pin has one clock"
    clock = {b: a for a, b in nets if a.startswith("ps/pl_clk")}
    reset = {b: a for a, b in nets if a.endswith("/peripheral_aresetn")}
    kernel, port_clock = "ps/pl_clk0", "ps/pl_clk1"
    for cell in ("kgrc_run_0/ap_clk", "axi_intc_0/s_axi_aclk", "ps/maxihpm0_fpd_aclk"):
        assert clock[cell] == kernel
    assert (clock["reset/slowest_sync_clk"], clock["reset_ports/slowest_sync_clk"]) == (
        kernel,
        port_clock,
    )
    for join in (cell for cell in cells if cell.startswith("smartconnect")):
        assert (clock[f"{join}/aclk"], clock[f"{join}/aclk1"]) == (kernel, port_clock)
        assert reset[f"{join}/aresetn"] == "reset/peripheral_aresetn"
    for port in ports:
        assert clock[f"shutdown_{port}/clk"] == port_clock
        assert clock[f"ps/saxi{port.lower()}_fpd_aclk"] == port_clock
        assert reset[f"shutdown_{port}/resetn"] == "reset_ports/peripheral_aresetn"
    for pin in ("kgrc_run_0/ap_rst_n", "axi_intc_0/s_axi_aresetn"):
        assert reset[pin] == "reset/peripheral_aresetn"
    assert {b for a, b in nets if a == "ps/pl_resetn0"} == {
        *("reset/ext_reset_in", "reset_ports/ext_reset_in")
    }
    places = [c[1:] for c in calls if c[0] == "assign_bd_address"]
    assert [place[1] for place in places[:2]] == ["0xA0000000", "0xA0010000"]
    assert len({place[1] for place in places[:-1]}) == len(control)
    assert places[-1] == []

    order = [
        *("create_project", "create_bd_design", "assign_bd_address", "validate_bd_design"),
        *("make_wrapper", "launch_runs", "wait_on_run", "open_run", "report_utilization"),
        "report_timing_summary",
    ]
    names = [call[0] for call in calls]
    last = [len(names) - 1 - names[::-1].index(name) for name in order]
    assert last == sorted(last)
    assert with_name(calls, "wait_on_run") == [["-timeout", "1200", "impl_1"]]
    assert with_name(calls, "launch_runs")[0][-2:] == ["-jobs", "3"]
    assert (build / "kgrc.bit").read_text() == "bits\n"
    assert (build / "kgrc.hwh").read_text() == handoff() + "\n"


@needs_tclsh
@pytest.mark.parametrize("name", BOARDS)
def test_the_board_part_and_its_preset_are_those_of_the_board(tools, tmp_path, monkeypatch, name):
    for setting, value in build_settings(preset("8-sparse"), board(name)).items():
        monkeypatch.setenv(setting, value)
    (tmp_path / "build/ip").mkdir(parents=True)
    done = source(HLS / "scripts/overlay.tcl", tmp_path / "build", tmp_path / "stub.tcl")
    assert (done.returncode, done.stderr) == (0, "")
    calls = calls_of(tools)
    assert with_name(calls, "create_project")[0][-1] == board(name).part
    (part,) = (call[1] for call in with_name(calls, "set_property") if call[0] == "board_part")
    assert part in BOARD_PARTS.split()
    assert part.lower().startswith(f"{board(name).board_part}:")
    (automation,) = with_name(calls, "apply_bd_automation")
    assert "apply_board_preset 1" in automation
    assert not with_name(calls, "set_param"), "the store is looked into where the part is missing"


@needs_tclsh
@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("nothing", ""),
        ("board", "no board files of zcu102"),
        ("dfx_axi_shutdown_manager", "no xilinx.com:ip:dfx_axi_shutdown_manager in the catalogue"),
    ],
)
def test_vivado_is_asked_for_all_that_a_build_needs_first(
    tools, tmp_path, monkeypatch, lacks, says
):
    monkeypatch.setenv("STUB_LACKS", lacks)
    monkeypatch.setenv("KGRC_STEP", "look")
    done = source(HLS / "scripts/overlay.tcl", tmp_path / "build", tmp_path / "stub.tcl")
    assert (done.returncode == 0) == (lacks == "nothing")
    assert says in done.stderr
    assert bool(with_name(calls_of(tools), "set_param")) == (lacks == "board")
    kinds = {call[-1] for call in with_name(calls_of(tools), "get_ipdefs")}
    assert not with_name(calls_of(tools), "create_bd_design")
    if lacks == "nothing":
        text = (HLS / "scripts/overlay.tcl").read_text()
        used = set(re.findall(r"make_cell \S+ (xilinx\.com:ip:\w+)", text))
        assert kinds == {f"{kind}:*" for kind in used}


@needs_tclsh
@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("KGRC_PORTS", "HP0 {nothing}", "top.cpp has no m_axi interface for nothing"),
        ("KGRC_PORTS", "", "KGRC_PORTS is not set"),
        ("STUB_LACKS", "board", "no board files of zcu102"),
        ("STUB_LACKS", "axi_intc", "no xilinx.com:ip:axi_intc in the catalogue"),
        ("STUB_LACKS", "memory", "does not reach all memory"),
        ("STUB_LACKS", "progress", "no bitstream"),
        ("STUB_SLACK", "-0.2", "at 150 MHz (kernel) and 300 MHz (memory ports): WNS is -0.2"),
        ("KGRC_PART", None, "KGRC_PART is not set"),
        ("KGRC_BOARD_PART", "xilinx.com:zcu", "no board files of zcu102 (xilinx.com:zcu)"),
    ],
)
def test_what_fails_makes_no_bitstream(tools, tmp_path, monkeypatch, setting, value, says):
    if value is None:
        monkeypatch.delenv(setting)
    else:
        monkeypatch.setenv(setting, value)
    done = source(HLS / "scripts/overlay.tcl", tmp_path / "build", tmp_path / "stub.tcl")
    assert done.returncode != 0
    assert says in done.stderr
    assert not (tmp_path / "build/kgrc.bit").exists()


@needs_tclsh
@pytest.mark.parametrize("name", ["hls.tcl", "overlay.tcl"])
@pytest.mark.parametrize(
    ("old", "new"), [("exit", "exit}"), ("return $::env", "return [$::env"), ("create_", "creat_")]
)
def test_an_error_of_syntax_is_seen(tools, tmp_path, monkeypatch, name, old, new):
    if name == "hls.tcl":
        monkeypatch.setenv("KGRC_STEP", "synthesize")
    text = (HLS / "scripts" / name).read_text()
    (tmp_path / name).write_text(new.join(text.rsplit(old, 1)))
    done = source(tmp_path / name, tmp_path / "build", tmp_path / "stub.tcl")
    assert done.returncode != 0


# ---- from sources to an overlay, with stubs for the tools ----------------------------------------


@pytest.fixture
def road(tools, tmp_path):
    """Runs make to an overlay with stubs for the tools."""
    stub = f"tclsh {tmp_path / 'stub.tcl'}"

    def run(*targets, **variables):
        settings = {"HLS": stub, "VIVADO": stub, "CXXFLAGS": "-O0"}
        folders = {"BUILD": tmp_path / "build", "OVERLAYS": tmp_path / "overlays"}
        return make(*targets, **{**settings, **folders, **variables})

    return run


@needs_tclsh
@needs_make
def test_make_goes_from_sources_to_an_overlay_once(road, tools, tmp_path):
    # the repository has manifests of designs that nobody has built; they may be newer than sources
    write_manifests(tmp_path / "overlays")
    done = road("4-sparse")
    assert done.returncode == 0, done.stdout + done.stderr
    overlay = read_overlay(tmp_path / "overlays/4-sparse")
    overlay.check_files()
    manifest = overlay.manifest
    assert manifest.config == preset("4-sparse")
    assert (manifest.clock_mhz, manifest.board) == (150, "zcu102")
    assert (manifest.port_clock_mhz, manifest.setup_slack_ns) == (300, 0.412)
    assert manifest.tool == "Vitis HLS 2022.1, Vivado 2022.1"
    assert manifest.cosimulated
    assert manifest.loops["multiply/flattened"] == 1
    page = (tmp_path / "overlays/4-sparse/report.md").read_text()
    assert "| multiply/flattened | 1 | 1 |" in page
    assert "- worst slack after placement and routing: 0.412 ns (setup)" in page
    assert "- co-simulation: passed" in page
    assert re.search(r"^\| dsp \| \d+ \| 1 \| 1648 \|", page, re.MULTILINE)
    assert (tmp_path / "build/4-sparse/config.h").read_text() == header.config_header(
        preset("4-sparse")
    )
    calls = calls_of(tools)
    assert with_name(calls, "set_part") == [[board("zcu102").part]]
    names = [call[0] for call in calls]
    once = [name for name in names if name in ("csynth_design", "cosim_design", "export_design")]
    assert once == ["csynth_design", "cosim_design", "export_design"]
    assert names.index("get_ipdefs") < names.index("csynth_design"), "Vivado is looked at first"
    # again: nothing is built, and the manifest of a built design is kept
    write_manifests(tmp_path / "overlays")
    assert road("4-sparse").returncode == 0
    assert calls_of(tools) == calls
    # another bitstream without another synthesis
    (tmp_path / "build/4-sparse/ip/component.xml").touch()
    assert road("4-sparse").returncode == 0
    names = [call[0] for call in calls_of(tools)[len(calls) :]]
    assert "launch_runs" in names
    assert "csynth_design" not in names
    assert road("clean").returncode == 0
    assert not (tmp_path / "build").exists()
    overlay.check_files()


@needs_tclsh
@needs_make
def test_overlays_of_one_design_for_two_boards_stay_apart(road, tools, tmp_path):
    """Without the C-simulation: the compiler is a stub, too."""
    (tmp_path / "cxx").write_text('#!/bin/sh\nfor last; do :; done\ncp /bin/true "$last"\n')
    (tmp_path / "cxx").chmod(0o755)
    write_manifests(tmp_path / "overlays")
    before = (tmp_path / "overlays/8-kv260/manifest.json").read_bytes()
    done = road("quick-8-kv260", BOARD="zcu104", CXX=tmp_path / "cxx")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = overlay_name("8-kv260", board("zcu104"))
    assert [path.name for path in (tmp_path / "build").iterdir()] == [folder]
    overlay = read_overlay(tmp_path / "overlays" / folder)
    assert (overlay.manifest.board, overlay.manifest.config) == ("zcu104", preset("8-kv260"))
    page = (overlay.folder / "report.md").read_text()
    assert "- memories in UltraRAM: region, memory ports" in page
    assert page in done.stdout, "the report is shown at the end"
    calls = calls_of(tools)
    assert with_name(calls, "set_part") == [[board("zcu104").part]]
    assert ["board_part", "xilinx.com:zcu104:part0:1.1", ""] in with_name(calls, "set_property")
    assert (tmp_path / "overlays/8-kv260/manifest.json").read_bytes() == before
    with pytest.raises(ConfigError, match="no board named 'zcu999'"):
        print_settings(["--design", "8-kv260", "--board", "zcu999"])


@needs_make
def test_the_makefile_knows_the_board_of_a_design(tmp_path):
    rules = tmp_path / "rules.mk"
    rules.write_text(
        f"include {HLS / 'Makefile'}\nshow:\n\t@echo $(foreach each,$(DESIGNS),"
        "$(call folder,$(each)):$(call target,$(each)):$(call design,$(call folder,$(each))))\n"
    )
    for name in ("", *BOARDS):
        command = ["make", "-s", "-C", str(HLS), "-f", str(rules), "show", f"BOARD={name}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        wanted = []
        for design in PRESETS:
            target = board(name) if name else board_of_design(design)
            wanted.append(f"{overlay_name(design, target)}:{target.name}:{design}")
        assert done.stdout.split() == wanted, done.stderr


@needs_tclsh
@needs_make
def test_quick_leaves_out_the_cosimulation_until_it_is_asked_for(road, tools, tmp_path):
    done = road("quick-4-dense")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [call[0] for call in calls_of(tools)]
    assert "cosim_design" not in names
    assert not read_overlay(tmp_path / "overlays/4-dense").manifest.cosimulated
    assert "- co-simulation: not run" in (tmp_path / "overlays/4-dense/report.md").read_text()
    assert road("4-dense").returncode == 0
    more = [call[0] for call in calls_of(tools)][len(names) :]
    assert [name for name in more if name.endswith("_design")] == ["cosim_design"]
    assert read_overlay(tmp_path / "overlays/4-dense").manifest.cosimulated


@needs_tclsh
@needs_make
@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        (
            *("STUB_REPORT", "<flattened><Name>flattened</Name><TripCount>undef</TripCount>"),
            *("<PipelineII>1<", "multiply/flattened: II = 2, II = 1 was asked for"),
        ),
        ("STUB_TIMING", "0.412", "-0.003", r"worst slack of setup \(WNS\) is -0.003 ns"),
        ("STUB_TIMING", "0.011", "-0.003", r"worst slack of hold \(WHS\) is -0.003 ns"),
    ],
)
def test_a_build_that_would_be_slow_or_wrong_is_refused(
    road, tools, tmp_path, monkeypatch, name, old, new, says
):
    text = {"STUB_REPORT": REPORT, "STUB_TIMING": TIMING}[name]
    if name == "STUB_REPORT":
        old, new = old + new, old + "<PipelineII>2<"
    assert old in text
    monkeypatch.setenv(name, text.replace(old, new))
    done = road("4-dense")
    assert done.returncode != 0
    assert re.search(says, done.stderr), done.stderr
    assert not (tmp_path / "overlays").exists()
    # an II is seen before the hours of co-simulation, placement and routing
    names = [call[0] for call in calls_of(tools)]
    assert ("cosim_design" in names) == ("launch_runs" in names) == (name == "STUB_TIMING")


@needs_tclsh
@needs_make
@pytest.mark.parametrize("tool", ["HLS", "VIVADO", "CXX", "PYTHON"])
def test_every_tool_is_looked_for_before_the_first_one_runs(road, tools, tmp_path, tool):
    if tool != "PYTHON":
        done = road("4-dense", **{tool: "no-such-tool -x"})
        found = "no-such-tool"
    else:  # config.h is made by Python, before the tools are needed
        done = road("4-dense", PYTHON="no-such-tool")
        found = r"no-such-tool pynq_kgrc\(Python\)"
    said = rf"^not found: {found}\. .*settings64\.sh.* board files .* licence"
    assert re.search(said, done.stdout, re.MULTILINE)
    assert done.returncode != 0
    assert not tools.exists(), "a tool has run"


@needs_tclsh
@needs_make
def test_a_design_from_a_file_is_built(road, tools, tmp_path):
    config = replace(preset("8-zcu102"), name="mine", pf=10)
    write_design(config, tmp_path / "mine.json")
    done = road("mine", "DESIGNS=mine", f"FILE={tmp_path / 'mine.json'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_overlay(tmp_path / "overlays/mine").manifest.config == config


@needs_tclsh
@needs_make
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (handoff([n for n in REGISTERS if n != "weights0_2"]), "no register weights0_2"),
        (handoff().replace(VLNV, "xilinx.com:hls:kgrc_run:1.0"), f"no {VLNV}"),
        ("<EDKSYSTEM>", "no .hwh"),
        (handoff().replace(f'<MODULE VLNV="{MANAGER}"/>', "", 1), f"of {MANAGER}, one for each of"),
    ],
)
def test_an_overlay_that_the_driver_would_refuse_is_not_made(
    road, tmp_path, monkeypatch, text, says
):
    monkeypatch.setenv("STUB_HANDOFF", text)
    done = road("4-dense")
    assert done.returncode != 0
    assert says in done.stderr
    assert not (tmp_path / "overlays").exists()
