"""Checks of the HLS sources that need no vendor tool.

``python hls_src/checks/check.py hls_src --design 8-zcu102``

Prints a table of the pipelined loops with their loop-carried delay and its budget, and one of the
widest streams; then what the rules refuse: banks named by values, more than two addresses a bank
and trip, delays over budget, divisions in pipelined loops, conditional accesses of memory ports,
streams that are too wide. The exit status is 1 if a rule refuses anything. What II and clock
Vitis HLS reaches is not known by this.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import banks
import delays
import ports
import widths
from ir import CheckError, Unit, compile_unit

from pynq_kgrc.accelerator.config import AcceleratorConfig, read_design
from pynq_kgrc.errors import KgrcError


def fewer_filters(config: AcceleratorConfig) -> AcceleratorConfig:
    """A design with the same loops, lanes and columns, but a small tile: it compiles quickly."""
    step = max(config.gm, config.tn)
    tm = min(config.tm, 2 * step)
    groups = tm // config.gm
    rows = min(config.rows_per_cycle, 2)
    return replace(config, name=f"{config.name}, T_M = {tm}", tm=tm, pm=groups * rows)


def compile_sources(sources: Path, config: AcceleratorConfig, folder: Path) -> Iterator[Unit]:
    """The compiled sources of a folder.

    Raises:
        CheckError: there are none, clang 14 is missing, or it refuses one.
    """
    paths = sorted(path for path in sources.glob("*.cpp") if path.name != "timed.cpp")
    if not paths:
        raise CheckError(f"{sources}: no C++ sources there; name the folder hls_src")
    for path in paths:
        yield compile_unit(sources, path.name, config, folder)


def check_unit(unit: Unit) -> list[str]:
    """The faults of a compiled source."""
    rules = (banks.check_banks, delays.check_delays, delays.check_divisions, ports.check_ports)
    return [fault for rule in rules for fault in rule(unit)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=Path, help="the folder hls_src")
    parser.add_argument("--design", default="8-zcu102", help="a name, or the JSON file of a design")
    parser.add_argument(
        "--whole", action="store_true", help="all filters of the tile: takes minutes"
    )
    parser.add_argument("--paths", action="store_true", help="the operators of each slow loop")
    chosen = parser.parse_args(arguments)
    sources, config = chosen.sources.resolve(), read_design(chosen.design)
    faults = ports.check_requests(sources)
    with tempfile.TemporaryDirectory() as scratch:
        compiled = config if chosen.whole else fewer_filters(config)
        print(f"{'loop':60} {'II':>3} {'delay':>8} {'budget':>8}   (ns; design {compiled.name})")
        for unit in compile_sources(sources, compiled, Path(scratch)):
            for loop in unit.loops:
                found = delays.recurrence(unit, loop)
                print(f"{loop.where:60} {loop.interval:3} {found.delay:8.2f} {found.budget:8.2f}")
                if chosen.paths and found.delay > found.budget:
                    print("\n".join(f"    {line}" for line in found.path))
            faults += check_unit(unit)
        found_widths = widths.stream_widths(sources, config, Path(scratch))
    print(f"\n{'stream':30} {'bits':>6}   (design {config.name}; {widths.MOST_BITS} at most)")
    for name, bits in sorted(found_widths.items(), key=lambda pair: -pair[1])[:8]:
        print(f"{name:30} {bits:6}")
    faults += widths.check_widths(found_widths, config.name)
    print(f"\n{len(faults)} faults")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KgrcError as error:
        sys.exit(str(error))
