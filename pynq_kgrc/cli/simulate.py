"""The command simulate: how long a program takes in the timed simulation, and what it waits for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pynq_kgrc.cli.arguments import (
    PROGRAM_HELP,
    Declare,
    check_plot,
    file_to_write,
    number,
    program_file,
    progress,
    whole,
)

if TYPE_CHECKING:
    from pynq_kgrc.analysis.simulation import SimulatedTask, SimulationReport
    from pynq_kgrc.backends.timed import Timing


def declare(command: Declare) -> None:
    """Add the command simulate."""
    simulate = command(
        "simulate",
        run_simulate,
        "simulate the time of a program, with memory",
        "Builds the accelerator's own sources as a timed simulation and runs each task: the\n"
        "processes side by side, streams as deep as their pragmas say, pipelined loops with their\n"
        "II and depth, memory ports with a latency and a bandwidth. Prints for each task\n\n"
        "  ms      simulated, at the clock\n"
        "  ideal   of the cost model, without memory and pipelines\n"
        "  array   share of the time in which the array works; it waits for the rest\n"
        "  waits   for what the array waits most: an empty stream, or a full one\n"
        "  bound   the process that waits least for others: widen that first\n\n"
        "The times are simulated, not measured. They assume that a tool reaches each II and the\n"
        "clock, and a memory as the options say; the defaults are 80 % of 128-bit ports at\n"
        "300 MHz beside an array at 150 MHz, and 75 % of a ZCU102's DDR4. They do not depend on\n"
        "the clip. A network takes minutes, because every product is computed.\n\n"
        "  pynq-kgrc simulate c3d.kgrc --plot c3d.png\n"
        "  pynq-kgrc simulate c3d.kgrc --tasks conv1 fc6 --latency 100 --depth 50\n"
        "  pynq-kgrc simulate c3d.kgrc --latency 0 --port-bytes 1e6 --ddr-bytes 1e6  # ideal",
    )
    simulate.add_argument("program", type=Path, metavar="PROGRAM", help=PROGRAM_HELP)
    simulate.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="names or numbers; default: all"
    )
    simulate.add_argument(
        "--clock", type=number, metavar="MHZ", help="clock of the array (default: 150)"
    )
    simulate.add_argument(
        "--latency",
        type=number,
        metavar="CYCLES",
        help="from a request to its first data, in cycles of the array (default: 70)",
    )
    simulate.add_argument(
        "--port-bytes",
        type=number,
        metavar="BYTES",
        help="a cycle, of each memory port and direction (default: 25.6)",
    )
    simulate.add_argument(
        "--ddr-bytes",
        type=number,
        metavar="BYTES",
        help="a cycle, of all ports together (default: 85)",
    )
    simulate.add_argument(
        "--outstanding",
        type=whole(1, 256),
        metavar="BURSTS",
        help="that a port has under way (default: 16)",
    )
    simulate.add_argument(
        "--depth",
        type=whole(0, 1000),
        metavar="CYCLES",
        help="of the pipelines, from a trip's start to its writes (default: 25)",
    )
    simulate.add_argument(
        "--flush",
        action="store_true",
        default=None,
        help="pipelines hand on what is finished while they wait for input; without it only those "
        "whose pragma says so",
    )
    simulate.add_argument(
        "--details",
        action="store_true",
        help="also list each process with what it waits for, and how full each stream was",
    )
    simulate.add_argument(
        "--plot",
        type=file_to_write,
        metavar="FILE",
        help="draw the processes of the longest task over time, and what the array waits for in "
        "each task: .png, .svg, .pdf",
    )


def run_simulate(options: argparse.Namespace) -> int:
    import msgspec

    from pynq_kgrc.analysis.simulation import report_simulation, simulate_tasks, task_numbers
    from pynq_kgrc.backends.timed import TimedSimulation
    from pynq_kgrc.program import load

    timing = _timing(options)
    if options.plot:
        check_plot(options.plot)
    program = load(program_file(options.program))
    numbers = task_numbers(program, options.tasks)
    simulation = TimedSimulation(program.config, timing)
    simulation.load(program)
    tasks = list(simulate_tasks(simulation, progress(numbers, "simulate", len(numbers))))
    report = report_simulation(program, timing, tasks)
    if options.plot:
        _plot(report, options.plot)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        print(_table(report))
        if options.details:
            print("\n".join(line for task in tasks for line in _details(task)))
    return 0


def _timing(options: argparse.Namespace) -> Timing:
    """The settings of the options; those that are not given keep their defaults.

    Raises:
        ConfigError: one is out of bounds; the message names the option.
    """
    from pynq_kgrc.backends.timed import Timing
    from pynq_kgrc.errors import ConfigError

    names = {"clock": "clock_mhz"} | {
        name: name
        for name in ("latency", "port_bytes", "ddr_bytes", "outstanding", "depth", "flush")
    }
    given = {
        field: getattr(options, name)
        for name, field in names.items()
        if getattr(options, name) is not None
    }
    for name, field in names.items():
        if field in given:
            try:
                Timing(**{field: given[field]})
            except ConfigError as error:
                raise ConfigError(f"--{name.replace('_', '-')}: {error}") from error
    return Timing(**given)


def _table(report: SimulationReport) -> str:
    width = max(len("convolutions"), *(len(task.name) for task in report.tasks))
    lines = [
        f"{report.program} on {report.design}; {report.figures}",
        f"{'task':{width}}  {'ms':>9}  {'ideal':>9}  array  {'waits':26}  bound",
        *(_line(task, width) for task in report.tasks),
        f"{'convolutions':{width}}  {report.convolutions_ms:9.3f}  "
        f"{report.ideal_convolutions_ms:9.3f}",
        f"{'all':{width}}  {report.whole_ms:9.3f}  {report.ideal_whole_ms:9.3f}",
    ]
    return "\n".join(lines)


def _line(task: SimulatedTask, width: int) -> str:
    from pynq_kgrc.analysis.simulation import ARRAY

    cycles = task.time.cycles
    busy = task.time.process(ARRAY).busy / cycles
    waits = ""
    if task.array_waits:
        longest = task.array_waits[0]
        waits = f"{longest.cycles / cycles:4.0%} {longest.on} {longest.why}"
    memory = [wait for wait in task.time.bound.waits if wait.why == "port"]
    port = f" ({memory[0].cycles / cycles:.0%} for {memory[0].on})" if memory else ""
    return (
        f"{task.name:{width}}  {task.ms:9.3f}  {task.ideal_ms:9.3f}  {busy:5.0%}  {waits:26}  "
        f"{task.bound}{port}"
    )


def _details(task: SimulatedTask) -> Iterator[str]:
    """The processes and streams of a task, a line each."""
    time = task.time
    yield f"\n{task.name}, {time.cycles:.0f} cycles"
    for process in time.processes:
        waits = ", ".join(
            f"{wait.on} {wait.why} {wait.cycles:.0f}" for wait in process.waits if wait.cycles >= 1
        )
        yield f"  {process.name:16} works {process.busy:9.0f}  waits: {waits or 'never'}"
    for stream in time.streams:
        yield f"  {stream.name:18} held {stream.most:4} of {stream.depth:4} words at most"


def _plot(report: SimulationReport, path: Path) -> None:
    from pynq_kgrc.analysis.plots import plot_simulation
    from pynq_kgrc.files import written_beside

    longest = max(report.tasks, key=lambda task: task.ms)
    figure = plot_simulation(report, longest)
    with written_beside(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], dpi=120)
