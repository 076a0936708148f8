"""Reports of Vitis HLS and Vivado about a design, held against the sources and our estimate.

``python -m pynq_kgrc.accelerator.reports hls_src/build/8-sparse/reports --design 8-sparse``

With ``--check`` the exit status is 1 if a loop has a larger initiation interval (II) than its
pragma in hls_src asks for, or if the clock is not met.

The readers expect csynth.xml (Vitis HLS 2020.2 and later) and the text files of Vivado's
report_utilization and report_timing_summary. They were never tried on reports of our own designs:
neither tool was available here.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec

from pynq_kgrc.accelerator.boards import board, board_of_design
from pynq_kgrc.accelerator.config import read_design
from pynq_kgrc.accelerator.resources import estimate_resources
from pynq_kgrc.errors import ConfigError

SYNTHESIS, UTILIZATION, TIMING = "csynth.xml", "utilization.rpt", "timing.rpt"
"""Names of the reports in the folder that hls_src/Makefile fills."""

Asked = dict[tuple[str, str], int]
"""(function, label) of a loop -> the II that its pragma asks for."""


class Loop(msgspec.Struct, frozen=True):
    """The schedule of a loop; None where the tool gives no number."""

    module: str
    name: str
    trips: tuple[int, int] | None
    """Fewest and most."""
    ii: int | None
    """Achieved initiation interval in cycles; None if the loop is not pipelined."""
    depth: int | None
    """Pipeline depth in cycles: the latency of one trip."""


class ChipResources(msgspec.Struct, frozen=True):
    """Amounts of a chip's resources; None where the amount is not known."""

    dsp: float | None = None
    bram36: float | None = None
    """Block RAMs of 36 kbit; half of one counts 0.5."""
    uram: float | None = None
    lut: float | None = None
    ff: float | None = None


RESOURCES = ChipResources.__struct_fields__
"""Names of the resources."""


class Synthesis(msgspec.Struct, frozen=True):
    """A report of Vitis HLS; its resources and clock are estimates before placement."""

    version: str
    part: str
    top: str
    target_ns: float
    estimated_ns: float
    latency: tuple[int, int] | None
    """Fewest and most cycles; None if loops depend on data, as those of our design do."""
    loops: tuple[Loop, ...]
    resources: ChipResources


class TimingSummary(msgspec.Struct, frozen=True):
    """Worst slacks of a placed design in ns."""

    setup_ns: float
    hold_ns: float
    met: bool
    """Whether neither slack is negative."""


class Comparison(msgspec.Struct, frozen=True):
    """One resource: our estimate and what the tools report; None where there is no number."""

    resource: str
    estimated: float | None
    synthesized: float | None
    placed: float | None
    error: float | None
    """Relative error of the estimate against `placed`, or else against `synthesized`."""


class PipelinedLoop(msgspec.Struct, frozen=True):
    """A loop that the sources pipeline, or that the tool pipelined by itself."""

    name: str
    """`module/label` of the report; `function/label` of the sources if the report lacks it."""
    asked: int | None
    """II of the pragma; None if there is none."""
    reached: int | None
    """II of the report; None if the report lacks the loop, or it is not pipelined."""
    found: bool
    """Whether the report has the loop."""

    @property
    def fault(self) -> str:
        """Why a build with this loop is refused; "" if it is not."""
        if self.asked is None or not self.found:
            return ""
        if self.reached is None:
            return f"{self.name}: not pipelined, II = {self.asked} was asked for"
        if self.reached > self.asked:
            return f"{self.name}: II = {self.reached}, II = {self.asked} was asked for"
        return ""


class ReportSummary(msgspec.Struct, frozen=True):
    """The reports of a design and the comparison; ``--json`` prints it."""

    synthesis: Synthesis | None
    timing: TimingSummary | None
    resources: list[Comparison]


