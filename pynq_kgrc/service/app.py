"""The application: what is served where. `serve` runs it until it is told to stop.

client -> guard.py -> here -> jobs.py -> videos.py -> decode.py (a child) and pool.py -> worker.py
"""

from __future__ import annotations

import gc
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import FastAPI, Header, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from pynq_kgrc.errors import KgrcError
from pynq_kgrc.service import protocol_v2
from pynq_kgrc.service.examples import example_files
from pynq_kgrc.service.guard import CLIENT_LEFT, Guard, client_of
from pynq_kgrc.service.jobs import FINAL
from pynq_kgrc.service.keys import KEY_PROTOCOL, Key
from pynq_kgrc.service.live import LiveSession, refuse_live, serve_live
from pynq_kgrc.service.logs import start_logging
from pynq_kgrc.service.options import Options, make_options, query_parameters, read_options
from pynq_kgrc.service.parts import Service
from pynq_kgrc.service.refusal import Refusal, refusal_of
from pynq_kgrc.service.schemas import (
    ERRORS,
    NOT_FOUND,
    Classification,
    DescribedApp,
    JobDocument,
    JobList,
    ListedProgram,
    ProgramList,
    StructResponse,
    answer_of,
)
from pynq_kgrc.service.server import listen, make_server
from pynq_kgrc.service.settings import Settings
from pynq_kgrc.service.uploads import Upload

log = logging.getLogger("pynq_kgrc.service")

PAGE = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".webp": "image/webp"}
HEARTBEAT_SECONDS = 10.0
"""Seconds between two comments on a stream of events without a change."""

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

JOB = answer_of(JobDocument, "The job")
JOB_LINKS = {
    name: {"operationId": name, "parameters": {"key": "$response.body#/id"}}
    for name in ("job", "job_events", "cancel_job")
}
"""What OpenAPI calls links: the routes that take the id of this answer."""


