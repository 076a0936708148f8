"""The command explore: search accelerator designs for compiled networks and a board."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pynq_kgrc.cli.arguments import (
    Declare,
    check_plot,
    file_to_write,
    number,
    positive,
    progress,
)

if TYPE_CHECKING:
    from pynq_kgrc.accelerator.boards import Board
    from pynq_kgrc.accelerator.config import AcceleratorConfig
    from pynq_kgrc.accelerator.explore import Candidate, Network, SearchReport
    from pynq_kgrc.program import Program


def declare(command: Declare) -> None:
    """Add the command explore."""
    explore = command(
        "explore",
        run_explore,
        "find accelerator designs for compiled networks and a board",
        "Lists the designs that fit a board and are fastest for all the programs together. All\n"
        "figures are modelled. Latency is that of the cost model, whose trips equal those of the\n"
        "C-simulation, with the board's memory: its ports, latency and bandwidth are assumed\n"
        "(docs/hardware.md). Resources are counted from the sources, not synthesized.\n"
        "Kernel groups and bit width stay those of the programs, so that their weights need no\n"
        "new pruning:\n\n"
        "  pynq-kgrc explore -p c3d.kgrc -p r2plus1d.kgrc --board zcu102 --plot designs.png\n"
        "  pynq-kgrc explore -p c3d.kgrc -o best.json\n"
        "  pynq-kgrc compile c3d --design best.json ...",
    )
    explore.add_argument(
        "-p",
        "--program",
        type=Path,
        action="append",
        required=True,
        help="a .kgrc file; give the option again for more programs",
    )
    explore.add_argument("--board", default="zcu102", help="the board to fit (default: zcu102)")
    explore.add_argument(
        "--clock",
        type=number,
        default=150.0,
        metavar="MHZ",
        help="clock of the design (default: 150)",
    )
    explore.add_argument(
        "--share",
        type=number,
        default=0.8,
        help="largest share of each resource of the board to use (default: 0.8)",
    )
    explore.add_argument(
        "--effort",
        type=positive,
        default=40,
        help="number of designs to evaluate with the full cost model (default: 40)",
    )
    explore.add_argument(
        "--top", type=positive, default=10, help="number of designs to print (default: 10)"
    )
    explore.add_argument(
        "--plot", type=file_to_write, metavar="FILE", help="draw the designs: .png, .svg, .pdf"
    )
    explore.add_argument(
        "-o", "--out", type=file_to_write, metavar="FILE", help="write the fastest, for --design"
    )


def run_explore(options: argparse.Namespace) -> int:
    import msgspec

    from pynq_kgrc.accelerator.boards import board
    from pynq_kgrc.accelerator.config import write_design
    from pynq_kgrc.accelerator.explore import (
        SearchReport,
        evaluate,
        list_designs,
        pareto_front,
        rank_designs,
        report_design,
    )
    from pynq_kgrc.errors import ConfigError
    from pynq_kgrc.program import load

    if not 0 < options.share <= 1:
        raise ConfigError(f"--share {options.share}: use a share above 0, 1 at most")
    if not 0 < options.clock <= 1000:
        raise ConfigError(f"--clock {options.clock}: use a clock above 0 MHz, 1000 MHz at most")
    if options.plot:
        check_plot(options.plot)
    target = board(options.board)
    programs = [load(path) for path in options.program]
    networks = _networks(programs, options.program)
    base = programs[0].config
    ranked = rank_designs(list_designs(base, target, options.share), networks)[: options.effort]
    if base not in ranked:
        ranked.append(base)
    evaluated = evaluate(
        progress(ranked, "explore", len(ranked)), networks, options.clock, target.memory, target
    )
    candidates = sorted(evaluated, key=lambda each: each.mean_ms)
    fitting = [each for each in candidates if each.resources.share(target) <= options.share]
    if not fitting:
        raise ConfigError(f"no design fits the networks on {target.name}; raise --effort")
    if options.out:
        write_design(fitting[0].config, options.out)
    if options.plot:
        _plot(candidates, base, target, options)
    front = {each.config.digest for each in pareto_front(fitting)}
    own = next((each for each in candidates if each.config == base), None)
    if own is None:
        raise ConfigError(
            f"{base.name}, the design of {options.program[0]}, cannot run all the programs; give "
            f"first the program whose design has the largest buffers"
        )
    report = SearchReport(
        board=target.name,
        clock_mhz=options.clock,
        compiled_for=report_design(own, target, base.digest in front),
        designs=[
            report_design(each, target, each.config.digest in front)
            for each in fitting[: options.top]
        ],
        figures=target.memory.describe(options.clock),
    )
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        print(_table(report))
    return 0


def _networks(programs: Sequence[Program], paths: Sequence[Path]) -> dict[str, Network]:
    """The programs as the search needs them, by the names of their files.

    Raises:
        ConfigError: a program has other kernel groups or another bit width than the first.
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
                f"{path} has {config.bits} bits and groups {config.group_size}, {paths[0]} has "
                f"{first.bits} and {first.group_size}; explore programs of one kind together"
            )
        networks[path.stem] = network_of(program)
    return networks


def _table(report: SearchReport) -> str:
    own = report.compiled_for
    head = f"{'design':36} {'MAC/cycle':>9} {'DSP':>10} {'BRAM36':>10} {'URAM':>8} {'LUT':>6}  "
    lines = [
        f"for {report.board}: ms of the convolutions, and of all tasks; {report.figures}",
        head + "  ".join(f"{name:>18}" for name in own.latency_ms),
    ]
    for row in (*report.designs, own):
        used, share = row.resources, row.share
        latency = "  ".join(
            f"{each.convolutions:8.2f} {each.whole:9.2f}" for each in row.latency_ms.values()
        )
        if row is own:
            lines.append("the programs were compiled for:")
        lines.append(
            f"{row.name:36} {row.macs_a_cycle:9} {used.dsp:5} {share.dsp:4.0%} "
            f"{used.bram36:5.0f} {share.bram36:4.0%} {used.uram:3} {share.uram:4.0%} "
            f"{share.lut:6.0%}  {latency}{'  pareto' if row.pareto else ''}"
        )
    return "\n".join(lines)


def _plot(
    candidates: Sequence[Candidate],
    base: AcceleratorConfig,
    board: Board,
    options: argparse.Namespace,
) -> None:
    from pynq_kgrc.analysis.plots import plot_designs
    from pynq_kgrc.files import written_beside

    figure = plot_designs(candidates, base, board, options.clock, options.share)
    with written_beside(options.plot) as beside:
        figure.savefig(beside, format=options.plot.suffix[1:], dpi=120)
