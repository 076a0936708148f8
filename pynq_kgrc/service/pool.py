"""The pool of worker processes: which are idle, which programs they have, and their replacement.

A worker executes one command at a time; requests wait for an idle worker in a FIFO queue. A worker
that dies or does not answer in time is killed and replaced. If it died, its clip is tried once
more on another worker; if it hung, the clip is refused, because it may hang the next device too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pynq_kgrc.errors import DeviceError, KgrcError, ProgramError
from pynq_kgrc.service import wire
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.waiting import within
from pynq_kgrc.service.wire import Answer, Command, LayerRun, ProgramDocument

log = logging.getLogger("pynq_kgrc.service")

START_SECONDS = 120.0
"""Time limit for a worker to start, and for each program to load."""
LOAD_SECONDS = 120.0
PING_SECONDS = 10.0


class Died(DeviceError):
    """The worker's process ended before it answered."""


class Hung(DeviceError):
    """The worker did not answer in time."""


@dataclass(frozen=True)
class ClipRun:
    """The result of a clip on a worker."""

    scores: bytes
    """float32 [2, classes], little-endian: logits, then probabilities."""
    seconds: float
    """Time of the clip in the worker."""
    waited: float
    """Seconds until a worker was idle."""
    layers: list[LayerRun]


class Worker:
    """One worker process, seen from the service."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, backend: str) -> Worker:
        """Start a process; it has no program yet."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pynq_kgrc.service.worker",
            backend,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=1 << 20,
        )
        if process.stdin is not None:
            wire.enlarge_pipe(process.stdin.get_extra_info("pipe").fileno())
        return cls(process)

    async def call(
        self, command: Command, payload: bytes | memoryview, seconds: float
    ) -> tuple[Answer, bytes]:
        """Send a command and wait for the answer.

        Raises:
            Died, Hung: the worker cannot be used any more.
            KgrcError: why the worker could not execute the command.
        """
        try:
            return await within(self._exchange(command, payload), seconds)
        except asyncio.TimeoutError:
            raise Hung(f"no answer to {command.verb} within {seconds:g} s") from None

    async def _exchange(
        self, command: Command, payload: bytes | memoryview
    ) -> tuple[Answer, bytes]:
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise Died("the worker has no pipes")
        try:
            stdin.write(wire.pack_head(command, len(payload)))
            if payload:
                stdin.write(payload)
            await stdin.drain()
        except ConnectionError:
            raise Died("the worker's process ended") from None
        message = await wire.read(stdout, Answer)
        if message is None:
            raise Died("the worker's process ended")
        answer, body = message
        if answer.error:
            kind = {"ProgramError": ProgramError, "DeviceError": DeviceError}
            raise kind.get(answer.kind, KgrcError)(answer.error)
        return answer, body

    async def stop(self, seconds: float = 0.0) -> None:
        """End the process: close its input, wait at most `seconds`, then kill it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if seconds:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self.process.wait(), seconds)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class Pool:
    """`size` workers on one backend, all with the same programs."""

    def __init__(self, backend: str, size: int, clip_seconds: float) -> None:
        self.backend, self.size, self.clip_seconds = backend, size, clip_seconds
        self.programs: dict[str, Path] = {}
        self.restarts = 0
        self.unavailable_reason = "no worker has started yet"
        """Why no worker is running; empty while one is."""
        self.on_run: Callable[[str, ClipRun], None] = lambda key, run: None
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._workers: set[Worker] = set()
        self._restarts: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Lock()
        self._closed = False
        self._broken = asyncio.Event()
        """Set while no worker runs and the last attempt to start one failed."""

    @property
    def idle(self) -> int:
        """Number of workers that execute no command."""
        return self._idle.qsize()

    async def start(self) -> None:
        """Start all workers.

        Raises:
            DeviceError: a worker did not start.
        """
        for _ in range(self.size):
            self._add(await self._start_worker())

    async def stop(self) -> None:
        """End all workers and wait for their exit."""
        self._closed = True
        for task in list(self._restarts):
            task.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)
        await asyncio.gather(*(worker.stop(seconds=2.0) for worker in self._workers))

    async def run(self, key: str, frames: bytes | memoryview) -> ClipRun:
        """Run a clip on the next idle worker.

        Args:
            key: key of the program.
            frames: uint8 [D, H, W, 3].

        Raises:
            Refusal: 503, no worker is idle in time, one hung, or two died.
            ProgramError: the clip does not fit the program.
        """
        asked = time.perf_counter()
        for _ in range(2):
            worker = await self._acquire()
            waited = time.perf_counter() - asked
            # shielded: if the caller is cancelled, the clip still finishes and frees the worker
            running = asyncio.get_running_loop().create_task(self._run_on(worker, key, frames))
            running.add_done_callback(_retrieve_error)
            try:
                answer, body = await asyncio.shield(running)
            except Hung as error:
                raise Refusal(503, f"the device hung ({error}) and is restarted", 5) from error
            except Died:
                continue
            except DeviceError as error:
                raise Refusal(503, f"the device failed: {error}", 5) from error
            run = ClipRun(body, answer.seconds, waited, answer.layers)
            self.on_run(key, run)
            return run
        raise Refusal(503, "the device failed twice on this clip", 5)

    async def _run_on(
        self, worker: Worker, key: str, frames: bytes | memoryview
    ) -> tuple[Answer, bytes]:
        """Run a clip on this worker; then make it idle again, or replace it if it failed."""
        try:
            answer = await worker.call(Command("run", key), frames, self.clip_seconds)
        except BaseException as error:
            if isinstance(error, KgrcError) and not isinstance(error, DeviceError):
                self._release(worker)  # the clip was wrong, not the device
            else:
                self._replace(worker)
            raise
        self._release(worker)
        return answer

    async def load(self, key: str, path: Path) -> ProgramDocument:
        """Load a program in all workers; its description.

        Raises:
            ProgramError: a worker refused it; then all workers drop it.
            Refusal: 503, a worker is not available.
        """
        async with self._loading:
            workers = [await self._acquire() for _ in range(self.size)]
            description: ProgramDocument | None = None
            failed: KgrcError | None = None
            usable = set(workers)
            for worker in workers:
                try:
                    command = Command("load", key, str(path))
                    answer, _ = await worker.call(command, b"", LOAD_SECONDS)
                    description = answer.program
                except KgrcError as error:
                    failed = error
                    if isinstance(error, DeviceError):
                        usable.discard(worker)
                    break
            if failed is None:
                self.programs[key] = path
            for worker in workers:
                if worker in usable:
                    self._release(worker)
                else:
                    self._replace(worker)
        if failed is not None:
            await self.drop(key)
            raise failed
        if description is None:
            raise DeviceError("a worker loaded a program and did not describe it")
        return description

    async def drop(self, key: str) -> None:
        """Drop a program in all workers; a worker that is being replaced will not load it."""
        self.programs.pop(key, None)
        async with self._loading:
            workers = [await self._acquire() for _ in range(self.size)]
            for worker in workers:
                try:
                    await worker.call(Command("drop", key), b"", LOAD_SECONDS)
                except KgrcError:
                    self._replace(worker)
                else:
                    self._release(worker)

    async def probe(self) -> None:
        """Health check: ping an idle worker, and replace it if it does not answer."""
        if self._idle.empty():
            return
        worker = self._idle.get_nowait()
        try:
            await worker.call(Command("ping"), b"", PING_SECONDS)
        except KgrcError:
            self._replace(worker)
        except BaseException:
            self._replace(worker)
            raise
        else:
            self._release(worker)

    async def _acquire(self) -> Worker:
        """Wait for an idle worker, and take it.

        Raises:
            Refusal: 503, none became idle within the time limits of a clip and of a start.
        """
        if self._closed:
            raise Refusal(503, "the service is stopping", 5)
        limit = self.clip_seconds + START_SECONDS
        loop = asyncio.get_running_loop()
        getting = loop.create_task(self._idle.get())
        breaking = loop.create_task(self._broken.wait())
        try:
            await asyncio.wait(
                {getting, breaking}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
            )
            if getting.done():
                return getting.result()
        except asyncio.CancelledError:
            if getting.done():
                self._release(getting.result())
            raise
        finally:
            getting.cancel()
            breaking.cancel()
        if self._broken.is_set():
            raise Refusal(503, self.unavailable_reason, 5)
        why = self.unavailable_reason or "all are busy"
        raise Refusal(503, f"no worker within {limit:g} s: {why}", 30)

    async def _start_worker(self) -> Worker:
        worker = await Worker.start(self.backend)
        try:
            await worker.call(Command("ping"), b"", START_SECONDS)
            for key, path in list(self.programs.items()):
                await worker.call(Command("load", key, str(path)), b"", START_SECONDS)
        except BaseException:
            await worker.stop()
            raise
        return worker

    def _add(self, worker: Worker) -> None:
        self._workers.add(worker)
        self.unavailable_reason = ""
        self._broken.clear()
        self._idle.put_nowait(worker)

    def _release(self, worker: Worker) -> None:
        self._idle.put_nowait(worker)

    def _replace(self, worker: Worker) -> None:
        """Kill a worker and start another one, with exponential back-off until one starts."""
        self._workers.discard(worker)
        if not self._workers:
            self.unavailable_reason = "the worker is being restarted"
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.process.pid, 9)
        task = asyncio.get_running_loop().create_task(self._restart(worker))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _restart(self, old: Worker) -> None:
        await old.stop()
        pause = 0.5
        while not self._closed:
            self.restarts += 1
            log.warning("worker restarted", extra={"restarts": self.restarts})
            try:
                self._add(await self._start_worker())
                return
            except KgrcError as error:
                if not self._workers:
                    self._broken.set()
                    self.unavailable_reason = f"the worker does not start: {error}"
                log.error("worker does not start", extra={"reason": str(error)})
            await asyncio.sleep(pause)
            pause = min(2.0, 2 * pause)


def _retrieve_error(task: asyncio.Task[tuple[Answer, bytes]]) -> None:
    """Retrieve a task's exception; asyncio would log one that nobody awaits as never retrieved."""
    if not task.cancelled():
        task.exception()
