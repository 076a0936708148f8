"""Jobs: admission control, the queue of videos, and the results that clients fetch later.

Every video is a job. The client waits for the result; if that takes long, the job gets an address
(long polling) and goes on without the client. Only such jobs are written to disk (sqlite): after a
restart, a request for a job that was not done is answered with `lost` instead of 404.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from pynq_kgrc.errors import ConfigError, KgrcError
from pynq_kgrc.results import WindowLabels
from pynq_kgrc.service.refusal import Refusal, refusal_of
from pynq_kgrc.service.schemas import Classification, JobDocument, ListedJob, Progress
from pynq_kgrc.service.waiting import within

log = logging.getLogger("pynq_kgrc.service")

FINAL = ("done", "failed", "cancelled", "lost")
LOST = "the service was restarted before this job was done; send it again"
MAX_KEPT = 10_000
"""Jobs in the database; beyond that the oldest are deleted."""
MAX_LISTED = 1000
"""Most jobs of a list."""
MAX_RETRY_SECONDS = 60
"""Largest Retry-After, in seconds."""

Report = Callable[[Progress, Sequence[WindowLabels]], None]
"""Called with the progress of a job and all clips classified so far."""
Work = Callable[[Report], Awaitable[Classification]]
"""Does a job."""


STARTED = time.time() - time.monotonic()


def now() -> float:
    """Seconds since 1970 by the clock as it was when this process started.

    A board without a battery sets its clock when it finds a network; results are not older then.
    """
    return STARTED + time.monotonic()


class Admission:
    """Back-pressure: admits `limit` requests at a time and refuses others at once.

    The last quarter of the places is for clients that hold less than an eighth of all places, so
    that one client, however slow, does not shut out the others. Clients of this machine may
    take all places; those of a proxy on this machine have their own addresses (server.py).

    Retry-After grows with the number already refused, so that the clients do not all return at
    the same time and are refused again (thundering herd).
    """

    def __init__(self, limit: int, what: str) -> None:
        self.limit, self.what = limit, what
        self.inside = 0
        self.refused = 0
        self._held: Counter[str] = Counter()
        """Address of a client -> places that it holds."""
        self._mean_seconds = 1.0
        """Moving average of the seconds that a request takes."""
        self._last_promise = 0.0
        """When the client that was refused last is to return, on the monotonic clock."""

    def check(self, client: str) -> None:
        """Refuse if the limit is reached; `client` is an address, or empty for this machine.

        Raises:
            Refusal: 429 with Retry-After.
        """
        free = self.limit - self.inside
        share = max(1, self.limit // 8)
        if free <= 0:
            text = f"{self.inside} {self.what} are the most at a time"
        elif client and free <= self.limit // 4 and self._held[client] >= share:
            text = (
                f"{self._held[client]} {self.what} of your address are under way; the last {free} "
                f"of {self.limit} places are for addresses with less than {share}"
            )
        else:
            return
        self.refused += 1
        now = time.monotonic()
        # with all places taken, one becomes free every mean / limit seconds
        moment = max(self._last_promise, now) + self._mean_seconds / self.limit
        self._last_promise = min(moment, now + MAX_RETRY_SECONDS)
        raise Refusal(429, text, max(1, math.ceil(self._last_promise - now)))

    @contextlib.contextmanager
    def enter(self, client: str) -> Iterator[None]:
        """Admit a request of a client for as long as the context lasts.

        Raises:
            Refusal: 429, the limit is reached.
        """
        self.check(client)
        self.inside += 1
        self._held[client] += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self.inside -= 1
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]
            self._mean_seconds += 0.1 * (time.monotonic() - began - self._mean_seconds)


class Budget:
    """Bytes of memory that requests share: who finds too few left waits for them, in order."""

    def __init__(self, total: int, what: str) -> None:
        self.total = self.left = total
        self.what = what
        self._turn = asyncio.Lock()
        self._returned = asyncio.Event()

    @contextlib.asynccontextmanager
    async def take(self, size: int, seconds: float) -> AsyncIterator[None]:
        """Have `size` bytes for as long as the context lasts.

        Raises:
            Refusal: 429, they were not left within `seconds`.
        """
        try:
            await within(self._wait(size), seconds)
        except asyncio.TimeoutError:
            raise Refusal(
                429, f"{self.what} of other requests take all of the {self.total} bytes", 5
            ) from None
        try:
            yield
        finally:
            self.left += size
            self._returned.set()

    async def _wait(self, size: int) -> None:
        async with self._turn:
            while self.left < size:
                self._returned.clear()
                await self._returned.wait()
            self.left -= size


class Job:
    """The job of one video: its state, progress and result."""

    def __init__(self, owner: str | None = None) -> None:
        self.owner = owner
        """Name of the key that sent it; None where any key that manages, or none, did."""
        self.id = secrets.token_urlsafe(16)
        self.state = "queued"
        self.created = now()
        self.progress = Progress(0, 0, None)
        self.windows: Sequence[WindowLabels] = ()
        self.result: Classification | None = None
        self.error: Refusal | None = None
        self.kept = False
        """Whether the job has an address, so that it is written to disk."""
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def report(self, progress: Progress, windows: Sequence[WindowLabels]) -> None:
        """Set the progress, and wake everyone who waits in `changed`."""
        self.progress, self.windows = progress, windows
        self.change(self.state)

    def change(self, state: str) -> None:
        """Set the state, and wake everyone who waits in `changed`."""
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, seconds: float) -> None:
        """Wait for a change, at most `seconds`."""
        with contextlib.suppress(asyncio.TimeoutError):
            await within(self._changed.wait(), seconds)

    def document(self) -> JobDocument:
        """The job as it is answered to clients."""
        return JobDocument(
            id=self.id,
            state=self.state,
            created=round(self.created, 3),
            progress=self.progress,
            result=self.result,
            error=None if self.error is None else self.error.text,
        )


class Jobs:
    """All jobs of this service. Opening the database marks unfinished jobs of an earlier run lost.

    Args:
        path: the database.
        queue: limits the number of unfinished jobs.
        at_once: jobs that run at the same time; one more than there are workers, so that the next
            video is decoded while this one is on the device.
        seconds: time limit of one job.
        keep_seconds: how long results are kept.

    A damaged database is renamed and logged, and an empty one takes its place.

    Raises:
        ConfigError: no database can be made there.
    """

    def __init__(
        self, path: Path, queue: Admission, at_once: int, seconds: float, keep_seconds: float
    ) -> None:
        self.queue, self.seconds, self.keep_seconds = queue, seconds, keep_seconds
        self.active: dict[str, Job] = {}
        self._running = asyncio.Semaphore(at_once)
        try:
            self._store = _open_store(path)
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            self._store = _open_anew(path, error)

    def close(self) -> None:
        """Close the database."""
        self._store.close()

    def submit(self, client: str, owner: str | None, work: Work, close: Callable[[], None]) -> Job:
        """Queue a job; it starts as soon as fewer than `at_once` others run.

        Args:
            client: address of who asks for it.
            owner: name of the key that alone may see it; None: keys that manage.
            work: does the job.
            close: called when the job has ended, whether it succeeded or not.

        Raises:
            Refusal: 429, too many jobs are unfinished.
        """
        admission = self.queue.enter(client)
        admission.__enter__()
        job = Job(owner)
        self.active[job.id] = job
        job.task = asyncio.get_running_loop().create_task(self._work(job, work))

        def ended(_: asyncio.Task[None]) -> None:
            admission.__exit__(None, None, None)
            close()
            self.active.pop(job.id, None)

        job.task.add_done_callback(ended)
        return job

    async def _work(self, job: Job, work: Work) -> None:
        state = "failed"
        try:
            async with self._running:
                job.change("running")
                job.result = await within(work(job.report), self.seconds)
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
                self._put(job)
            except Refusal as error:  # after a restart the job will be reported as lost
                log.error("a result cannot be kept", extra={"reason": error.text})

    def keep(self, job: Job) -> None:
        """Give a job an address: it continues although its client does not wait.

        Raises:
            Refusal: 507, it cannot be written to disk.
        """
        job.kept = True
        self._put(job)

    def listed(self, owner: str | None) -> list[ListedJob]:
        """The jobs that have an address, newest first; of one owner, or of all."""
        rows = self._store.execute(
            "SELECT id, state, created FROM jobs WHERE (? IS NULL OR owner = ?) AND created > ? "
            "ORDER BY created DESC LIMIT ?",
            (owner, owner, now() - self.keep_seconds - self.seconds, MAX_LISTED),
        )
        states = {job.id: job.state for job in self.active.values()}
        return [ListedJob(key, states.get(key, state), when) for key, state, when in rows]

    def find(
        self, key: str, owner: str | None = None, since: int | None = None
    ) -> tuple[JobDocument, Job | None]:
        """The document of a job, and the job itself if it is unfinished.

        Args:
            key: the id of the job.
            owner: whose jobs may be found; None: those of all.
            since: an unfinished job has the clips from this number on, which are classified
                already.

        Raises:
            Refusal: 404, there is no such job, or its result is no longer kept.
        """
        job = self.active.get(key)
        if job is not None and job.kept and job.state not in FINAL and owner in (None, job.owner):
            return self._unfinished(job, since), job
        query = (
            "SELECT document FROM jobs WHERE id = ? AND created > ? AND (? IS NULL OR owner = ?)"
        )
        oldest = now() - self.keep_seconds - self.seconds
        row = self._store.execute(query, (key, oldest, owner, owner)).fetchone()
        if row is None:
            raise Refusal(404, f"no job {key[:50]!r}; results are kept for {self.keep_seconds:g} s")
        try:
            return msgspec.json.decode(row[0], type=JobDocument), None
        except msgspec.MsgspecError as error:
            log.error("the document of a job is damaged", extra={"reason": str(error)})
            text = f"the result of job {key[:50]!r} is damaged; send it again"
            raise Refusal(404, text) from None

    def _unfinished(self, job: Job, since: int | None = None) -> JobDocument:
        """The document of an unfinished job, with its place in the queue."""
        document = job.document()
        if job.state == "queued":
            earlier = itertools.takewhile(lambda other: other is not job, self.active.values())
            ahead = sum(other.state == "queued" for other in earlier)
            document = msgspec.structs.replace(document, ahead=ahead)
        if since is not None:
            document = msgspec.structs.replace(document, windows=tuple(job.windows[since:]))
        return document

    async def events(
        self, key: str, owner: str | None, every: float
    ) -> AsyncIterator[JobDocument | None]:
        """A job's document after each change, until its state is final.

        Each has the clips that were classified since the one before. Yields None after `every`
        seconds without a change, for a heartbeat.
        """
        document, job = self.find(key, owner)
        if job is None:
            yield document
            return
        sent, shown = None, 0
        while sent is None or sent[0] not in FINAL:
            state = (job.state, job.progress)
            if state == sent:
                yield None
            else:
                document = self._unfinished(job, shown)
                shown += len(document.windows)
                yield document
            sent = state
            if state == (job.state, job.progress) and job.state not in FINAL:
                await job.changed(every)

    def cancel(self, key: str, owner: str | None = None) -> JobDocument:
        """Cancel a job, or delete its result; the document of the job.

        Raises:
            Refusal: 404, there is no such job.
        """
        document, job = self.find(key, owner)
        if job is None or job.task is None:
            self._store.execute("DELETE FROM jobs WHERE id = ?", (key,))
            return document
        job.task.cancel()
        return msgspec.structs.replace(document, state="cancelled")

    async def finish(self, seconds: float) -> None:
        """Wait at most `seconds` for unfinished jobs, then cancel them; kept ones become `lost`."""
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
                self._put(job)

    def _put(self, job: Job) -> None:
        try:
            _put(self._store, job.id, job.document(), job.owner)
            oldest = now() - self.keep_seconds - self.seconds
            self._store.execute("DELETE FROM jobs WHERE created < ?", (oldest,))
            self._store.execute(
                "DELETE FROM jobs WHERE id NOT IN "
                "(SELECT id FROM jobs ORDER BY created DESC LIMIT ?)",
                (MAX_KEPT,),
            )
        except sqlite3.Error as error:
            raise Refusal(507, f"the job cannot be written to disk: {error}", 60) from error


def _open_store(path: Path) -> sqlite3.Connection:
    """The database of jobs, made if it is missing; jobs that were not done become `lost`.

    Raises:
        sqlite3.Error: it cannot be opened, or is damaged.
        msgspec.MsgspecError: a document in it is damaged.
    """
    store = sqlite3.connect(path, isolation_level=None)
    try:
        store.execute("PRAGMA journal_mode=WAL")
        store.execute("PRAGMA synchronous=NORMAL")
        store.execute(
            "CREATE TABLE IF NOT EXISTS jobs "
            "(id TEXT PRIMARY KEY, state TEXT, created REAL, document BLOB, owner TEXT)"
        )
        columns = [row[1] for row in store.execute("PRAGMA table_info(jobs)")]
        if "owner" not in columns:  # of an earlier release
            store.execute("ALTER TABLE jobs ADD COLUMN owner TEXT")
        (found,) = store.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        query = "SELECT id, document, owner FROM jobs WHERE state = 'running'"
        for key, document, owner in store.execute(query).fetchall():
            job = msgspec.json.decode(document, type=JobDocument)
            _put(store, key, msgspec.structs.replace(job, state="lost", error=LOST), owner)
    except BaseException:
        store.close()
        raise
    return store


def _open_anew(path: Path, error: Exception) -> sqlite3.Connection:
    """An empty database in the place of a damaged one, which is renamed (with its journals).

    Power cuts damage files on SD cards. An older `.damaged` is replaced.

    Raises:
        ConfigError: it is not damaged but cannot be used, or cannot be renamed.
    """
    aside = path.with_name(f"{path.name}.damaged")
    try:
        if isinstance(error, sqlite3.OperationalError):  # such as: no right to write
            raise error
        for end in ("", "-wal", "-shm"):
            Path(f"{aside}{end}").unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                Path(f"{path}{end}").rename(f"{aside}{end}")
        store = _open_store(path)
    except (OSError, sqlite3.Error) as worse:
        raise ConfigError(
            f"{path}: cannot be used as the database of jobs ({worse}); give another --state"
        ) from worse
    log.error(
        "the database of jobs was damaged: results of earlier jobs are lost, the file is kept",
        extra={"reason": str(error), "kept": aside.name},
    )
    return store


def _put(store: sqlite3.Connection, key: str, document: JobDocument, owner: str | None) -> None:
    state = document.state if document.state in FINAL else "running"
    store.execute(
        "INSERT OR REPLACE INTO jobs (id, state, created, document, owner) VALUES (?, ?, ?, ?, ?)",
        (key, state, document.created, msgspec.json.encode(document), owner),
    )
