"""How many cores this process may use: its CPU affinity, and the limit of its container."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from pynq_kgrc.program import ConvTask, Program

CGROUPS = Path("/sys/fs/cgroup")
"""Where the control groups are mounted that limit a container."""


def available_cores() -> int:
    """The number of cores that this process may use, at least 1."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def useful_cores(program: Program, one_core_macs: int) -> int:
    """All cores; 1 for a program with fewer MACs than `one_core_macs`."""
    macs = sum(task.shape.macs for task in program.tasks if isinstance(task, ConvTask))
    return 1 if macs < one_core_macs else available_cores()


def _quota() -> float | None:
    """Cores' worth of time that the container may use; None if there is no limit.

    `cpu.max` of version 2 holds "QUOTA PERIOD" or "max PERIOD", two files of version 1 the same.
    """
    try:
        quota, period = (CGROUPS / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (CGROUPS / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (CGROUPS / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        share = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):
        return None
    return share if 0 < share < math.inf else None
