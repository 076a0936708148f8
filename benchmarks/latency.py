"""Latency of the networks of table IV on our designs: published, modelled, simulated.

Compiles each network with each of the paper's recipes for the design of the same array, and for
8-zcu102. The weights are seeded and random: time depends on which are kept, not on their values.
None is so small that its code is 0, as a group of zeros would be left out of the program.
Nothing depends on this computer, and nothing is measured on a board:

- published: table IV of the KGRC paper;
- modelled with memory: `accelerator/latency.py`, for three latencies of memory;
- simulated: the HLS sources with bounded streams and the same memory (`backends/timed.py`), at
  latency 70; needs g++;
- ideal: trips of the slowest process of each task (`accelerator/cost.py`), without memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np
from reports import ROOT

from pynq_kgrc.accelerator.boards import CLOCK_MHZ, LATENCIES, REFERENCE
from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.accelerator.tiling import Work
from pynq_kgrc.compiler.latency import compile_shapes, list_work
from pynq_kgrc.compress.patterns import Rates, prune, recipe
from pynq_kgrc.graph import Graph
from pynq_kgrc.models import NETWORKS

RESULTS = ROOT / "benchmarks" / "results" / "latency.json"
TABLES = ROOT / "host_tests" / "kgrc_tables.json"
PATTERNS = ("dense", "KGR", "KGC", "KGRC")
PUBLISHED_NETWORKS = ("c3d", "r2plus1d_18")
TITLES = {"c3d": "C3D", "r2plus1d_18": "R(2+1)D", "i3d": "I3D"}
OURS = "8-zcu102"
MOST_ERROR = 0.05
HEAD = (
    "| Network | Pruning | Design | published | modelled with memory, latency 40 / 70 / 100 "
    "| simulated | ideal, without memory | whole network, modelled with memory |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass
class Row:
    """Milliseconds of a network on a design: of its convolutions, and of all tasks."""

    network: str
    pattern: str
    design: str
    published: float | None
    """Convolutions, by the paper's design of as many bits."""
    modelled: dict[str, tuple[float, float]] = field(default_factory=dict)
    """With memory, by its latency in cycles."""
    ideal: tuple[float, float] = (0.0, 0.0)
    """Modelled without memory."""
    simulated: tuple[float, float] | None = None
    """At a latency of 70 cycles."""


def rows_to_make() -> Iterator[Row]:
    published = {
        (row["network"], row["sparsity"], row["bits"]): row["latency_ms"]
        for row in json.loads(TABLES.read_text("utf-8"))["table_iv"]
    }
    for network in PUBLISHED_NETWORKS:
        for pattern in PATTERNS:
            kind = "dense" if pattern == "dense" else "sparse"
            for design in (f"16-{kind}", f"8-{kind}", f"4-{kind}", OURS):
                bits = preset(design).bits
                yield Row(network, pattern, design, published[network, pattern, bits])
    yield Row("i3d", "dense", OURS, None)


def traced(network: str) -> Graph:
    """A network with seeded weights."""
    import torch

    from pynq_kgrc.models.trace import trace

    name, build = NETWORKS[network]
    module = import_module(name)
    torch.manual_seed(0)
    return trace(getattr(module, build)(classes=101), module.CLIP, name=network)


def in_ms(works: list[Work], cycles: list[float]) -> tuple[float, float]:
    """The sum over the convolutions, as the paper counts, and over all tasks."""
    convolutions = sum(
        count
        for work, count in zip(works, cycles, strict=True)
        if work.columns and math.prod(work.out_size) > 1
    )
    scale = CLOCK_MHZ * 1e3
    return round(convolutions / scale, 3), round(sum(cycles) / scale, 3)


def model(row: Row, graph: Graph) -> None:
    config = preset(row.design)
    works = [work for _, work in list_work(graph, config, rates_of(row))]
    for latency in LATENCIES:
        memory = replace(REFERENCE, latency=latency)
        times = [task_time(config, work, memory) for work in works]
        row.modelled[f"{latency:g}"] = in_ms(works, [time.cycles for time in times])
        row.ideal = in_ms(works, [time.ideal for time in times])


