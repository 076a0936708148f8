"""The workers, seen from the service: who is idle, what is loaded, and what happens when one dies.

A worker serves one order at a time. Whoever needs one waits in line, first come first served. A
worker that dies or does not answer in time is replaced; the clip it had is tried once more if it
died, and is refused if it hung (the next device might hang as well).
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
from typing import Any

from pynq_kgrc.errors import DeviceError, KgrcError, ProgramError
from pynq_kgrc.service import wire
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.waiting import within
from pynq_kgrc.service.wire import Answer, Command

log = logging.getLogger("pynq_kgrc.service")

START_SECONDS = 120.0
"""A worker may take so long to start and to load all programs."""
LOAD_SECONDS = 120.0
PING_SECONDS = 10.0


class Died(DeviceError):
    """The worker's process ended before it answered."""


class Hung(DeviceError):
    """The worker did not answer in time."""


@dataclass(frozen=True)
class ClipRun:
    """What a worker found in a clip."""

    values: bytes
    """float32 [2, classes], little-endian: logits, then probabilities."""
    seconds: float
    waited: float
    """Seconds until a worker was free."""
    layers: list[dict[str, Any]]


class Worker:
    """One worker's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, backend: str) -> Worker:
        """A new process, which has no program yet."""
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

    async def call(self, order: Command, payload: bytes, seconds: float) -> tuple[Answer, bytes]:
        """Send an order and wait for the answer.

        Raises:
            Died, Hung: and the worker is of no more use.
            KgrcError: what the worker could not do.
        """
        try:
            return await within(self._exchange(order, payload), seconds)
        except asyncio.TimeoutError:
            raise Hung(f"no answer to {order.verb} within {seconds:g} s") from None

    async def _exchange(self, order: Command, payload: bytes) -> tuple[Answer, bytes]:
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise Died("the worker has no pipes")
        try:
            stdin.write(wire.pack_head(order, len(payload)))
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
        """End the process: by closing its input if it may take some time, else at once."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if seconds:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self.process.wait(), seconds)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class Pool:
    """So many workers on one kind of backend, all with the same programs."""

    def __init__(self, backend: str, size: int, clip_seconds: float) -> None:
        self.backend, self.size, self.clip_seconds = backend, size, clip_seconds
        self.programs: dict[str, Path] = {}
        self.restarts = 0
        self.unavailable_reason = "no worker has started yet"
        """Why there is no worker, in words; empty while there is one."""
        self.on_run: Callable[[ClipRun], None] = lambda run: None
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()
        self._workers: set[Worker] = set()
        self._revivals: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Lock()
        self._closed = False
        self._broken = asyncio.Event()
        """Whether there is no worker, and the last attempt to start one failed."""

    @property
    def ready(self) -> bool:
        """Whether a worker is there that has answered its last order."""
        return not self.unavailable_reason

    @property
    def idle(self) -> int:
        """Workers that have nothing to do."""
        return self._idle.qsize()

    async def start(self) -> None:
        """Start all workers.

        Raises:
            DeviceError: one did not come up.
        """
        for _ in range(self.size):
            self._add(await self._start_worker())

    async def stop(self) -> None:
        """End all workers and wait for them."""
        self._closed = True
        for task in list(self._revivals):
            task.cancel()
        await asyncio.gather(*self._revivals, return_exceptions=True)
        await asyncio.gather(*(worker.stop(seconds=2.0) for worker in self._workers))

    def pids(self) -> list[int]:
        """The processes of the workers."""
        return [worker.process.pid for worker in self._workers]

    async def run(self, key: str, frames: bytes) -> ClipRun:
        """ClipRun a clip on the next free worker.

        Args:
            key: of the program.
            frames: uint8 [D, H, W, 3].

        Raises:
            Refusal: 503, no worker, or one that hung, or two that died.
            ProgramError: the clip does not fit the program.
        """
        asked = time.perf_counter()
        for _ in range(2):
            worker = await self._acquire()
            waited = time.perf_counter() - asked
            # whoever stops waiting leaves the clip running: the worker is free when it is done
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
            self.on_run(run)
            return run
        raise Refusal(503, "the device failed twice on this clip", 5)

    async def _run_on(self, worker: Worker, key: str, frames: bytes) -> tuple[Answer, bytes]:
        """ClipRun a clip on this worker, and take it back."""
        try:
            answer = await worker.call(Command("run", key), frames, self.clip_seconds)
        except BaseException as error:
            if isinstance(error, KgrcError) and not isinstance(error, DeviceError):
                self._release(worker)  # the clip was at fault, not the device
            else:
                self._replace(worker)
            raise
        self._release(worker)
        return answer

    async def load(self, key: str, path: Path) -> dict[str, Any]:
        """Load a program in all workers; its description.

        Raises:
            ProgramError: one refused it; then none keeps it.
            Refusal: 503, a worker is not there to load it.
        """
        async with self._loading:
            workers = [await self._acquire() for _ in range(self.size)]
            description: dict[str, Any] = {}
            failed: KgrcError | None = None
            usable = set(workers)
            for worker in workers:
                try:
                    order = Command("load", key, str(path))
                    answer, _ = await worker.call(order, b"", LOAD_SECONDS)
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
        return description

    async def drop(self, key: str) -> None:
        """Forget a program in all workers; those that are being replaced never learn of it."""
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
        """Ask an idle worker whether it lives; one that does not is replaced."""
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
        """The next free worker.

        Raises:
            Refusal: 503, there has been none for as long as a clip may take.
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
        """Kill a worker and start another, as often as it takes."""
        self._workers.discard(worker)
        if not self._workers:
            self.unavailable_reason = "the worker is being restarted"
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.process.pid, 9)
        task = asyncio.get_running_loop().create_task(self._revive(worker))
        self._revivals.add(task)
        task.add_done_callback(self._revivals.discard)

    async def _revive(self, old: Worker) -> None:
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
    """A task whose error nobody waits for any more is no news."""
    if not task.cancelled():
        task.exception()
