"""Parallel loops on several cores, by threads or by forked processes.

Python's threads delay each other: between two numpy calls a thread needs the global interpreter
lock (GIL), may have to wait for it, and is put to sleep meanwhile. So where this process can be
forked safely, child processes share the work. Every process runs the same steps in the same order.
A step calls `parallel_for` for its jobs. There each process draws tickets from a shared counter;
ticket i stands for job i. `parallel_for` ends with a barrier: no process goes on before all jobs
are done. Jobs write to shared memory (`shared_array`). All other data was there before the fork, so
that each process has its own copy.
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

ParallelFor = Callable[[Work, Iterable[Any]], None]
"""Calls a function once for each job, on all cores; returns when all calls are done."""

STALL_SECONDS = 120.0
"""How long a process waits at a barrier, or for the lock, before the others count as hung."""

PARENT_CHECK_SECONDS = 5.0
"""How often a child that waits for a command checks that its parent still exists."""

SPINS = 2000
"""How often a process at a barrier polls the counter before it sleeps; some tenths of a ms."""

SLEEP_SECONDS = 5e-5
SLEEPS_PER_CHECK = 200
"""A process at a barrier checks after so many sleeps that the others are alive."""

COMMAND = struct.Struct("=qq")
"""What the parent writes to a child's pipe: the range of steps to run."""


class ParallelStep(Protocol):
    """One step of a run, whose jobs may run on several cores."""

    def run(self, parallel_for: ParallelFor) -> None:
        """Run the step. Its jobs write to shared memory only."""


class Crew(Protocol):
    """The threads or processes that share the jobs of a run."""

    def begin(self, first: int, last: int) -> None:
        """Start the steps [first, last) in the other processes; the caller runs them too."""

    def parallel_for(self, work: Work, jobs: Iterable[Any]) -> None:
        """Call `work` once for each job; returns when all calls are done."""

    def close(self) -> None:
        """End the other threads or processes. Closing twice does nothing."""


def shared_array(count: int) -> Array:
    """`count` zero bytes of memory that is shared with processes forked later."""
    return np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8)[:count]


def may_fork() -> bool:
    """Whether forking is safe: on Linux, and no other Python thread runs in this process."""
    return sys.platform == "linux" and threading.active_count() == 1


class ThreadCrew:
    """The calling thread and `count` - 1 others.

    A thread takes jobs from a common queue until it is empty, so that it is woken once for each
    loop, not for each job.
    """

    def __init__(self, count: int) -> None:
        self._others = count - 1
        self._pool = ThreadPoolExecutor(self._others, "emulate") if self._others else None

    def begin(self, first: int, last: int) -> None:
        """Nothing to do: the other threads run no steps, only jobs."""

    def parallel_for(self, work: Work, jobs: Iterable[Any]) -> None:
        """Call `work` once for each job, and raise the error of any call."""
        queue = iter(list(jobs))  # next() of a list iterator is atomic under the GIL

        def drain() -> None:
            for job in queue:
                work(job)

        futures = []
        if self._pool is not None:
            try:
                futures = [self._pool.submit(drain) for _ in range(self._others)]
            except RuntimeError as error:
                raise DeviceError(f"the emulation stopped: {error}") from error
        try:
            drain()
        finally:
            for future in futures:
                future.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


