"""Power of a board's supply rails while something runs, from the sensors that pynq finds."""

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
"""Seconds between two readings. The sensors of a ZCU102 average over some milliseconds."""

LIMIT = 120.0
"""Seconds after which a recording ends, even if the work has not."""


@dataclass(frozen=True)
class Recording:
    """Power of all rails over time; the rails of a reading are read one after the other."""

    seconds: Array
    """[readings]: when each was begun, from the start."""
    watts: Mapping[str, Array]
    """Rail -> [readings]."""

    @property
    def mean_watts(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.watts.items()}


def find_rails() -> dict[str, Callable[[], float]]:
    """Rail -> a function that reads its power in watts. Empty on most computers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rails: Mapping[str, Any] = import_module("pynq.pmbus").get_rails()
        except (ImportError, OSError):
            return {}
    readers = {name: _reader(rail) for name, rail in rails.items()}
    return {name: reader for name, reader in readers.items() if reader is not None}


def _reader(rail: Any) -> Callable[[], float] | None:
    """Reads watts from the rail's power sensor, else voltage x current; None if it has neither."""
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
    """Read the rails every `interval` seconds while `work` runs; at least once.

    Raises:
        DeviceError: `rails` is empty, or a sensor fails.
    """
    if not rails:
        raise DeviceError("power is not measured: there are no sensors here")
    times: list[float] = []
    readings: list[list[float]] = []
    failed: list[Exception] = []
    done = threading.Event()
    began = time.perf_counter()

    def sample() -> None:
        try:
            while True:
                times.append(time.perf_counter() - began)
                readings.append([read() for read in rails.values()])
                if done.wait(interval) or times[-1] > LIMIT:
                    return
        except Exception as error:  # raised below, in the calling thread
            failed.append(error)

    sampler = threading.Thread(target=sample, name="power", daemon=True)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        sampler.join(LIMIT)
    if failed or not readings:
        cause = failed[0] if failed else f"no reading within {LIMIT:g} s"
        raise DeviceError(f"a power sensor fails: {cause}")
    columns = np.array(readings).T
    return Recording(np.array(times[: len(readings)]), dict(zip(rails, columns, strict=True)))
