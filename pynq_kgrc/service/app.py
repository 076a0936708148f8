"""The application: what is served where. `serve` runs it until it is told to stop.

client -> guard.py -> here -> jobs.py -> videos.py -> decode.py (a child) and pool.py -> worker.py
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Header, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Route

from pynq_kgrc.errors import ConfigError, KgrcError
from pynq_kgrc.service import protocol_v2
from pynq_kgrc.service.catalogue import Catalogue
from pynq_kgrc.service.guard import KEY_PROTOCOL, Guard
from pynq_kgrc.service.jobs import FINAL, Admission, Job, Jobs
from pynq_kgrc.service.live import LiveSession, refuse_live, serve_live
from pynq_kgrc.service.logs import start_logging
from pynq_kgrc.service.metrics import Metrics
from pynq_kgrc.service.pool import Pool, ClipRun
from pynq_kgrc.service.refusal import Refusal, refusal_of
from pynq_kgrc.service.schemas import ERRORS, GONE, Classification, JobDocument
from pynq_kgrc.service.server import Server, listen, make_server
from pynq_kgrc.service.settings import Settings
from pynq_kgrc.service.uploads import Upload, receive_upload
from pynq_kgrc.service.videos import Decoder, Options, check_options, classify

log = logging.getLogger("pynq_kgrc.service")

PAGE = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
PROBE_SECONDS = 10.0
HEARTBEAT_SECONDS = 10.0

VIDEO_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "video/mp4": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"video": {"type": "string", "format": "binary"}},
                    "required": ["video"],
                }
            },
        },
    }
}


class Service:
    """All parts of a service, and the order in which they begin and end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.pool = Pool(settings.backend, settings.workers, settings.clip_seconds)
        self.decoder = Decoder()
        self.queue = Admission(settings.queue, "videos or inferences")
        self.uploads = Admission(settings.uploads, "uploads")
        self.live = Admission(settings.live, "live sessions")
        self.server: Server | None = None
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

    def _open_state(self, folder: Path) -> int:
        """Make the folder ours alone, and sweep what a killed service left in it.

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

    def _count_run(self, run: ClipRun) -> None:
        self.metrics.clip_seconds.observe(run.seconds)
        self.metrics.wait_seconds.observe(run.waited)

    async def start(self) -> None:
        """Start the processes and load the programs.

        Raises:
            KgrcError: one does not start, or a program is refused.
        """
        try:
            self.decoder.start()
            await self.pool.start()
            for path in self.settings.programs:
                await self.catalogue.load(path.stem)
        except BaseException:
            await self.stop()
            raise
        self._probing = asyncio.get_running_loop().create_task(self._probe())

    async def stop(self) -> None:
        """Finish what was accepted, and end all processes."""
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
        """Why no request can be served; empty if they can."""
        if self.draining:
            return "the service is stopping"
        if self.pool.unavailable_reason:
            return self.pool.unavailable_reason
        return "" if self.catalogue.served else "no program is loaded"

    async def watched(self, request: Request, work: Awaitable[Any]) -> Any:
        """Await something for as long as the client is there.

        Raises:
            Refusal: the client left; nobody reads it.
        """
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Refusal(408, "the client left")
            return task.result()
        finally:
            leaving.cancel()
            task.cancel()
            await asyncio.gather(leaving, task, return_exceptions=True)

    async def receive(self, request: Request) -> Upload:
        """The body of a request as a file; the queue is asked first, so that a body that nobody
        has time for is not even read.

        Raises:
            Refusal: 429, 507, or what is wrong with the body.
        """
        self.queue.check()
        with self.uploads.enter():
            expected = int(request.headers.get("content-length", "0") or 0)
            kind = request.headers.get("content-type", "")
            folder, free = self.settings.state, self.settings.free_bytes
            return await receive_upload(request.stream(), kind, expected, folder, free)

    def submit(self, upload: Upload, options: Options) -> Job:
        """A job for an upload.

        Raises:
            Refusal: 404 no such program, 422 an option, 429 no room.
        """
        context = contextlib.ExitStack()
        context.callback(upload.close)
        try:
            program = context.enter_context(self.catalogue.lease(options.program))
            check_options(program, self.settings, options)

            def work(report: Any) -> Awaitable[dict[str, Any]]:
                return classify(
                    upload, program, options, self.settings, self.pool, self.decoder, report
                )

            return self.jobs.submit(work, context.close)
        except BaseException:
            context.close()
            raise

    async def answer(self, request: Request, job: Job, seconds: float) -> Response:
        """A job's result if it is done in time, else its address.

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
                return JSONResponse(job.result)
            if leaving.done():
                raise Refusal(408, "the client left")
            self.jobs.keep(job)
            place = f"/v1/jobs/{job.id}"
            return JSONResponse(job.document(), 202, headers={"location": place})
        except BaseException:
            job.task.cancel()
            raise
        finally:
            leaving.cancel()