def read_synthesis(path: Path) -> Synthesis:
    """Read the csynth.xml of Vitis HLS.

    Raises:
        ConfigError: the file is damaged or lacks a field; the message names both.
    """
    try:
        root = ElementTree.fromstring(_read(path))
    except ElementTree.ParseError as error:
        raise ConfigError(f"{path}: not XML: {error}") from error
    top = _text(path, root, "UserAssignments/TopModelName")
    area = "AreaEstimates/Resources"
    dsp = "DSP" if root.find(f"{area}/DSP") is not None else "DSP48E"
    resources = ChipResources(
        dsp=_number(path, root, f"{area}/{dsp}"),
        bram36=_number(path, root, f"{area}/BRAM_18K") / 2,
        uram=_number(path, root, f"{area}/URAM"),
        lut=_number(path, root, f"{area}/LUT"),
        ff=_number(path, root, f"{area}/FF"),
    )
    overall = "PerformanceEstimates/SummaryOfOverallLatency"
    bounds = [
        _count(path, root, f"{overall}/{side}-caseLatency", needed=True)
        for side in ("Best", "Worst")
    ]
    return Synthesis(
        version=_text(path, root, "ReportVersion/Version"),
        part=_text(path, root, "UserAssignments/Part"),
        top=top,
        target_ns=_number(path, root, "UserAssignments/TargetClockPeriod"),
        estimated_ns=_number(
            path, root, "PerformanceEstimates/SummaryOfTimingAnalysis/EstimatedClockPeriod"
        ),
        latency=_pair(*bounds),
        loops=tuple(_loops(path, root, top)),
        resources=resources,
    )


def _loops(path: Path, root: ElementTree.Element, top: str) -> Iterator[Loop]:
    """The loops of the top function and of its modules; an inner loop follows its outer one."""
    modules = [(top, root)]
    for module in root.iterfind("ModuleInformation/Module"):
        modules.append((_text(path, module, "Name"), module))
    for name, module in modules:
        summary = module.find("PerformanceEstimates/SummaryOfLoopLatency")
        for loop in () if summary is None else summary.iter():
            if loop.find("TripCount") is None and loop.find("PipelineII") is None:
                continue
            trips = _count(path, loop, "TripCount")
            lowest = _count(path, loop, "TripCount/range/min")
            highest = _count(path, loop, "TripCount/range/max")
            yield Loop(
                module=name,
                name=loop.findtext("Name", loop.tag).strip(),
                trips=_pair(lowest, highest) if trips is None else (trips, trips),
                ii=_count(path, loop, "PipelineII"),
                depth=_count(path, loop, "PipelineDepth"),
            )


_SITE_PATTERNS = {
    "lut": r"(?:CLB|Slice) LUTs\*?",
    "ff": r"(?:CLB|Slice) Registers",
    "bram36": r"Block RAM Tile",
    "uram": r"URAM",
    "dsp": r"DSPs",
}


def read_utilization(path: Path) -> ChipResources:
    """Read the used sites of Vivado's report_utilization.

    A chip without UltraRAM has no row for it: that counts as 0.

    Raises:
        ConfigError: the file lacks another row or its number; the message names both.
    """
    text = _read(path)
    found: dict[str, float] = {}
    for name, site in _SITE_PATTERNS.items():
        row = re.search(rf"^\|\s*{site}\s*\|\s*([^|\s]*)\s*\|", text, re.MULTILINE)
        if row is None and name == "uram":
            found[name] = 0.0
            continue
        label = site.replace(r"\*?", "")
        if row is None:
            raise ConfigError(f"{path}: no row {label}; is it a report of report_utilization?")
        found[name] = _as_number(path, label, row[1])
    return ChipResources(**found)