def make_app(service: Service) -> FastAPI:
    """The application with all its routes."""
    app = DescribedApp(
        title="pynq_kgrc",
        version="1",
        description="Recognizes actions in videos, on an FPGA or on its bit-exact emulation.",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    add_error_handlers(app)
    add_video_routes(app, service)
    add_job_routes(app, service)
    add_operation_routes(app, service)
    add_live_routes(app, service)
    add_page_routes(app)
    app.include_router(protocol_v2.make_router(service))
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Every error becomes ``{"error": text}`` with its status."""

    @app.exception_handler(KgrcError)
    async def package_error(request: Request, error: KgrcError) -> Response:
        refusal = refusal_of(error)
        return JSONResponse({"error": refusal.text}, refusal.status, headers=refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_option(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette names the methods of one route, not of the path
            headers["allow"] = ", ".join(sorted(methods_of(app, request.url.path)))
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=headers)

    @app.exception_handler(ClientDisconnect)
    async def client_left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_LEFT)  # nobody reads it; for the metrics and the log

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("failed", extra={"request_id": request.state.request_id}, exc_info=error)
        return JSONResponse({"error": "the service failed; its log says more"}, 500)


def methods_of(app: FastAPI, path: str) -> set[str]:
    """The methods that a path has."""
    found: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route | APIRoute) and route.path_regex.match(path):
            found |= route.methods or set()
    return found


def add_video_routes(app: FastAPI, service: Service) -> None:
    """POST of a video."""

    @app.post(
        "/v1/videos:classify",
        tags=["Videos"],
        openapi_extra={**VIDEO_BODY, "parameters": query_parameters()},
        responses={
            200: answer_of(Classification, "The labels of the video"),
            202: {
                **answer_of(JobDocument, "The job, whose address is in Location"),
                "links": JOB_LINKS,
            },
        },
    )
    async def classify_video(
        request: Request,
        prefer: Annotated[str | None, Header(description="respond-async, or wait=SECONDS")] = None,
    ) -> Response:
        """Recognize the actions in a video.

        The body is the video, either raw or as the part `video` of a form. Further fields of a
        form may give the options. If the result takes longer than the service waits, the answer is
        202 with the address of a job.
        """
        chosen = read_options(request.query_params.multi_items())
        upload = await service.receive(request)
        options = form_options(upload, chosen)
        job = service.submit(client_of(request.scope), owner_of(request), upload, options)
        seconds = preferred_seconds(prefer, service.settings.wait_seconds)
        return await service.answer(request, job, seconds)


def form_options(upload: Upload, query: dict[str, Any]) -> Options:
    """The options of a request; a field of its form overrides the query.

    Raises:
        Refusal: 422, a field that is not accepted; the upload is closed.
    """
    try:
        return make_options({**query, **read_options(upload.fields)})
    except BaseException:
        upload.close()
        raise


def owner_of(request: Request) -> str | None:
    """The name of the key whose jobs a request may see; None: those of all."""
    key: Key | None = request.state.key
    return None if key is None or key.manages else key.name


def preferred_seconds(prefer: str | None, most: float) -> float:
    """How long to wait for a result: ``respond-async`` or ``wait=SECONDS`` of RFC 7240."""
    for preference in (prefer or "").replace(";", ",").split(","):
        name, _, value = preference.strip().lower().partition("=")
        if name == "respond-async":
            return 0.0
        if name == "wait" and value.isascii() and value.isdigit():
            return min(most, float(value[:6]))
    return most


def add_job_routes(app: FastAPI, service: Service) -> None:
    """State, result, events and cancellation of jobs."""

    @app.get("/v1/jobs", tags=["Jobs"], responses={200: answer_of(JobList, "The jobs")})
    async def jobs(request: Request) -> Response:
        """The jobs of this key, newest first; a key that manages sees all. Without results."""
        return StructResponse(JobList(service.jobs.listed(owner_of(request))))

    @app.get("/v1/jobs/{key}", tags=["Jobs"], operation_id="job", responses={200: JOB, **NOT_FOUND})
    async def job(
        key: str,
        request: Request,
        since: Annotated[
            int | None, Query(ge=0, le=10**9, description="also the clips from this number on")
        ] = None,
    ) -> Response:
        """The state and progress of a job, its place in the queue, and its result."""
        return StructResponse(service.jobs.find(key, owner_of(request), since)[0])

    @app.delete(
        "/v1/jobs/{key}",
        tags=["Jobs"],
        operation_id="cancel_job",
        responses={200: JOB, **NOT_FOUND},
    )
    async def cancel(key: str, request: Request) -> Response:
        """Cancel a job, or delete its result."""
        return StructResponse(service.jobs.cancel(key, owner_of(request)))

    @app.get(
        "/v1/jobs/{key}/events",
        tags=["Jobs"],
        operation_id="job_events",
        responses={200: {"content": {"text/event-stream": {}}}, **NOT_FOUND},
    )
    async def events(key: str, request: Request) -> Response:
        """The job's document after each change until it is final, as server-sent events."""
        owner = owner_of(request)
        service.jobs.find(key, owner)

        async def lines() -> AsyncIterator[str]:
            async for document in service.jobs.events(key, owner, HEARTBEAT_SECONDS):
                if document is None:
                    yield ": heartbeat\n\n"
                    continue
                name = document.state if document.state in FINAL else "progress"
                yield f"event: {name}\ndata: {msgspec.json.encode(document).decode()}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")


