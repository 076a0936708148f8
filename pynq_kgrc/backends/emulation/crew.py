"""Jobs shared out among the cores: by threads, or by processes that go through the same steps.

Threads of Python hold each other up: between two calls of numpy a thread needs the interpreter,
which another may have, and is put to sleep for it. So where this process can be forked safely, a
team of processes does the work. Every member goes through the same steps in the same order; at
each call of `each` they take jobs by drawing tickets, and none goes on before all jobs are done.
What a job writes lies in memory from `shared_array`; all else was there before the fork.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, NoReturn, Protocol

import numpy as np

from pynq_kgrc.errors import DeviceError
from pynq_kgrc.quant import Array

Work = Callable[[Any], None]

Each = Callable[[Work, Iterable[Any]], None]
"""Do some work for every job."""

STALL_SECONDS = 120.0
"""How long others may be at their last jobs while a member has none left."""

WAKE_SECONDS = 5.0
"""How often a member that waits for orders looks whether its parent is still there."""

SPINS = 2000
"""Looks at the tickets before a member that waits takes a nap; some tenths of a millisecond."""

NAP_SECONDS = 5e-5
NAPS = 200
"""Naps between two looks whether the others still live."""

ORDER = struct.Struct("=qq")


class Step(Protocol):
    """A part of a run."""

    def run(self, each: Each) -> None:
        """Do it, in jobs that write to shared memory only."""


class Crew(Protocol):
    """Those who share the jobs of a run."""

    def begin(self, first: int, last: int) -> None:
        """Tell the others to go through the steps [first, last), as the caller does next."""

    def each(self, work: Work, jobs: Iterable[Any]) -> None:
        """Do `work` for every job; it is done when this returns."""

    def close(self) -> None:
        """Dismiss the others; the second time does nothing."""


def shared_array(count: int) -> Array:
    """`count` bytes, zero, that this process and those forked from it write and see."""
    return np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8)[:count]


def available_cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def may_fork() -> bool:
    """Whether this process is safely forked: on Linux, while Python runs but one thread in it."""
    return sys.platform == "linux" and threading.active_count() == 1


class Threads:
    """The calling thread and `count` - 1 others; an error of any is raised.

    Each takes the next job when it is done with one, so that a thread is woken once, not for
    every job.
    """

    def __init__(self, count: int) -> None:
        self._others = count - 1
        self._pool = ThreadPoolExecutor(self._others, "emulate") if self._others else None

    def begin(self, first: int, last: int) -> None:
        """Nothing to do: the others take whatever job there is."""

    def each(self, work: Work, jobs: Iterable[Any]) -> None:
        """Do `work` for every job, here and on the other threads."""
        queue = iter(list(jobs))  # the next of a list is one step, under the interpreter's lock

        def drain() -> None:
            for job in queue:
                work(job)

        helpers = []
        if self._pool is not None:
            try:
                helpers = [self._pool.submit(drain) for _ in range(self._others)]
            except RuntimeError as error:
                raise DeviceError(f"the emulation stopped: {error}") from error
        try:
            drain()
        finally:
            for helper in helpers:
                helper.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


class Team:
    """This process and `count` - 1 forked from it, which go through `steps` together.

    Raises:
        OSError: the system does not let a process be forked.
    """

    def __init__(self, steps: Sequence[Step], count: int) -> None:
        self._steps, self._count = steps, count
        self._tickets = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        self._lock = get_context("fork").Lock()
        self._due = 0  # tickets that are drawn when the jobs so far are done
        self._parent = os.getpid()
        self._orders: list[int] = []
        self._members: list[int] = []
        self._dismissal = weakref.finalize(
            self, _dismiss, self._parent, self._orders, self._members
        )
        try:
            for _ in range(count - 1):
                self._add_member()
        except BaseException:
            self.close()
            raise

    def begin(self, first: int, last: int) -> None:
        """Let the others go through the steps [first, last).

        Raises:
            DeviceError: one of them is gone.
        """
        for end in self._orders:
            try:
                os.write(end, ORDER.pack(first, last))
            except OSError as error:
                raise self._loss() from error

    def each(self, work: Work, jobs: Iterable[Any]) -> None:
        """Do `work` for some of the jobs, and wait until the others have done the rest.

        Raises:
            DeviceError: another is gone, or does not come to an end.
        """
        jobs = list(jobs)
        while (ticket := self._draw()) < len(jobs):
            work(jobs[ticket])
        # everyone draws one ticket too many, once it has no job left
        self._due += len(jobs) + self._count
        looks = 0
        while self._tickets[0] < self._due:
            looks += 1
            if looks > SPINS:
                time.sleep(NAP_SECONDS)
                if looks % NAPS == 0:
                    self._look_after((looks - SPINS) * NAP_SECONDS)
        with self._lock:
            pass  # on every processor: what others wrote before they drew is seen from here on

    def close(self) -> None:
        """Dismiss the others; the second time does nothing."""
        self._dismissal()

    def _draw(self) -> int:
        if not self._lock.acquire(timeout=STALL_SECONDS):
            raise self._loss()
        try:
            ticket: int = self._tickets[0]
            self._tickets[0] = ticket + 1
        finally:
            self._lock.release()
        return ticket - self._due

    def _look_after(self, waited: float) -> None:
        """Go on waiting only while the others live and the time is not up."""
        if os.getpid() != self._parent:
            if os.getppid() != self._parent:
                os._exit(1)
        elif waited > STALL_SECONDS or any(map(_has_ended, self._members)):
            raise self._loss()

    def _loss(self) -> DeviceError:
        gone = " and ".join(str(member) for member in self._members if _has_ended(member))
        what = f"process {gone} has ended" if gone else f"no end after {STALL_SECONDS:g} s"
        return DeviceError(
            f"a process of the emulation is lost: {what}. Was it killed, or is memory short? "
            "The next run starts it anew; Emulation(cores=1) needs none"
        )

    def _add_member(self) -> None:
        theirs, ours = os.pipe()
        self._orders.append(ours)
        # the parent's to answer: a member ends when the parent does
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                # the threads of libraries are left behind; a member calls numpy and no other
                warnings.simplefilter("ignore", DeprecationWarning)
                member = os.fork()
            if member == 0:
                self._serve(theirs)
            self._members.append(member)
        finally:
            os.close(theirs)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _serve(self, orders: int) -> NoReturn:
        """Go through the steps when told to, as long as the parent is there."""
        try:
            gc.disable()  # nothing of the parent's is finalized here
            # nothing of the parent's is held open: sockets, files, the pipes of other teams
            most = os.sysconf("SC_OPEN_MAX")
            os.closerange(3, orders)
            os.closerange(orders + 1, most if most > 0 else 1 << 16)
            arrival = select.poll()
            arrival.register(orders, select.POLLIN)
            while os.getppid() == self._parent:
                if not arrival.poll(1e3 * WAKE_SECONDS):
                    continue
                order = os.read(orders, ORDER.size)
                if not order:
                    break
                first, last = ORDER.unpack(order)
                for step in self._steps[first:last]:
                    step.run(self.each)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(0)


def _has_ended(member: int) -> bool:
    """Whether a process forked here has ended; it stays to be waited for."""
    try:
        return os.waitid(os.P_PID, member, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _dismiss(parent: int, orders: list[int], members: list[int]) -> None:
    if os.getpid() != parent:  # somebody else's fork of this process
        return
    for end in orders:
        os.close(end)
    for member in members:
        with contextlib.suppress(OSError):  # somebody has waited for it already
            os.waitid(os.P_PID, member, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(member, signal.SIGKILL)
            os.waitpid(member, 0)
    orders.clear()
    members.clear()