def read_timing(path: Path) -> TimingSummary:
    """Read the worst slacks of Vivado's report_timing_summary.

    Raises:
        ConfigError: no summary, or a slack is not a number (a design without clock).
    """
    lines = _read(path).splitlines()
    for number, line in enumerate(lines):
        # two or more blanks separate the columns
        names = re.split(r"\s{2,}", line.strip())
        if names[0] != "WNS(ns)" or "WHS(ns)" not in names:
            continue
        values = lines[number + 2].split() if number + 2 < len(lines) else []
        slacks = dict(zip(names, values, strict=False))
        setup, hold = (
            _as_number(path, name, slacks.get(name, "nothing")) for name in ("WNS(ns)", "WHS(ns)")
        )
        return TimingSummary(setup, hold, met=setup >= 0 and hold >= 0)
    raise ConfigError(f"{path}: no Design Timing Summary with WNS(ns) and WHS(ns)")


def read_asked(sources: Path, header: Path) -> Asked:
    """The II that each pipelined loop of the HLS sources asks for.

    Args:
        sources: the folder hls_src.
        header: config.h of the design; an II may be one of its constants.

    Raises:
        ConfigError: a file cannot be read, a pragma belongs to no loop with a label, or its II is
            neither a number nor in config.h; names file and line.
    """
    constants = dict(re.findall(r"\b(k\w+) = (\d+),", _read(header)))
    found: Asked = {}
    for path in sorted(sources.glob("*.cpp")):
        function = label = ""
        for number, line in enumerate(_read(path).splitlines(), 1):
            if begins := re.match(r"[A-Za-z].*?\b(\w+)\(", line):
                function, label = begins[1], ""
            elif begins := re.match(r"\s*(\w+):$", line):
                label = begins[1]
            elif pragma := re.match(r"\s*#\s*pragma\s+HLS\s+PIPELINE\b(.*)", line):
                asked = re.search(r"\bII\s*=\s*(\w+)", pragma[1])
                text = str(constants.get(asked[1], asked[1])) if asked else "nothing"
                if not (function and label and text.isdecimal()):
                    raise ConfigError(
                        f"{path}:{number}: PIPELINE with II = {text} in the loop "
                        f"{label or 'without label'}; accepted are a number or a constant of "
                        f"{header}, in a loop with a label"
                    )
                found[function, label] = int(text)
    if not found:
        raise ConfigError(f"{sources}: no .cpp with a PIPELINE pragma; is it the folder hls_src?")
    return found


def pipelined_loops(synthesis: Synthesis, asked: Asked) -> list[PipelinedLoop]:
    """The loops of a report beside those of the sources; loops of the sources only come last.

    Vitis HLS names a loop by its label, and a nest that it has flattened by the labels joined with
    `_`. A module is named after the function, with more behind it. The loops of a function that is
    inlined lie in the module of its caller.
    """
    rows, left = [], dict(asked)

    def belongs(module: str, function: str) -> bool:
        return f"{module}_".startswith(f"{function}_")

    inlined = {
        function
        for function, _ in asked
        if not any(belongs(loop.module, function) for loop in synthesis.loops)
    }
    for loop in synthesis.loops:
        named = [place for place in asked if f"_{loop.name}".endswith(f"_{place[1]}")]
        places = [place for place in named if belongs(loop.module, place[0])]
        places = places or [place for place in named if place[0] in inlined]
        # the longest label, as region_words also ends in words; of several the least II
        place = max(places, key=lambda place: (len(place[1]), -asked[place]), default=None)
        if place is not None:
            left.pop(place, None)
        if place is not None or loop.ii is not None:
            wanted = None if place is None else asked[place]
            rows.append(PipelinedLoop(f"{loop.module}/{loop.name}", wanted, loop.ii, True))
    for (function, label), wanted in left.items():
        rows.append(PipelinedLoop(f"{function}/{label}", wanted, None, False))
    return rows


