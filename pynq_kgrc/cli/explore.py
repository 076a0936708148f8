"""The command explore: find a design for some networks and a board."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pynq_kgrc.cli.arguments import Declare, positive, progress

if TYPE_CHECKING:
    from pynq_kgrc.accelerator.boards import Board
    from pynq_kgrc.accelerator.config import AcceleratorConfig
    from pynq_kgrc.accelerator.explore import Candidate, Network
    from pynq_kgrc.program import Program


def declare(command: Declare) -> None:
    """Add this file's command."""
    explore = command(
        "explore",
        run_explore,
        "find accelerator designs for compiled networks and a board",
        "Lists the designs that fit a board and are fastest for all the programs together. All\n"
        "figures are modelled: latency by the cost model that the C-simulation is held to,\n"
        "resources by counting the sources; nothing here was synthesized. Kernel groups and\n"
        "width stay those of the programs, so that their weights fit without pruning anew:\n\n"
        "  pynq-kgrc explore -p c3d.kgrc -p r2plus1d.kgrc --board zcu102 --plot designs.png\n"
        "  pynq-kgrc explore -p c3d.kgrc -o best.json\n"
        "  pynq-kgrc compile c3d --design best.json ...",
    )
    explore.add_argument(
        "-p", "--program", type=Path, action="append", required=True, help="a .kgrc; repeatable"
    )
    explore.add_argument("--board", default="zcu102", help="board to fit (default: zcu102)")
    explore.add_argument(
        "--clock", type=float, default=150.0, metavar="MHZ", help="clock (default: 150)"
    )
    explore.add_argument(
        "--share", type=float, default=0.8, help="of each resource to use (default: 0.8)"
    )
    explore.add_argument(
        "--effort", type=positive, default=40, help="designs to walk through (default: 40)"
    )
    explore.add_argument("--top", type=positive, default=10, help="designs to print (default: 10)")
    explore.add_argument("--plot", type=Path, metavar="FILE", help="draw them: .png, .svg or .pdf")
    explore.add_argument("-o", "--out", type=Path, metavar="FILE", help="write the fastest as JSON")


def run_explore(options: argparse.Namespace) -> int:
    from pynq_kgrc.accelerator.boards import board
    from pynq_kgrc.accelerator.config import write_design
    from pynq_kgrc.accelerator.explore import (
        evaluate,
        list_designs,
        pareto_front,
        rank_designs,
    )
    from pynq_kgrc.errors import ConfigError
    from pynq_kgrc.program import load

    if not 0 < options.share <= 1 or not 0 < options.clock <= 1000:
        raise ConfigError(
            f"share={options.share} has to be in 0 to 1, clock={options.clock} in 0 to 1000 MHz"
        )
    if options.plot:
        _check_plot(options.plot)
    target = board(options.board)
    programs = [load(path) for path in options.program]
    networks = _networks(programs, options.program)
    base = programs[0].config
    ranked = rank_designs(list_designs(base, target, options.share), networks)[: options.effort]
    if base not in ranked:
        ranked.append(base)
    walked = evaluate(progress(ranked, "explore", len(ranked)), networks, options.clock)
    candidates = sorted(walked, key=lambda each: each.mean_ms)
    fitting = [each for each in candidates if each.resources.share(target) <= options.share]
    if not fitting:
        raise ConfigError(f"no design fits the networks on {target.name}; raise --effort")
    if options.out:
        write_design(fitting[0].config, options.out)
    if options.plot:
        _plot(candidates, base, target, options)
    front = {each.config.digest for each in pareto_front(fitting)}
    rows = [_row(each, target, each.config.digest in front) for each in fitting[: options.top]]
    own = next(each for each in candidates if each.config == base)
    document = {
        "board": target.name,
        "clock_mhz": options.clock,
        "figures": "modelled",
        "compiled_for": _row(own, target, base.digest in front),
        "designs": rows,
    }
    print(json.dumps(document, indent=2) if options.json else _table(document))
    return 0


def _networks(programs: Sequence[Program], paths: Sequence[Path]) -> dict[str, Network]:
    """What explore has to know of each program.

    Raises:
        ConfigError: programs of other kernel groups or another width than the first.
    """
    from pynq_kgrc.analysis.timing import network_of
    from pynq_kgrc.errors import ConfigError

    first = programs[0].config
    networks = {}
    for path, program in zip(paths, programs, strict=True):
        config = program.config
        same = (config.bits, config.sparse, config.group_size)
        if same != (first.bits, first.sparse, first.group_size):
            raise ConfigError(
                f"{path} is of {config.bits} bits and groups {config.group_size}, {paths[0]} of "
                f"{first.bits} and {first.group_size}; explore programs of one kind together"
            )
        networks[path.stem] = network_of(program)
    return networks


def _row(candidate: Candidate, board: Board, on_front: bool) -> dict[str, Any]:
    from pynq_kgrc.accelerator.explore import macs_a_cycle

    resources = asdict(candidate.resources)
    return {
        "name": candidate.config.name,
        "macs_a_cycle": macs_a_cycle(candidate.config),
        "mean_ms": round(candidate.mean_ms, 3),
        "latency_ms": {
            name: {key: round(value, 3) for key, value in asdict(each).items()}
            for name, each in candidate.latency.items()
        },
        "resources": resources,
        "share": {key: round(value / getattr(board, key), 3) for key, value in resources.items()},
        "pareto": on_front,
        "config": asdict(candidate.config),
    }


def _table(document: dict[str, Any]) -> str:
    names = list(document["compiled_for"]["latency_ms"])
    head = f"{'design':36} {'MAC/cycle':>9} {'DSP':>10} {'BRAM36':>10} {'LUT':>6}  "
    lines = [
        f"modelled for {document['board']} at {document['clock_mhz']:g} MHz; ms of the "
        f"convolutions, and of everything",
        head + "  ".join(f"{name:>18}" for name in names),
    ]
    own = document["compiled_for"]
    for row in (*document["designs"], own):
        used, share = row["resources"], row["share"]
        latency = "  ".join(
            f"{each['convolutions']:8.2f} {each['whole']:9.2f}"
            for each in row["latency_ms"].values()
        )
        if row is own:
            lines.append("the programs were compiled for:")
        lines.append(
            f"{row['name']:36} {row['macs_a_cycle']:9} {used['dsp']:5} {share['dsp']:4.0%} "
            f"{used['bram36']:5.0f} {share['bram36']:4.0%} {share['lut']:6.0%}  {latency}"
            f"{'  pareto' if row['pareto'] else ''}"
        )
    return "\n".join(lines)


def _check_plot(path: Path) -> None:
    """Say before the search that a plot cannot be made."""
    from importlib.util import find_spec

    from pynq_kgrc.errors import ConfigError

    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: use a name that ends in .png, .svg or .pdf")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'pynq_kgrc[plots]'")


def _plot(
    candidates: Sequence[Candidate],
    base: AcceleratorConfig,
    board: Board,
    options: argparse.Namespace,
) -> None:
    from pynq_kgrc.analysis.plots import plot_designs
    from pynq_kgrc.storage import written_beside

    figure = plot_designs(candidates, base, board, options.clock, options.share)
    with written_beside(options.plot) as beside:
        figure.savefig(beside, format=options.plot.suffix[1:], dpi=120)
