"""Where the time of a program goes: the modelled cycles of each task, beside counted ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pynq_kgrc.accelerator.boards import CLOCK_MHZ, REFERENCE, Memory
from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.cost import Cost
from pynq_kgrc.accelerator.explore import Network
from pynq_kgrc.accelerator.latency import TaskTime, task_time
from pynq_kgrc.accelerator.tiling import Work
from pynq_kgrc.backends.base import Counters, count_task
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.program import ConvTask, Program


@dataclass(frozen=True)
class LayerTime:
    """Modelled and counted time of one task."""

    name: str
    time: TaskTime
    """Modelled, with memory."""
    traffic: int
    """Modelled bytes from and to memory."""
    trips: int | None
    """Trips of the array that a device or the C-simulation counted; None without a run there."""
    cycles: int | None
    """Clock cycles that a device counted; None without one: a simulation has no clock."""

    @property
    def cost(self) -> Cost:
        """Modelled trips of each process, and beats."""
        return self.time.cost

    @property
    def intensity(self) -> float:
        """Modelled multiply-accumulates per byte of traffic."""
        return self.cost.macs / self.traffic

    @property
    def rate(self) -> float:
        """Modelled multiply-accumulates per cycle."""
        return self.cost.macs / self.time.cycles

    @property
    def slowdown(self) -> float | None:
        """Counted over modelled clock cycles; None where none were counted."""
        return None if self.cycles is None else self.cycles / self.time.cycles


def time_layers(program: Program, counters: Sequence[Counters] = ()) -> list[LayerTime]:
    """The modelled time of each task of a program; `counters` of a run add what was counted."""
    counted = {each.task: (each.trips, each.cycles) for each in counters}
    found = []
    for task in program.tasks:
        time, bytes_ = task_time(program.config, program.work(task)), count_task(program, task)
        traffic = bytes_.bytes_in + bytes_.bytes_weight + bytes_.bytes_out
        found.append(LayerTime(task.name, time, traffic, *counted.get(task.name, (None, None))))
    return found


def modelled_ms(
    program: Program, memory: Memory = REFERENCE, clock_mhz: float = CLOCK_MHZ
) -> float:
    """Modelled milliseconds for one clip, with memory: the tasks run one after the other."""
    times = (task_time(program.config, program.work(t), memory, clock_mhz) for t in program.tasks)
    return sum(time.cycles for time in times) / (clock_mhz * 1e3)


def one_tap_share(program: Program) -> float:
    """The share of the modelled time that passes in convolutions of one tap.

    They use one of the P_K columns of the array.
    """
    cycles = [
        (task, task_time(program.config, program.work(task)).cycles) for task in program.tasks
    ]
    one_tap = sum(
        count for task, count in cycles if isinstance(task, ConvTask) and task.shape.taps == 1
    )
    return one_tap / sum(count for _, count in cycles)


def network_of(program: Program) -> Network:
    """The convolutions of a program, for the search of designs.

    Raises:
        ConfigError: the program has no convolution whose output is larger than one position.
    """
    kept = [
        (task.shape, *task.weights.kept)
        for task in program.tasks
        if isinstance(task, ConvTask) and math.prod(task.shape.out_size) > 1
    ]
    if not kept:
        raise ConfigError(f"{program.name} has no convolution to explore designs for")

    def work(config: AcceleratorConfig) -> list[Work]:
        moved = msgspec.structs.replace(program, config=config)
        return [moved.work(task) for task in moved.tasks]

    return Network(kept, work)
