"""What Vitis HLS and Vivado report of a design, laid beside what we estimate.

``python -m pynq_kgrc.accelerator.reports hls_src/build/8-sparse/reports --design 8-sparse``

The forms are those of csynth.xml (Vitis HLS 2020.2 and later) and of the texts of Vivado's
report_utilization and report_timing_summary. No report of our own designs was ever read: neither
tool ran here.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pynq_kgrc.accelerator.config import read_design
from pynq_kgrc.accelerator.resources import estimate_resources
from pynq_kgrc.errors import ConfigError

RESOURCES = ("dsp", "bram36", "uram", "lut", "ff")
"""Names of resources; `bram36` counts block RAMs of 36 kbit, halves included."""

SYNTHESIS, UTILIZATION, TIMING = "csynth.xml", "utilization.rpt", "timing.rpt"
"""Names of the reports in the folder that hls_src/Makefile fills."""


@dataclass(frozen=True)
class Loop:
    """A loop as it was scheduled; None is what the tool does not know or does not say."""

    module: str
    name: str
    trips: tuple[int, int] | None
    """Fewest and most."""
    ii: int | None
    """Cycles from one trip to the next that were achieved; None if it is not pipelined."""
    depth: int | None
    """Cycles of one trip of a pipelined loop."""


@dataclass(frozen=True)
class Synthesis:
    """A report of Vitis HLS; resources and clock are its estimates before any placement."""

    version: str
    part: str
    top: str
    target_ns: float
    estimated_ns: float
    latency: tuple[int, int] | None
    """Fewest and most cycles; None where loops depend on data, as ours do."""
    loops: tuple[Loop, ...]
    resources: dict[str, float]


@dataclass(frozen=True)
class TimingSummary:
    """Worst slacks of a placed design, ns, for setup and for hold; negative is not met."""

    setup_ns: float
    hold_ns: float

    @property
    def met(self) -> bool:
        return self.setup_ns >= 0 and self.hold_ns >= 0


@dataclass(frozen=True)
class Comparison:
    """A resource as we estimate it, and as the tools report it; None is not known."""

    resource: str
    estimated: float | None
    synthesized: float | None
    placed: float | None

    @property
    def error(self) -> float | None:
        """The estimate's relative error against the latest report there is."""
        known = self.synthesized if self.placed is None else self.placed
        if self.estimated is None or not known:
            return None
        return self.estimated / known - 1


def read_synthesis(path: Path) -> Synthesis:
    """The csynth.xml of Vitis HLS.

    Raises:
        ConfigError: the file is damaged, or lacks a field; names both.
    """
    try:
        root = ElementTree.fromstring(_read(path))
    except ElementTree.ParseError as error:
        raise ConfigError(f"{path}: no XML: {error}") from error
    top = _text(path, root, "UserAssignments/TopModelName")
    area = "AreaEstimates/Resources"
    dsp = "DSP" if root.find(f"{area}/DSP") is not None else "DSP48E"
    resources = {
        "dsp": _number(path, root, f"{area}/{dsp}"),
        "bram36": _number(path, root, f"{area}/BRAM_18K") / 2,
        "uram": _number(path, root, f"{area}/URAM"),
        "lut": _number(path, root, f"{area}/LUT"),
        "ff": _number(path, root, f"{area}/FF"),
    }
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
    """The loops of the top function and of its modules, inner ones after theirs."""
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


_SITES = {
    "lut": r"(?:CLB|Slice) LUTs\*?",
    "ff": r"(?:CLB|Slice) Registers",
    "bram36": r"Block RAM Tile",
    "uram": r"URAM",
    "dsp": r"DSPs",
}


def read_utilization(path: Path) -> dict[str, float]:
    """The used sites of Vivado's report_utilization, by the names of RESOURCES.

    Raises:
        ConfigError: the file lacks a row or its number; names both. URAM may be missing: chips
            without have no row.
    """
    text = _read(path)
    found: dict[str, float] = {}
    for name, site in _SITES.items():
        row = re.search(rf"^\|\s*{site}\s*\|\s*([^|\s]*)\s*\|", text, re.MULTILINE)
        if row is None and name == "uram":
            found[name] = 0.0
            continue
        label = site.replace(r"\*?", "")
        if row is None:
            raise ConfigError(f"{path}: no row {label}; is it a report of report_utilization?")
        found[name] = _as_number(path, label, row[1])
    return found