def add_operation_routes(app: FastAPI, service: Service) -> None:
    """The list of programs, and metrics."""

    @app.get(
        "/v1/programs",
        tags=["Programs"],
        responses={200: answer_of(ProgramList, "The loaded programs")},
    )
    async def programs() -> Response:
        """The loaded programs: clips, labels, and layers with operations and modelled time."""
        listed = []
        for program in service.catalogue.served.values():
            document = msgspec.structs.asdict(program.description)
            listed.append(
                ListedProgram(
                    **{**document, "name": program.name},
                    version=program.version,
                    about=program.about,
                )
            )
        return StructResponse(ProgramList(service.settings.backend, listed))

    @app.get("/metrics", tags=["Operation"], responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def add_live_routes(app: FastAPI, service: Service) -> None:
    """The WebSocket of webcams."""

    @app.websocket("/v1/live")
    async def live(client: WebSocket) -> None:
        offered = client.scope.get("subprotocols", [])
        chosen = next((name for name in offered if name.startswith(KEY_PROTOCOL)), None)
        await client.accept(chosen)
        try:
            given = client.query_params.multi_items()
            options = make_options(read_options(given, ("program", "top_k")))
            with (
                service.live.enter(client_of(client.scope)),
                service.catalogue.lease(options.program) as served,
            ):
                session = LiveSession(
                    client,
                    served,
                    service.settings,
                    service.pool,
                    service.decoder,
                    service.metrics,
                    options,
                )
                await serve_live(session)
        except Refusal as refusal:
            await refuse_live(client, refusal)


def add_page_routes(app: FastAPI) -> None:
    """The web page, its scripts and examples, and the page that lists the API."""
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

    examples = example_files()

    @app.get("/page/examples", include_in_schema=False)
    async def list_examples() -> Response:
        return StructResponse([example for example, _ in examples.values()])

    @app.get("/page/examples/{name:path}", include_in_schema=False)
    async def example_clip(name: str) -> Response:
        if name not in examples:
            raise Refusal(404, f"no example {name[:50]!r}; there are: {', '.join(examples)}")
        example, path = examples[name]
        return FileResponse(path, media_type=example.kind)

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return page(name)


class FurtherServer(Protocol):
    """Another server of the same service, such as `grpc_server.GrpcServer`."""

    port: int

    async def start(self) -> None:
        """Listen, or raise ConfigError."""

    async def stop(self, seconds: float) -> None:
        """Accept no more requests; those that run have that time to finish."""


MakeServer = Callable[[Service], FurtherServer]


async def run_service(
    settings: Settings,
    announce: Callable[[dict[str, Any]], None],
    make_grpc: MakeServer | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; `announce` gets the address and the programs.

    Args:
        settings: what is served, and how.
        announce: called once, when the service is ready.
        make_grpc: makes the gRPC server of the service; it needs the extra `grpc`.

    Raises:
        KgrcError: the address is taken, a program is refused, or the device does not answer.
    """
    start_logging()
    with listen(settings.host, settings.port) as bound:
        await _serve(settings, bound, announce, make_grpc)


async def _serve(
    settings: Settings,
    bound: socket.socket,
    announce: Callable[[dict[str, Any]], None],
    make_grpc: MakeServer | None,
) -> None:
    port = bound.getsockname()[1]
    service = Service(settings)
    began = time.perf_counter()
    await service.start()
    further = None if make_grpc is None else make_grpc(service)
    try:
        if further is not None:
            await further.start()
    except BaseException:
        await service.stop()
        raise
    guard = Guard(
        make_app(service),
        settings,
        service.metrics,
        lambda: service.draining,
        service.queue,
    )
    service.server = make_server(guard, settings)
    # objects made so far live until the end: a collection that scans them would stop the event
    # loop for 0.1 s
    gc.collect()
    gc.freeze()
    log.info("started", extra={"port": port, "seconds": round(time.perf_counter() - began, 2)})
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    announce(
        {
            "url": f"{'http' if settings.tls is None else 'https'}://{host}:{port}",
            "port": port,
            "backend": settings.backend,
            "programs": list(service.catalogue.served),
            "grpc_port": None if further is None else further.port,
            "decoders_cannot": service.confined,
        }
    )
    try:
        await service.server.serve(sockets=[bound])
    finally:
        if further is not None:
            await further.stop(settings.grace_seconds)
        await service.stop()
        log.info("stopped")
