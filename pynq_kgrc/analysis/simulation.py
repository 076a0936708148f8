"""The simulated time of a program: a document of what the timed simulation says of each task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.backends.timed import TaskTime, TimedSimulation, Timing, Wait
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.program import ConvTask, Program

ARRAY = "multiply"
"""The process that is the array."""


class SimulatedTask(msgspec.Struct, frozen=True):
    """The simulated time of one task, beside the cost model's."""

    name: str
    convolution: bool
    """Whether it counts among the convolutions: its output is larger than one position."""
    ms: float
    ideal_ms: float
    """By the cost model, without memory and pipelines: the trips of the slowest process."""
    bound: str
    """The process that waited least for others, memory not counted as waiting."""
    time: TaskTime

    @property
    def array_waits(self) -> tuple[Wait, ...]:
        """What the array waits for, longest first."""
        return self.time.process(ARRAY).waits


class SimulationReport(msgspec.Struct, frozen=True):
    """The simulated times of the tasks of a program."""

    figures: str
    """What the figures are: simulated, with what is assumed."""
    program: str
    design: str
    timing: Timing
    tasks: tuple[SimulatedTask, ...]
    whole_ms: float
    convolutions_ms: float
    ideal_whole_ms: float
    ideal_convolutions_ms: float


def simulate_tasks(simulation: TimedSimulation, numbers: Iterable[int]) -> Iterator[SimulatedTask]:
    """Simulate tasks of the loaded program, one by one.

    The times do not depend on codes: the maps may hold anything, and the tasks run in any order.

    Raises:
        ProgramError: no program is loaded, or it has no task of that number.
        DeviceError: the processes of a task wait for each other.
    """
    program = simulation.program
    config, clock = program.config, simulation.timing.clock_mhz * 1e3
    for number in numbers:
        simulation.run(number, number + 1)
        task, time = program.tasks[number], simulation.task_time(number)
        yield SimulatedTask(
            name=task.name,
            convolution=isinstance(task, ConvTask) and math.prod(task.shape.out_size) > 1,
            ms=time.cycles / clock,
            ideal_ms=task_cost(config, program.work(task)).cycles / clock,
            bound=time.bound.name,
            time=time,
        )


def report_simulation(
    program: Program, timing: Timing, tasks: Sequence[SimulatedTask]
) -> SimulationReport:
    """The times of some tasks of a program, and their sums."""
    convolutions = [each for each in tasks if each.convolution]
    return SimulationReport(
        figures=timing.describe(),
        program=program.name,
        design=program.config.name,
        timing=timing,
        tasks=tuple(tasks),
        whole_ms=sum(each.ms for each in tasks),
        convolutions_ms=sum(each.ms for each in convolutions),
        ideal_whole_ms=sum(each.ideal_ms for each in tasks),
        ideal_convolutions_ms=sum(each.ideal_ms for each in convolutions),
    )


def task_numbers(program: Program, names: Sequence[str]) -> list[int]:
    """The numbers of tasks by their names or numbers, in the program's order; all without names.

    Raises:
        ConfigError: the program has no such task.
    """
    known = [task.name for task in program.tasks]
    if not names:
        return list(range(len(known)))
    found = set()
    for name in names:
        if name in known:
            found.add(known.index(name))
        elif name.isascii() and name.isdigit() and int(name) < len(known):
            found.add(int(name))
        else:
            raise ConfigError(
                f"{program.name} has no task {name!r}; use a number from 0 to {len(known) - 1} or "
                f"one of {', '.join(known)}"
            )
    return sorted(found)