def check_build(
    loops: Sequence[PipelinedLoop] = (),
    timing: TimingSummary | None = None,
) -> None:
    """Refuse a build that would not run as modelled. What is not given is not checked.

    Raises:
        ConfigError: a loop has a larger II than asked for or is not pipelined, the report has none
            of the loops of the sources, or a slack is negative; the message lists all faults.
    """
    faults = [loop.fault for loop in loops if loop.fault]
    if loops and not any(loop.found and loop.asked is not None for loop in loops):
        faults.append("the report has none of the loops that the sources pipeline")
    for kind, slack in (
        ()
        if timing is None
        else (
            ("setup (WNS)", timing.setup_ns),
            ("hold (WHS)", timing.hold_ns),
        )
    ):
        if slack < 0:
            faults.append(f"the clock is not met: the worst slack of {kind} is {slack:g} ns")
    if faults:
        raise ConfigError("the build is refused:\n  " + "\n  ".join(faults))


def compare(
    estimate: ChipResources,
    synthesized: ChipResources | None = None,
    placed: ChipResources | None = None,
) -> list[Comparison]:
    """Our estimate beside the reports of synthesis and of placement, resource by resource."""
    rows = []
    for name in RESOURCES:
        estimated, after_synthesis, after_placement = (
            None if amounts is None else getattr(amounts, name)
            for amounts in (estimate, synthesized, placed)
        )
        latest = after_synthesis if after_placement is None else after_placement
        error = None if estimated is None or not latest else estimated / latest - 1
        rows.append(Comparison(name, estimated, after_synthesis, after_placement, error))
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _text(path: Path, element: ElementTree.Element, field: str) -> str:
    text = (element.findtext(field) or "").strip()
    if not text:
        raise ConfigError(f"{path}: no {field}; is it a csynth.xml of Vitis HLS?")
    return text


def _as_number(path: Path, field: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{path}: {field} is {text!r}, not a number")
    return value


def _number(path: Path, element: ElementTree.Element, field: str) -> float:
    return _as_number(path, field, _text(path, element, field))


def _count(
    path: Path, element: ElementTree.Element, field: str, needed: bool = False
) -> int | None:
    """A whole number of 0 or more; None where the tool prints "undef" or the like."""
    text = (element.findtext(field) or "").strip()
    if needed:
        text = _text(path, element, field)
    if text in ("", "undef", "?", "-"):
        return None
    value = _as_number(path, field, text)
    if value < 0 or value % 1:
        raise ConfigError(f"{path}: {field} is {text!r}, not a count")
    return int(value)


def _pair(low: int | None, high: int | None) -> tuple[int, int] | None:
    return None if low is None or high is None else (low, high)


def build_report(
    title: str,
    synthesis: Synthesis,
    loops: Sequence[PipelinedLoop],
    resources: Sequence[Comparison],
    timing: TimingSummary | None,
    facts: Sequence[str] = (),
) -> str:
    """The reports of a build as a page of Markdown; it is kept beside the manifest.

    Args:
        title: the page's title.
        synthesis: the report of Vitis HLS.
        loops: see `pipelined_loops`.
        resources: see `compare`.
        timing: the slacks after placement and routing.
        facts: further lines for the list at the top.
    """
    lines = [f"# {title}", ""]
    lines += [f"- {fact}" for fact in facts]
    lines.append(
        f"- clock: {synthesis.target_ns:g} ns asked for, {synthesis.estimated_ns:g} ns estimated "
        f"by Vitis HLS {synthesis.version} before placement"
    )
    if timing is not None:
        lines.append(
            f"- worst slack after placement and routing: {timing.setup_ns:g} ns (setup), "
            f"{timing.hold_ns:g} ns (hold); {'met' if timing.met else 'NOT met'}"
        )
    lines += ["", "## Resources", "", "| | modelled | synthesized | placed | model's error |"]
    lines += ["|---|---|---|---|---|"]
    for row in resources:
        error = "-" if row.error is None else f"{row.error:+.1%}"
        numbers = (_cell(n) for n in (row.estimated, row.synthesized, row.placed))
        lines.append(f"| {' | '.join((row.resource, *numbers, error))} |")
    lines += ["", "## Initiation intervals", "", "As Vitis HLS reports them after synthesis.", ""]
    lines += ["| loop | asked for | reached |", "|---|---|---|"]
    for loop in loops:
        reached = _cell(loop.reached) if loop.found else "not in the report"
        lines.append(f"| {loop.name} | {_cell(loop.asked)} | {reached} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _parse_estimate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in RESOURCES:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not a resource; there are {', '.join(RESOURCES)}"
        )
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{value!r} of {name} is not a number; use the form {name}=1642"
        ) from None


