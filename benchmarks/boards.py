"""The design of each board: modelled resources and latency with the board's memory, as a table.

Networks are those of `latency.py`: seeded weights, the paper's KGRC recipe for C3D and R(2+1)D-18,
dense I3D. Nothing depends on this computer, and nothing was built for a board or measured on one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from latency import Row, in_ms, rates_of, traced
from reports import ROOT

from pynq_kgrc.accelerator.boards import Board, board_of_design
from pynq_kgrc.accelerator.config import AcceleratorConfig, preset
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.accelerator.resources import estimate_resources
from pynq_kgrc.compiler.latency import list_work
from pynq_kgrc.graph import Graph

DESIGNS = ("8-zcu102", "8-zcu104", "8-kv260")
NETWORKS = (("c3d", "KGRC"), ("r2plus1d_18", "KGRC"), ("i3d", "dense"))
RESULT = ROOT / "benchmarks" / "results" / "boards.md"
HEAD = (
    "| Design | part | DSP | BRAM36 | URAM | LUT k | C3D KGRC | R(2+1)D KGRC | I3D dense |",
    "|---|---|---|---|---|---|---|---|---|",
)


def resource_cells(config: AcceleratorConfig, board: Board) -> list[str]:
    """Modelled resources, with their shares of the board."""
    used = estimate_resources(config, board)
    shares = used.shares(board)
    amounts = {"dsp": used.dsp, "bram36": f"{used.bram36:.0f}", "uram": used.uram}
    cells = [f"{each} ({shares[name]:.0%})" if name in shares else "-"
             for name, each in amounts.items()]  # fmt: skip
    return [*cells, f"{used.lut / 1000:.0f} ({shares['lut']:.0%})"]


def latency_cell(config: AcceleratorConfig, board: Board, graph: Graph, row: Row) -> str:
    """Modelled ms of the convolutions and of the whole network."""
    works = [work for _, work in list_work(graph, config, rates_of(row))]
    times = [task_time(config, work, board.memory).cycles for work in works]
    return " / ".join(f"{ms:.1f}" for ms in in_ms(works, times))


def lines() -> Iterator[str]:
    """The lines of the table."""
    boards = {name: board_of_design(name) for name in DESIGNS}
    cells = {
        name: [name, boards[name].part, *resource_cells(preset(name), boards[name])]
        for name in DESIGNS
    }
    for network, pattern in NETWORKS:
        graph = traced(network)
        for name in DESIGNS:
            row = Row(network, pattern, name, None)
            cells[name].append(latency_cell(preset(name), boards[name], graph, row))
    yield from HEAD
    for each in cells.values():
        yield f"| {' | '.join(each)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, help=f"default: {RESULT.name}")
    options = parser.parse_args()
    text = "\n".join(lines()) + "\n"
    options.out.write_text(text, "utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