def read_timing(path: Path) -> TimingSummary:
    """The worst slacks of Vivado's report_timing_summary.

    Raises:
        ConfigError: the file lacks the summary, or a slack is no number (a design without clock).
    """
    lines = _read(path).splitlines()
    for number, line in enumerate(lines):
        # columns are two blanks or more apart
        names = re.split(r"\s{2,}", line.strip())
        if names[0] != "WNS(ns)" or "WHS(ns)" not in names:
            continue
        values = lines[number + 2].split() if number + 2 < len(lines) else []
        slacks = dict(zip(names, values, strict=False))
        setup, hold = (
            _as_number(path, name, slacks.get(name, "nothing")) for name in ("WNS(ns)", "WHS(ns)")
        )
        return TimingSummary(setup, hold)
    raise ConfigError(f"{path}: no Design Timing Summary with WNS(ns) and WHS(ns)")


def compare(
    estimate: Mapping[str, float],
    synthesized: Mapping[str, float] | None = None,
    placed: Mapping[str, float] | None = None,
) -> list[Comparison]:
    """Our estimate beside the reports, resource by resource.

    Args:
        estimate: any of RESOURCES.
        synthesized: `Synthesis.resources`, or none.
        placed: what `read_utilization` gives, or none.

    Raises:
        ConfigError: an estimate of something that is no resource.
    """
    unknown = [name for name in estimate if name not in RESOURCES]
    if unknown:
        raise ConfigError(f"no resource {', '.join(unknown)}; there are {', '.join(RESOURCES)}")
    return [
        Comparison(
            name, estimate.get(name), (synthesized or {}).get(name), (placed or {}).get(name)
        )
        for name in RESOURCES
    ]


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
    """A whole number; None where the tool writes that it does not know."""
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


def _parse_estimate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like dsp=1642") from None


def _lines(
    synthesis: Synthesis | None, timing: TimingSummary | None, rows: Sequence[Comparison]
) -> Iterator[str]:
    """The report as text."""
    if synthesis is not None:
        yield (
            f"{synthesis.top} on {synthesis.part}, Vitis HLS {synthesis.version}: clock "
            f"{synthesis.estimated_ns:g} ns estimated, {synthesis.target_ns:g} ns wanted"
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
    for row in rows:
        numbers = (row.estimated, row.synthesized, row.placed)
        a, b, c = ("-" if value is None else f"{value:g}" for value in numbers)
        error = "-" if row.error is None else f"{row.error:+.1%}"
        yield f"{row.resource:8} {a:>10} {b:>12} {c:>10} {error:>11}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the reports of a folder beside an estimate; reports that are not there are left out."""
    parser = argparse.ArgumentParser(
        prog="python -m pynq_kgrc.accelerator.reports",
        description=f"Lay {SYNTHESIS}, {UTILIZATION} and {TIMING} beside an estimate.",
    )
    parser.add_argument("folder", type=Path, help="such as hls_src/build/8-sparse/reports")
    parser.add_argument(
        "--design", help="a name, or the JSON file of a design, to be estimated (resources.py)"
    )
    parser.add_argument(
        "--estimate",
        type=_parse_estimate,
        nargs="*",
        default=[],
        metavar="NAME=NUMBER",
        help=f"your own, of {', '.join(RESOURCES)}",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.folder
    paths = [folder / name for name in (SYNTHESIS, UTILIZATION, TIMING)]
    if not any(path.is_file() for path in paths):
        raise ConfigError(f"{folder}: none of {', '.join(path.name for path in paths)} is there")
    synthesis = read_synthesis(paths[0]) if paths[0].is_file() else None
    placed = read_utilization(paths[1]) if paths[1].is_file() else None
    timing = read_timing(paths[2]) if paths[2].is_file() else None
    estimate: dict[str, float] = {}
    if chosen.design is not None:
        estimate = asdict(estimate_resources(read_design(chosen.design)))
    estimate |= dict(chosen.estimate)
    rows = compare(estimate, None if synthesis is None else synthesis.resources, placed)
    if chosen.json:
        found = {
            "synthesis": synthesis and asdict(synthesis),
            "timing": timing and {**asdict(timing), "met": timing.met},
            "resources": [{**asdict(row), "error": row.error} for row in rows],
        }
        print(json.dumps(found, indent=2))
        return
    for line in _lines(synthesis, timing, rows):
        print(line)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(str(error))
