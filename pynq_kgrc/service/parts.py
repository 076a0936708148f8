"""The parts of a running service: how they are started, used for a request, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response

from pynq_kgrc.errors import ConfigError, KgrcError
from pynq_kgrc.service.catalogue import Catalogue, ServedProgram
from pynq_kgrc.service.guard import client_of
from pynq_kgrc.service.jobs import Admission, Budget, Job, Jobs, Report
from pynq_kgrc.service.metrics import Metrics
from pynq_kgrc.service.options import Options
from pynq_kgrc.service.pool import ClipRun, Pool
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.schemas import Classification, StructResponse
from pynq_kgrc.service.server import Server
from pynq_kgrc.service.settings import Settings
from pynq_kgrc.service.tensors import (
    HEADER_LENGTH,
    MAX_BATCH,
    MAX_HEAD,
    MAX_JSON,
    InferRequest,
    read_body,
    split_clips,
)
from pynq_kgrc.service.uploads import Room, Upload, receive_upload
from pynq_kgrc.service.videos import Decoder, check_options, classify
from pynq_kgrc.service.wire import BodyRequest

log = logging.getLogger("pynq_kgrc.service")

SHORT_JSON = 1 << 18
"""Largest JSON body that is read by the process that answers; it takes a few milliseconds."""
PROBE_SECONDS = 10.0
"""Seconds between two health checks of idle workers."""


class Service:
    """All parts of a service, and the order in which they start and stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.pool = Pool(settings.backend, settings.workers, settings.clip_seconds)
        self.decoder = Decoder()
        self.queue = Admission(settings.queue, "videos or inferences")
        self.uploads = Admission(settings.uploads, "uploads")
        self.live = Admission(settings.live, "live sessions")
        self.bodies = Budget(settings.infer_bytes, "inference bodies")
        self.room = Room(settings.state, settings.free_bytes)
        self.server: Server | None = None
        self.confined: list[str] = []
        """What a process that decodes a video cannot do on this machine."""
        self._probing: asyncio.Task[None] | None = None
        self._lock = self._open_state(settings.state)
        self.catalogue = Catalogue(
            self.pool, settings.state, settings.programs, settings.repository
        )
        self.jobs = Jobs(
            settings.state / "jobs.sqlite",
            self.queue,
            settings.workers + 1,
            settings.job_seconds,
            settings.keep_seconds,
        )
        self.pool.on_run = self._count_run
        self.metrics.now = self._metrics_now

    def _open_state(self, folder: Path) -> int:
        """Lock the state folder and delete the program copies that a killed service left there.

        Raises:
            ConfigError: it cannot be written, or another service uses it.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            copies = folder / "programs"
            copies.mkdir(exist_ok=True)
            for left in copies.iterdir():
                left.unlink()
        except BlockingIOError as error:
            raise ConfigError(
                f"--state {folder}: another service uses it; give this one a folder of its own"
            ) from error
        except OSError as error:
            raise ConfigError(f"--state {folder}: {error.strerror}") from error
        return lock

    def _count_run(self, key: str, run: ClipRun) -> None:
        name, _, version = key.rpartition("@")
        self.metrics.model(name, version).count(run)
        self.metrics.clip_seconds.observe(run.seconds)
        self.metrics.wait_seconds.observe(run.waited)

    def _metrics_now(self) -> dict[str, tuple[str, float]]:
        refused = sum(place.refused for place in (self.queue, self.uploads, self.live))
        states = Counter(job.state for job in self.jobs.active.values())
        return {
            "kgrc_refused_total": ("Requests refused because all places were taken", refused),
            "kgrc_worker_restarts_total": ("Attempts to replace a worker", self.pool.restarts),
            "kgrc_at_work": ("Videos and inferences waiting or running", self.queue.inside),
            "kgrc_queue_limit": ("Limit of kgrc_at_work", self.queue.limit),
            "kgrc_uploads": ("Bodies that are being received", self.uploads.inside),
            "kgrc_live_sessions": ("Live sessions", self.live.inside),
            "kgrc_jobs_queued": ("Videos that wait for their turn", states["queued"]),
            "kgrc_jobs_running": ("Videos that are being classified", states["running"]),
            "kgrc_workers_idle": ("Idle workers", self.pool.idle),
            "kgrc_ready": (
                "1 if requests can be served, else 0",
                0 if self.unavailable_reason() else 1,
            ),
        }

    async def start(self) -> None:
        """Start the processes and load the programs.

        Raises:
            KgrcError: a process does not start, or a program is refused.
        """
        try:
            self.decoder.start()
            self.confined = await self.decoder.confined()
            await self.pool.start()
            for name in self.settings.programs:
                await self.catalogue.load(name)
            if self.settings.load_all:
                await self._load_folder()
        except BaseException:
            await self.stop()
            raise
        self._probing = asyncio.get_running_loop().create_task(self._probe())

    async def _load_folder(self) -> None:
        """Load the programs of the folder; one that is refused is logged and not served.

        Raises:
            KgrcError: there is none that can be served.
        """
        refused: KgrcError | None = None
        for name in self.catalogue.sources():
            if name not in self.catalogue.served:
                try:
                    await self.catalogue.load(name)
                except KgrcError as error:
                    refused = error
                    log.error("program not loaded", extra={"program": name, "error": str(error)})
        if refused is not None and not self.catalogue.served:
            raise refused

    async def stop(self) -> None:
        """Finish the accepted jobs within the grace period, then end all processes."""
        if self._probing is not None:
            self._probing.cancel()
        await self.jobs.finish(self.settings.grace_seconds)
        self.decoder.stop()
        await self.pool.stop()
        self.jobs.close()
        os.close(self._lock)

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            await self.pool.probe()

    @property
    def draining(self) -> bool:
        """Whether the service is about to stop."""
        return self.server is not None and self.server.draining

    def unavailable_reason(self) -> str:
        """Why the service cannot answer requests now; empty if it can."""
        if self.draining:
            return "the service is stopping"
        if self.pool.unavailable_reason:
            return self.pool.unavailable_reason
        return "" if self.catalogue.served else "no program is loaded"

    async def while_connected(self, request: Request, work: Awaitable[Any]) -> Any:
        """Await `work`, and cancel it if the client disconnects.

        Raises:
            Refusal: the client disconnected; nobody will read this answer.
        """
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Refusal(408, "the client disconnected")
            return task.result()
        finally:
            leaving.cancel()
            task.cancel()
            await asyncio.gather(leaving, task, return_exceptions=True)

    async def receive(self, request: Request) -> Upload:
        """Store the body of a request in a file.

        If the queue is full, the request is refused before its body is read.

        Raises:
            Refusal: 415, 429, 507, or what is wrong with the body.
        """
        client = client_of(request.scope)
        self.queue.check(client)
        encoding = encoding_of(request)
        if encoding:
            raise Refusal(
                415,
                f"Content-Encoding {encoding[:30]!r} of a video; accepted is identity: send the "
                f"file as it is",
                close=True,
            )
        with self.uploads.enter(client):
            expected = int(request.headers.get("content-length", "0") or 0)
            kind = request.headers.get("content-type", "")
            return await receive_upload(request.stream(), kind, expected, self.room)

    @contextlib.asynccontextmanager
    async def receive_inference(
        self, request: Request, program: ServedProgram
    ) -> AsyncIterator[tuple[InferRequest, list[memoryview]]]:
        """The JSON part and the clips of an inference request, for as long as the context lasts.

        A short or a binary body is read in memory; a long JSON tensor or a compressed body is
        stored in a file and read by a decoder child.

        Raises:
            Refusal: 400, 413, 415, 429 or 507.
        """
        client, settings = client_of(request.scope), self.settings
        head_length = request.headers.get(HEADER_LENGTH)
        encoding = encoding_of(request)
        how = BodyRequest(program.name, program.clip_shape, 0, encoding, head_length)
        whole = MAX_HEAD + MAX_BATCH * how.clip_bytes if head_length is not None else MAX_JSON
        most = min(settings.infer_bytes, settings.max_bytes, whole)
        how = msgspec.structs.replace(how, most=most)
        announced = request.headers.get("content-length")
        size = most if announced is None else int(announced)
        if size > most:
            raise Refusal(
                413, f"a body of {size} bytes; {program.name} takes up to {most}", close=True
            )
        apart = encoding != "" or (head_length is None and size > SHORT_JSON)
        async with contextlib.AsyncExitStack() as held:
            await held.enter_async_context(
                self.bodies.take(most if apart else size, settings.wait_seconds)
            )
            with self.uploads.enter(client):
                stream = limited(request.stream(), most)
                if apart:
                    upload = Upload(self.room, size if announced is not None else 0)
                    with contextlib.closing(upload):
                        async for chunk in stream:
                            upload.write(chunk)
                        inference, clips = await self.decoder.body(upload, how)
                else:
                    body = bytearray()
                    async for chunk in stream:
                        body += chunk
                    inference, clips = read_body(body, how)
            yield inference, split_clips(how, clips)

    def submit(self, client: str, owner: str | None, upload: Upload, options: Options) -> Job:
        """Start a job that classifies an upload of a client; the job closes the upload.

        Raises:
            Refusal: 404 no such program, 422 an option out of range, 429 the queue is full.
        """
        context = contextlib.ExitStack()
        context.callback(upload.close)
        try:
            program = context.enter_context(self.catalogue.lease(options.program))
            check_options(program, self.settings, options)

            def work(report: Report) -> Awaitable[Classification]:
                return self._classify(upload, program, options, report)

            return self.jobs.submit(client, owner, work, context.close)
        except BaseException:
            context.close()
            raise

    async def _classify(
        self, upload: Upload, program: ServedProgram, options: Options, report: Report
    ) -> Classification:
        counts = self.metrics.model(program.name, program.version)
        with counts.request():
            return await classify(
                upload, program, options, self.settings, self.pool, self.decoder, report
            )

    async def answer(self, request: Request, job: Job, seconds: float) -> Response:
        """A job's result if it is done within `seconds`, else 202 and the address of the job.

        Raises:
            Refusal: why the job failed.
        """
        assert job.task is not None
        leaving = asyncio.ensure_future(disconnected(request))
        try:
            if seconds > 0:
                await asyncio.wait(
                    {job.task, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
                )
            if job.error is not None:
                raise job.error
            if job.state == "done":
                return StructResponse(job.result)
            if leaving.done():
                raise Refusal(408, "the client disconnected")
            self.jobs.keep(job)
            headers = {"location": f"/v1/jobs/{job.id}"}
            return StructResponse(job.document(), 202, headers=headers)
        except BaseException:
            job.task.cancel()
            raise
        finally:
            leaving.cancel()


def encoding_of(request: Request) -> str:
    """The Content-Encoding of a request's body in small letters; empty if it is none."""
    encoding = ", ".join(request.headers.getlist("content-encoding")).strip().lower()
    return "" if encoding == "identity" else encoding


async def limited(chunks: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    """The parts of a body.

    Raises:
        Refusal: 413, they are more than `most` bytes.
    """
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > most:
            raise Refusal(413, f"a body of more than the {most} bytes accepted", close=True)
        yield chunk


async def disconnected(request: Request) -> None:
    """Return when the client has disconnected; the body must have been read before."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