def _lines(summary: ReportSummary) -> Iterator[str]:
    """The summary as text."""
    synthesis, timing = summary.synthesis, summary.timing
    if synthesis is not None:
        yield (
            f"{synthesis.top} on {synthesis.part}, Vitis HLS {synthesis.version}: clock "
            f"{synthesis.estimated_ns:g} ns estimated, {synthesis.target_ns:g} ns required"
        )
        for loop in synthesis.loops:
            if loop.ii is not None:
                yield f"  II = {loop.ii:<3} {loop.module}/{loop.name}"
    if timing is not None:
        yield (
            f"timing {'met' if timing.met else 'NOT met'}: worst slack {timing.setup_ns:g} ns "
            f"(setup), {timing.hold_ns:g} ns (hold)"
        )
    yield f"{'':8} {'estimated':>10} {'synthesized':>12} {'placed':>10} {'difference':>11}"
    for row in summary.resources:
        numbers = (row.estimated, row.synthesized, row.placed)
        a, b, c = map(_cell, numbers)
        error = "-" if row.error is None else f"{row.error:+.1%}"
        yield f"{row.resource:8} {a:>10} {b:>12} {c:>10} {error:>11}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the reports of a folder beside an estimate; missing reports are left out."""
    parser = argparse.ArgumentParser(
        prog="python -m pynq_kgrc.accelerator.reports",
        description=f"Compare {SYNTHESIS}, {UTILIZATION} and {TIMING} with a resource estimate.",
    )
    parser.add_argument(
        "folder", type=Path, help="folder of the reports, such as hls_src/build/8-sparse/reports"
    )
    parser.add_argument(
        "--design",
        help="the design whose resources to estimate (resources.py): the name of a preset, or a "
        ".json that explore -o wrote",
    )
    parser.add_argument(
        "--board",
        help="the board whose memories the estimate counts; default the board of the design",
    )
    parser.add_argument(
        "--estimate",
        type=_parse_estimate,
        nargs="*",
        default=[],
        metavar="NAME=NUMBER",
        help=f"your own estimate of {', '.join(RESOURCES)}",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="HLS_SRC",
        help="fail if a loop has a larger II than these sources ask for, or the clock is not met; "
        "config.h of the design lies beside the folder of the reports",
    )
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.folder
    paths = [folder / name for name in (SYNTHESIS, UTILIZATION, TIMING)]
    if not any(path.is_file() for path in paths):
        raise ConfigError(f"{folder}: there is none of {', '.join(path.name for path in paths)}")
    synthesis = read_synthesis(paths[0]) if paths[0].is_file() else None
    placed = read_utilization(paths[1]) if paths[1].is_file() else None
    timing = read_timing(paths[2]) if paths[2].is_file() else None
    estimate: dict[str, float] = {}
    if chosen.design is not None:
        config = read_design(chosen.design)
        target = board(chosen.board) if chosen.board else board_of_design(config.name)
        estimate = asdict(estimate_resources(config, target))
    rows = compare(
        ChipResources(**(estimate | dict(chosen.estimate))),
        None if synthesis is None else synthesis.resources,
        placed,
    )
    summary = ReportSummary(synthesis, timing, rows)
    if chosen.json:
        print(msgspec.json.format(msgspec.json.encode(summary), indent=2).decode())
    else:
        for line in _lines(summary):
            print(line)
    if chosen.check is not None:
        asked = read_asked(chosen.check, folder.parent / "config.h")
        loops = () if synthesis is None else pipelined_loops(synthesis, asked)
        check_build(loops, timing)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(str(error))
