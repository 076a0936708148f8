"""What a board takes from its rails while something runs, by the sensors that pynq finds."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from pynq_kgrc.errors import DeviceError
from pynq_kgrc.quant import Array

INTERVAL = 0.02
"""Seconds between two readings; the chips on a ZCU102 average over some milliseconds."""

LIMIT = 120.0
"""Seconds after which a recording ends, whatever still runs."""


@dataclass(frozen=True)
class Recording:
    """Readings of all rails, taken one after the other."""

    seconds: Array
    """[readings], from the start."""
    watts: Mapping[str, Array]
    """[readings] of each rail."""

    @property
    def mean_watts(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.watts.items()}


def find_rails() -> dict[str, Callable[[], float]]:
    """The power in watts of each rail that has a sensor; none on most computers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rails: Mapping[str, Any] = import_module("pynq.pmbus").get_rails()
        except (ImportError, OSError):
            return {}
    readers = {name: _reader(rail) for name, rail in rails.items()}
    return {name: reader for name, reader in readers.items() if reader is not None}


def _reader(rail: Any) -> Callable[[], float] | None:
    """Watts of a rail: its own sensor's, or voltage times current."""
    if rail.power is not None:
        return lambda: float(rail.power.value)
    if rail.voltage is not None and rail.current is not None:
        return lambda: float(rail.voltage.value * rail.current.value)
    return None


def record_power(
    rails: Mapping[str, Callable[[], float]],
    work: Callable[[], object],
    interval: float = INTERVAL,
) -> Recording:
    """Read the rails while `work` runs, at least once.

    Raises:
        DeviceError: there is no rail, or a sensor fails.
    """
    if not rails:
        raise DeviceError("power is not measured: there are no sensors here")
    times: list[float] = []
    rows: list[list[float]] = []
    failed: list[Exception] = []
    done = threading.Event()
    began = time.perf_counter()

    def sample() -> None:
        try:
            while True:
                times.append(time.perf_counter() - began)
                rows.append([read() for read in rails.values()])
                if done.wait(interval) or times[-1] > LIMIT:
                    return
        except Exception as error:  # told below, in the thread that asked
            failed.append(error)

    sampler = threading.Thread(target=sample, name="power", daemon=True)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        sampler.join(LIMIT)
    if failed or not rows:
        raise DeviceError(f"a power sensor fails: {failed[0] if failed else 'it does not answer'}")
    columns = np.array(rows).T
    return Recording(np.array(times[: len(rows)]), dict(zip(rails, columns, strict=True)))