async def disconnected(request: Request) -> None:
    """Return when the client has left; the body must have been read."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def methods_of(app: FastAPI, path: str) -> set[str]:
    """The methods that a path has."""
    found: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route | APIRoute) and route.path_regex.match(path):
            found |= route.methods or set()
    return found


def wished_seconds(prefer: str | None, most: float) -> float:
    """How long the client wants to wait: ``respond-async`` or ``wait=SECONDS`` of RFC 7240."""
    for wish in (prefer or "").replace(";", ",").split(","):
        name, _, value = wish.strip().partition("=")
        if name == "respond-async":
            return 0.0
        if name == "wait" and value.isascii() and value.isdigit():
            return min(most, float(value[:6]))
    return most


def make_app(service: Service) -> FastAPI:
    """The routes."""
    app = FastAPI(
        title="pynq_kgrc",
        version="1",
        description="Actions in videos, recognized on an FPGA or on its bit-exact emulation.",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    settings, catalogue = service.settings, service.catalogue

    @app.exception_handler(KgrcError)
    async def refused(request: Request, error: KgrcError) -> Response:
        refusal = refusal_of(error)
        return JSONResponse({"error": refusal.text}, refusal.status, headers=refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def misread(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette names the methods of one route, not of the path
            headers["allow"] = ", ".join(sorted(methods_of(app, request.url.path)))
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.error("failed", extra={"request_id": request.state.request_id}, exc_info=error)
        return JSONResponse({"error": "the service failed; its log says more"}, 500)

    @app.post(
        "/v1/videos:classify",
        tags=["Videos"],
        openapi_extra=VIDEO_BODY,
        responses={200: {"model": Classification}, 202: {"model": JobDocument}},
    )
    async def classify_video(
        request: Request,
        top_k: Annotated[int, Query(ge=1, le=1000, description="labels to name")] = 5,
        window: Annotated[
            int | None, Query(ge=1, le=100_000, description="frames of the video a clip spans")
        ] = None,
        stride: Annotated[
            int | None, Query(ge=1, le=1_000_000, description="frames between two clips")
        ] = None,
        sampling: Annotated[
            Literal["windows", "uniform"],
            Query(description="clips one after the other, or one spread over the whole video"),
        ] = "windows",
        program: Annotated[str | None, Query(max_length=200, description="a loaded one")] = None,
        prefer: Annotated[str | None, Header(description="respond-async, or wait=SECONDS")] = None,
    ) -> Response:
        """Name the actions in a video.

        The body is the video, raw or as the part `video` of a form, whose fields may give the
        options as well. What takes long is answered with 202 and the address of a job.
        """
        upload = await service.receive(request)
        try:
            chosen: dict[str, Any] = {
                "top_k": top_k,
                "window": window,
                "stride": stride,
                "sampling": sampling,
                "program": program,
            }
            chosen.update((k, v) for k, v in upload.fields.items() if k in chosen and v)
            options = msgspec.convert(chosen, Options, strict=False)
        except msgspec.ValidationError as error:
            upload.close()
            raise Refusal(422, f"a field of the form: {error}") from error
        job = service.submit(upload, options)
        return await service.answer(request, job, wished_seconds(prefer, settings.wait_seconds))

    @app.get("/v1/jobs/{key}", tags=["Jobs"], responses={200: {"model": JobDocument}, **GONE})
    async def job(key: str) -> Response:
        """How far a job is, and its result."""
        return JSONResponse(service.jobs.find(key)[0])

    @app.delete("/v1/jobs/{key}", tags=["Jobs"], responses={200: {"model": JobDocument}, **GONE})
    async def cancel(key: str) -> Response:
        """Stop a job, or forget its result."""
        return JSONResponse(service.jobs.cancel(key))

    @app.get(
        "/v1/jobs/{key}/events",
        tags=["Jobs"],
        responses={200: {"content": {"text/event-stream": {}}}, **GONE},
    )
    async def events(key: str) -> Response:
        """The job's document after each change, as server-sent events, until it is final."""
        service.jobs.find(key)

        async def lines() -> AsyncIterator[str]:
            async for document in service.jobs.events(key, HEARTBEAT_SECONDS):
                if document is None:
                    yield ": still there\n\n"
                    continue
                name = document["state"] if document["state"] in FINAL else "progress"
                yield f"event: {name}\ndata: {json.dumps(document)}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.get("/v1/programs", tags=["Programs"])
    async def programs() -> dict[str, Any]:
        """What is loaded: clips, labels, layers with operations and modelled time."""
        listed = [
            {**program.description, "name": program.name, "version": program.version}
            for program in catalogue.served.values()
        ]
        return {"backend": settings.backend, "programs": listed}

    @app.get("/metrics", tags=["Operation"], responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        counted = service.metrics
        counted.refused.set(service.queue.refused + service.uploads.refused)
        counted.at_work.set(service.queue.inside)
        counted.queue_limit.set(service.queue.limit)
        counted.restarts.set(service.pool.restarts)
        counted.idle.set(service.pool.idle)
        counted.ready.set(0 if service.unavailable_reason() else 1)
        return Response(counted.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.websocket("/v1/live")
    async def live(client: WebSocket, program: str | None = None, top_k: int = 5) -> None:
        offered = client.scope.get("subprotocols", [])
        chosen = next((name for name in offered if name.startswith(KEY_PROTOCOL)), None)
        await client.accept(chosen)
        try:
            with service.live.enter(), catalogue.lease(program) as program:
                session = LiveSession(
                    client,
                    program,
                    settings,
                    service.pool,
                    service.decoder,
                    service.metrics,
                    min(1000, max(1, top_k)),
                )
                await serve_live(session)
        except Refusal as refusal:
            await refuse_live(client, refusal)

    files = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in TYPES}

    def page(name: str) -> Response:
        if name not in files:
            raise Refusal(404, f"no page {name[:50]!r}")
        return Response(files[name], media_type=TYPES[Path(name).suffix])

    @app.get("/", include_in_schema=False)
    async def start_page() -> Response:
        return page("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page("docs.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return page(name)

    app.include_router(
        protocol_v2.make_router(
            settings,
            catalogue,
            service.pool,
            service.queue,
            service.unavailable_reason,
            service.watched,
        )
    )
    return app


async def run_service(settings: Settings, announce: Any = print) -> None:
    """Serve until SIGTERM or SIGINT; `announce` hears the address and the programs.

    Raises:
        KgrcError: the address is taken, a program is refused, or the device does not answer.
    """
    start_logging()
    bound = listen(settings.host, settings.port)
    port = bound.getsockname()[1]
    service = Service(settings)
    began = time.perf_counter()
    await service.start()
    guard = Guard(
        make_app(service),
        settings,
        service.metrics,
        lambda: service.draining,
        service.queue,
    )
    service.server = make_server(guard, settings)
    gc.collect()
    gc.freeze()  # what is here now stays; to look through it again takes 0.1 s of everybody's time
    log.info("started", extra={"port": port, "seconds": round(time.perf_counter() - began, 2)})
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    announce(
        {
            "url": f"http://{host}:{port}",
            "port": port,
            "backend": settings.backend,
            "programs": list(service.catalogue.served),
        }
    )
    try:
        await service.server.serve(sockets=[bound])
    finally:
        await service.stop()
        log.info("stopped")