class ProcessCrew:
    """This process and `count` - 1 children forked from it, which run `steps` in lockstep.

    Raises:
        OSError: the system does not let a process be forked.
    """

    def __init__(self, steps: Sequence[ParallelStep], count: int) -> None:
        self._steps, self._count = steps, count
        self._tickets = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        """One shared counter: the next ticket. It is never reset."""
        self._lock = get_context("fork").Lock()
        self._loop_start = 0
        """The counter's value at the end of the last loop: the first ticket of the next one."""
        self._parent = os.getpid()
        self._pipes: list[int] = []
        """The ends of pipes that commands are written to, one for each child."""
        self._children: list[int] = []
        self._finalizer = weakref.finalize(
            self, _end_children, self._parent, self._pipes, self._children
        )
        try:
            for _ in range(count - 1):
                self._fork_child()
        except BaseException:
            self.close()
            raise

    def begin(self, first: int, last: int) -> None:
        """Start the steps [first, last) in the children.

        Raises:
            DeviceError: a child has ended.
        """
        for pipe in self._pipes:
            try:
                os.write(pipe, COMMAND.pack(first, last))
            except OSError as error:
                raise self._lost_child() from error

    def parallel_for(self, work: Work, jobs: Iterable[Any]) -> None:
        """Call `work` for some of the jobs, and wait until the other processes did the rest.

        Raises:
            DeviceError: a child has ended, or does not reach the barrier in time.
        """
        jobs = list(jobs)
        while (ticket := self._draw_ticket()) < len(jobs):
            work(jobs[ticket])
        # a process draws one ticket more than it has jobs: that tells the others it is done
        self._loop_start += len(jobs) + self._count
        polls = 0
        while self._tickets[0] < self._loop_start:
            polls += 1
            if polls > SPINS:
                time.sleep(SLEEP_SECONDS)
                if polls % SLEEPS_PER_CHECK == 0:
                    self._check_others((polls - SPINS) * SLEEP_SECONDS)
        with self._lock:
            pass  # a memory barrier: what the others wrote before they drew is visible from here

    def close(self) -> None:
        """End the children. Closing twice does nothing."""
        self._finalizer()

    def _draw_ticket(self) -> int:
        """The next ticket, counted from the start of this loop."""
        if not self._lock.acquire(timeout=STALL_SECONDS):
            raise self._lost_child()
        try:
            ticket: int = self._tickets[0]
            self._tickets[0] = ticket + 1
        finally:
            self._lock.release()
        return ticket - self._loop_start

    def _check_others(self, waited: float) -> None:
        """Raise if a child has ended or the wait is too long; a child exits without its parent."""
        if os.getpid() != self._parent:
            if os.getppid() != self._parent:
                os._exit(1)
        elif waited > STALL_SECONDS or any(map(_has_ended, self._children)):
            raise self._lost_child()

    def _lost_child(self) -> DeviceError:
        ended = " and ".join(str(child) for child in self._children if _has_ended(child))
        what = f"process {ended} has ended" if ended else f"no answer in {STALL_SECONDS:g} s"
        return DeviceError(
            f"the emulation lost a child process: {what}. Perhaps it was killed, or memory is "
            "short. The next run starts a new one; Emulation(cores=1) needs none"
        )

    def _fork_child(self) -> None:
        read_end, write_end = os.pipe()
        self._pipes.append(write_end)
        # a child leaves Ctrl-C and SIGTERM to the parent, and ends when the parent does
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                # Python warns of forking with native threads; the child calls only numpy
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                self._run_child(read_end)
            self._children.append(child)
        finally:
            os.close(read_end)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _run_child(self, commands: int) -> NoReturn:
        """Run the steps of each command until the pipe is closed or the parent has ended."""
        try:
            gc.disable()  # the child must not run finalizers of the parent's objects
            # close inherited files: sockets, pipes of other crews. Else they stay open when the
            # parent closes them
            most = os.sysconf("SC_OPEN_MAX")
            os.closerange(3, commands)
            os.closerange(commands + 1, most if most > 0 else 1 << 16)
            poller = select.poll()  # select() takes no descriptor above 1023
            poller.register(commands, select.POLLIN)
            while os.getppid() == self._parent:
                if not poller.poll(1e3 * PARENT_CHECK_SECONDS):
                    continue
                command = os.read(commands, COMMAND.size)
                if not command:
                    break
                first, last = COMMAND.unpack(command)
                for step in self._steps[first:last]:
                    step.run(self.parallel_for)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(0)


def _has_ended(child: int) -> bool:
    """Whether a child has ended. It is not reaped: its process id stays taken."""
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _end_children(parent: int, pipes: list[int], children: list[int]) -> None:
    if os.getpid() != parent:  # a fork of the parent, perhaps by other code: not its children
        return
    for pipe in pipes:
        os.close(pipe)
    for child in children:
        with contextlib.suppress(OSError):  # other code has reaped it
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    pipes.clear()
    children.clear()