def rates_of(row: Row) -> dict[str, Rates]:
    return {} if row.pattern == "dense" else recipe(row.network, row.pattern.lower())


def simulate(row: Row, graph: Graph) -> list[tuple[str, float, int]]:
    """The timed simulation of a random clip: name, cycles and modelled cycles of each task.

    Prints the tasks that the model misses.
    """
    from pynq_kgrc.backends.timed import TimedSimulation

    config = preset(row.design)
    program = compile_shapes(prune(graph, rates_of(row), config.group_size), config)
    works = [program.work(task) for task in program.tasks]
    modelled = [work for _, work in list_work(graph, config, rates_of(row))]
    if [work.chunks for work in works] != [work.chunks for work in modelled]:
        raise SystemExit(f"{config.name}: the program has other weights than the modelled one")
    backend = TimedSimulation(config)
    backend.load(program)
    first, bits = program.tasks[0].shape, config.bits
    codes = np.random.default_rng(0).integers(
        -(1 << bits - 1), 1 << bits - 1, (first.channels, *first.in_size)
    )
    backend.write(program.source, codes.astype(program.input.dtype))
    backend.run(0, len(program.tasks))
    cycles = [backend.task_time(number).cycles for number in range(len(program.tasks))]
    row.simulated = in_ms(works, cycles)
    found = []
    for task, work, count in zip(program.tasks, works, cycles, strict=True):
        time = task_time(config, work).cycles
        found.append((task.name, count, time))
        error = time / count - 1
        if count > 0.01 * sum(cycles) and abs(error) > MOST_ERROR:
            print(f"  {task.name}: simulated {count:.0f}, modelled {error:+.1%}", flush=True)
    return found


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of the table of docs/hardware.md."""
    for row in rows:
        published = "" if row.published is None else f"{row.published:.2f}"
        modelled = " / ".join(f"{row.modelled[f'{each:g}'][0]:.1f}" for each in LATENCIES)
        simulated = "" if row.simulated is None else f"{row.simulated[0]:.1f}"
        whole = f"{row.modelled['70'][1]:.1f}"
        pattern = row.pattern.replace("dense", "Dense")
        cells = (TITLES[row.network], pattern, row.design, published, modelled, simulated)
        yield f"| {' | '.join((*cells, f'{row.ideal[0]:.1f}', whole))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=[*PUBLISHED_NETWORKS, "i3d"])
    parser.add_argument("--designs", nargs="+", help="only these designs")
    parser.add_argument("--patterns", nargs="+", help=f"only these of {', '.join(PATTERNS)}")
    parser.add_argument("--simulate", action="store_true", help="run the timed simulation, too")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"default: {RESULTS.name}")
    options = parser.parse_args()
    known: dict[tuple[str, str, str], Row] = {}
    if options.out.is_file():
        for each in json.loads(options.out.read_text("utf-8"))["rows"]:
            known[key_of(Row(**each))] = Row(**each)
    graphs: dict[str, Graph] = {}
    for row in rows_to_make():
        if (
            row.network not in options.networks
            or (options.designs and row.design not in options.designs)
            or (options.patterns and row.pattern not in options.patterns)
        ):
            continue
        if row.network not in graphs:
            graphs.clear()
            gc.collect()
            graphs[row.network] = traced(row.network)
        model(row, graphs[row.network])
        before = known.get(key_of(row))
        if options.simulate:
            simulate(row, graphs[row.network])
        elif before and tuple(before.ideal) == row.ideal:
            row.simulated = before.simulated  # as many trips: the program is the same
        known[key_of(row)] = row
        print(next(table([row])), flush=True)
        write_results(options.out, known)


def key_of(row: Row) -> tuple[str, str, str]:
    return row.network, row.pattern, row.design


def write_results(path: Path, known: dict[tuple[str, str, str], Row]) -> None:
    rows = [known[key_of(row)] for row in rows_to_make() if key_of(row) in known]
    document = {"setting": REFERENCE.describe(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text("\n".join((*HEAD, *table(rows))) + "\n", "utf-8")


if __name__ == "__main__":
    main()
