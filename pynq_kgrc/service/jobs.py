"""Videos at work: how many, in which order, who waits for them, and what became of them.

Every video is a job. Who sent it waits for the result; if that takes long, the job gets an address
and goes on by itself. Only such jobs are written down (sqlite), so that after a restart whoever
asks learns that a job is lost, rather than that it never was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from pynq_kgrc.errors import KgrcError
from pynq_kgrc.service.refusal import Refusal, refusal_of
from pynq_kgrc.service.waiting import within

log = logging.getLogger("pynq_kgrc.service")

FINAL = ("done", "failed", "cancelled", "lost")
MAX_KEPT = 10_000
"""Jobs in the database; the oldest go first."""
MAX_RETRY_SECONDS = 60
"""Nobody is told to stay away for longer."""

Report = Callable[[dict[str, Any]], None]
Work = Callable[[Report], Awaitable[dict[str, Any]]]


class Admission:
    """So many requests at a time; the next one is refused at once, and told when to come again.

    Who is refused is told to come when those refused before have had their turn. If all were told
    the same, they would all come back together, and be refused again.
    """

    def __init__(self, limit: int, what: str) -> None:
        self.limit, self.what = limit, what
        self.inside = 0
        self.refused = 0
        self._mean_seconds = 1.0
        """Seconds that a request is inside, the recent ones more."""
        self._last_promise = 0.0
        """The moment that was promised last."""

    def check(self) -> None:
        """Refuse if there is no room.

        Raises:
            Refusal: 429 with Retry-After.
        """
        if self.inside >= self.limit:
            self.refused += 1
            now = time.monotonic()
            # where all places are taken, one gets free every so often
            moment = max(self._last_promise, now) + self._mean_seconds / self.limit
            self._last_promise = min(moment, now + MAX_RETRY_SECONDS)
            seconds = max(1, math.ceil(self._last_promise - now))
            raise Refusal(429, f"{self.inside} {self.what} are the most at a time", seconds)

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """A place, for as long as the context lasts.

        Raises:
            Refusal: 429, there is none.
        """
        self.check()
        self.inside += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self.inside -= 1
            self._mean_seconds += 0.1 * (time.monotonic() - began - self._mean_seconds)


class Job:
    """One video: its state, and whoever waits for the next."""

    def __init__(self) -> None:
        self.id = secrets.token_urlsafe(16)
        self.state = "queued"
        self.created = time.time()
        self.progress: dict[str, Any] = {"windows": 0, "frames": 0, "share": None}
        self.result: dict[str, Any] | None = None
        self.error: Refusal | None = None
        self.kept = False
        """Whether it has an address of its own."""
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def change(self, state: str | None = None, progress: dict[str, Any] | None = None) -> None:
        """A new state or progress, for all who wait."""
        self.state = state or self.state
        self.progress = progress or self.progress
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, seconds: float) -> None:
        """Wait for a change, or so long."""
        with contextlib.suppress(asyncio.TimeoutError):
            await within(self._changed.wait(), seconds)

    def document(self) -> dict[str, Any]:
        """As a client sees it."""
        return {
            "id": self.id,
            "state": self.state,
            "created": round(self.created, 3),
            "progress": self.progress,
            "result": self.result,
            "error": None if self.error is None else self.error.text,
        }


class Jobs:
    """All jobs of this service; opening it declares those of the last run lost.

    Args:
        path: the database.
        queue: how many may be unfinished.
        at_once: how many are worked on; one more than there are workers, so that the next video
            is decoded while this one is on the device.
        seconds: what one may take.
        keep_seconds: results are kept so long.
    """

    def __init__(
        self, path: Path, queue: Admission, at_once: int, seconds: float, keep_seconds: float
    ) -> None:
        self.queue, self.seconds, self.keep_seconds = queue, seconds, keep_seconds
        self.active: dict[str, Job] = {}
        self._running = asyncio.Semaphore(at_once)
        self._store = sqlite3.connect(path, isolation_level=None)
        self._store.execute("PRAGMA journal_mode=WAL")
        self._store.execute("PRAGMA synchronous=NORMAL")
        self._store.execute(
            "CREATE TABLE IF NOT EXISTS jobs "
            "(id TEXT PRIMARY KEY, state TEXT, created REAL, document BLOB)"
        )
        rows = self._store.execute("SELECT id, document FROM jobs WHERE state = 'running'")
        for key, document in rows.fetchall():
            lost = msgspec.json.decode(document)
            lost["state"] = "lost"
            lost["error"] = "the service was restarted before this job was done; send it again"
            self._put(key, "lost", lost["created"], lost)

    def close(self) -> None:
        """Close the database."""
        self._store.close()

    def submit(self, work: Work, close: Callable[[], None]) -> Job:
        """Start a job, or let it wait for its turn.

        Args:
            work: does it.
            close: is called when it is over, however it ends.

        Raises:
            Refusal: 429, too many are unfinished.
        """
        place = self.queue.enter()
        place.__enter__()
        job = Job()
        self.active[job.id] = job
        job.task = asyncio.get_running_loop().create_task(self._work(job, work))

        def over(_: asyncio.Task[None]) -> None:
            place.__exit__(None, None, None)
            close()
            self.active.pop(job.id, None)

        job.task.add_done_callback(over)
        return job

    async def _work(self, job: Job, work: Work) -> None:
        state = "failed"
        try:
            async with self._running:
                job.change("running")
                report: Report = lambda progress: job.change(progress=progress)  # noqa: E731
                job.result = await within(work(report), self.seconds)
            state = "done"
        except asyncio.CancelledError:
            state = "cancelled"
            job.error = Refusal(410, "cancelled")
        except asyncio.TimeoutError:
            job.error = Refusal(503, f"not done within {self.seconds:g} s", 60)
        except KgrcError as error:
            job.error = refusal_of(error)
        except Exception as error:
            log.exception("a job failed")
            job.error = Refusal(500, f"the service failed ({type(error).__name__}); see its log")
        job.change(state)
        if job.kept:
            try:
                self._put(job.id, job.state, job.created, job.document())
            except Refusal as error:  # whoever asks will read that it is lost
                log.error("a result cannot be kept", extra={"reason": error.text})

    def keep(self, job: Job) -> None:
        """Give a job an address: it goes on though nobody waits.

        Raises:
            Refusal: 507, it cannot be written down.
        """
        job.kept = True
        state = job.state if job.state in FINAL else "running"
        self._put(job.id, state, job.created, job.document())

    def find(self, key: str) -> tuple[dict[str, Any], Job | None]:
        """A job's document, and the job if it is unfinished.

        Raises:
            Refusal: 404, there is none, or its result is no longer kept.
        """
        job = self.active.get(key)
        if job is not None and job.kept and job.state not in FINAL:
            return job.document(), job
        query = "SELECT document FROM jobs WHERE id = ? AND created > ?"
        oldest = time.time() - self.keep_seconds - self.seconds
        row = self._store.execute(query, (key, oldest)).fetchone()
        if row is None:
            raise Refusal(404, f"no job {key[:50]!r}; results are kept for {self.keep_seconds:g} s")
        document: dict[str, Any] = msgspec.json.decode(row[0])
        return document, None

    async def events(self, key: str, every: float) -> AsyncIterator[dict[str, Any] | None]:
        """A job's document after each change, until it is final; none to show life in between."""
        document, job = self.find(key)
        if job is None:
            yield document
            return
        sent = None
        while sent is None or sent[0] not in FINAL:
            now = (job.state, job.progress)
            yield job.document() if now != sent else None
            sent = now
            if now == (job.state, job.progress) and job.state not in FINAL:
                await job.changed(every)

    def cancel(self, key: str) -> dict[str, Any]:
        """Stop a job, or forget its result; its document.

        Raises:
            Refusal: 404, there is none.
        """
        document, job = self.find(key)
        if job is None or job.task is None:
            self._store.execute("DELETE FROM jobs WHERE id = ?", (key,))
            return document
        job.task.cancel()
        return {**document, "state": "cancelled"}

    async def finish(self, seconds: float) -> None:
        """Wait so long for what is unfinished, then stop it; what was kept is lost, and says so."""
        tasks = [job.task for job in self.active.values() if job.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for job in list(self.active.values()):
            if job.task is None or job.task.done():
                continue
            job.task.cancel()
            await asyncio.wait([job.task], timeout=5)
            if job.kept:
                job.error = Refusal(410, "the service was stopped before this job was done")
                job.state = "lost"
                self._put(job.id, job.state, job.created, job.document())

    def _put(self, key: str, state: str, created: float, document: dict[str, Any]) -> None:
        try:
            self._store.execute(
                "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?)",
                (key, state, created, msgspec.json.encode(document)),
            )
            oldest = time.time() - self.keep_seconds - self.seconds
            self._store.execute("DELETE FROM jobs WHERE created < ?", (oldest,))
            self._store.execute(
                "DELETE FROM jobs WHERE id NOT IN "
                "(SELECT id FROM jobs ORDER BY created DESC LIMIT ?)",
                (MAX_KEPT,),
            )
        except sqlite3.Error as error:
            raise Refusal(507, f"the job cannot be written down: {error}", 60) from error
