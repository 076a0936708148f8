"""Many boards behind one endpoint: an application of Ray Serve.

client -> guard.py -> Gateway -> a Replica (of a board) or an Emulator, each of which takes one
request at a time. Ray Serve starts them, places them on machines, and restarts one that dies.

`serve run pynq_kgrc.cluster.serving:build boards=http://a:8000,http://b:8000`, or
`pynq-kgrc cluster`, which also starts Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit

import aiohttp
import msgspec
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pynq_kgrc.cluster.local import STORE_BYTES, ray_started
from pynq_kgrc.errors import ConfigError, DeviceError, KgrcError
from pynq_kgrc.program import load
from pynq_kgrc.service.app import make_app
from pynq_kgrc.service.guard import App, Guard, Message, Receive, Scope, Send, client_of
from pynq_kgrc.service.jobs import FINAL, Admission
from pynq_kgrc.service.keys import read_keys
from pynq_kgrc.service.logs import start_logging
from pynq_kgrc.service.metrics import Metrics
from pynq_kgrc.service.parts import Service
from pynq_kgrc.service.refusal import Refusal, refusal_of
from pynq_kgrc.service.settings import Settings, shipped_program
from pynq_kgrc.service.waiting import within

log = logging.getLogger("pynq_kgrc.service")

CLASSIFY = "/v1/videos:classify"
CONNECT_SECONDS = 5.0
PROBE_SECONDS = 1.0
"""Seconds between two readiness checks of a device that left the rotation."""
READY_SECONDS = 10.0
"""Time limit of a readiness check."""
START_SECONDS = 120.0
"""Time limit for Ray to start a replica, and for the replica to start an emulation."""
JOB_SECONDS = 0.5
"""Seconds between two requests for the state of a board's job."""
PASSED_ON = ("content-type", "authorization", "x-api-key")
"""Headers of the client that are passed on: the boards check its key themselves."""
PASSED_BACK = ("content-type", "retry-after")
"""Headers of the board's answer that are passed back."""
MAX_REPLY = 50_000_000
"""Largest answer of a board, in bytes."""
T = TypeVar("T")

LEAVING = (429, 503)
"""A device that answers with one of these leaves the rotation until it is ready."""


Positive = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments of `build`; `serve run` passes them as NAME=VALUE. Times are in seconds."""

    boards: str = ""
    """Addresses of instances of `pynq-kgrc serve`, separated by commas."""
    emulators: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """Number of emulations that Ray starts."""
    program: str = ""
    """Program of the emulators; empty: the one that comes with the package."""
    backend: str = "emulate"
    """Backend of the emulators: emulate or csim."""
    keys: str = ""
    """A file of keys, as for `serve --api-key-file`; empty: only this machine is served."""
    insecure: bool = False
    """Whether other machines are served without a key."""
    max_bytes: Positive = 50_000_000
    """Largest video. Up to `queue` videos are in memory at a time."""
    queue: Positive = 16
    """Videos that may wait or run at a time; further ones get 429."""
    wait_seconds: Seconds = 60.0
    """How long a video waits for an idle device."""
    answer_seconds: Seconds = 600.0
    """Time limit of a device for a video; then it leaves the rotation, and another one gets it."""


class Reply(NamedTuple):
    """The answer of a device."""

    status: int
    headers: dict[str, str]
    body: bytes


def no_answer(why: str) -> Reply:
    """The reply in place of a device that does not answer."""
    return Reply(503, {}, json.dumps({"error": why}).encode())


def failure_of(error: Exception) -> str:
    """An exception of Ray in one line."""
    first = str(error).strip().splitlines()
    return f"its replica failed ({type(error).__name__}: {first[-1][:200] if first else ''})"


class Replica:
    """A proxy for one board's `pynq-kgrc serve`.

    Args:
        url: its address.
        seconds: time limit of a video.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url.rstrip("/"), seconds
        self._client: aiohttp.ClientSession | None = None

    @property
    def client(self) -> Any:
        """The HTTP client; aiohttp needs a running event loop to make it."""
        if self._client is None:
            limit = aiohttp.ClientTimeout(total=self.seconds, sock_connect=CONNECT_SECONDS)
            self._client = aiohttp.ClientSession(timeout=limit)
        return self._client

    async def unavailable_reason(self) -> str:
        """Why the board cannot be used now; empty if it can."""
        try:
            reply = await within(self._ask("GET", "/v2/health/ready"), READY_SECONDS)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            return f"does not answer ({type(error).__name__})"
        return "" if reply.status == 200 else f"not ready ({reply.status})"

    async def classify(self, query: str, headers: dict[str, str], body: bytes) -> Reply:
        """Send the board a video; if it answers with a job, wait for the job's result."""
        job = None
        try:
            reply = await self._ask("POST", f"{CLASSIFY}?{query}", headers, body)
            job = reply.headers.get("location", "") if reply.status == 202 else None
            if job is not None:
                if not job.startswith("/v1/jobs/"):
                    return no_answer(f"{self.url}: 202 without a job's address")
                reply = await within(self._finished(job, headers), self.seconds)
                job = None
            return reply
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            return no_answer(f"{self.url} does not answer ({type(error).__name__})")
        finally:
            if job is not None:  # the client does not wait any more
                with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                    await within(self._ask("DELETE", job, headers), CONNECT_SECONDS)

    async def _finished(self, job: str, headers: dict[str, str]) -> Reply:
        """Poll a job until it is done; its result as if the board had answered with it at once."""
        while True:
            reply = await self._ask("GET", job, headers)
            if reply.status != 200:
                return reply
            document = json.loads(reply.body)
            if document["state"] == "done":
                body = json.dumps(document["result"]).encode()
                return Reply(200, {"content-type": "application/json"}, body)
            if document["state"] in ("cancelled", "lost"):
                return no_answer(f"{self.url}: the job was {document['state']}")
            if document["state"] in FINAL:
                body = json.dumps({"error": document["error"]}).encode()
                return Reply(422, {"content-type": "application/json"}, body)
            await asyncio.sleep(JOB_SECONDS)

    async def _ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        kept = ("authorization", "x-api-key") if method != "POST" else PASSED_ON
        sent = {name: value for name, value in (headers or {}).items() if name in kept}
        async with self.client.request(
            method, self.url + path, data=body or None, headers=sent, allow_redirects=False
        ) as answer:
            text = bytearray()
            async for chunk in answer.content.iter_chunked(1 << 16):
                text += chunk
                if len(text) > MAX_REPLY:
                    return no_answer(f"{self.url}: an answer of more than {MAX_REPLY} bytes")
            heads = {name.lower(): value for name, value in answer.headers.items()}
            return Reply(answer.status, heads, bytes(text))


class Emulator:
    """A service over an emulation in this process, called without HTTP.

    The service has an event loop and a thread of its own: Ray's loop (uvloop) gives no access to
    the pipes of child processes, whose buffers the service enlarges.
    """

    def __init__(self, program: str, backend: str, max_bytes: int, seconds: float) -> None:
        # deleted when this process exits normally; stays if it is killed
        self._folder = tempfile.TemporaryDirectory(prefix="kgrc-")
        self.settings = Settings(
            programs={Path(program).stem: Path(program)},
            backend=backend,
            state=Path(self._folder.name),
            max_bytes=max_bytes,
            wait_seconds=seconds,
            job_seconds=seconds,
        )
        self._service: Service | None = None
        self._app: App | None = None
        asyncio.set_event_loop_policy(None)  # uvloop's cannot wait for child processes (3.11)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="service", daemon=True).start()

    async def unavailable_reason(self) -> str:
        """Why the emulation cannot be used now; empty if it can."""
        return await self._on_service_loop(self._started())

    async def classify(self, query: str, headers: dict[str, str], body: bytes) -> Reply:
        """The service's answer to a video."""
        return await self._on_service_loop(self._classify(query, headers, body))

    async def _on_service_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the service's loop; cancelled if the caller is cancelled."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _started(self) -> str:
        """Start the service if it is not running; why it cannot be used, or empty."""
        if self._service is None:
            try:
                service = Service(self.settings)
                await service.start()
            except KgrcError as error:
                return str(error)
            self._service, self._app = service, make_app(service)
        return self._service.unavailable_reason()

    async def _classify(self, query: str, headers: dict[str, str], body: bytes) -> Reply:
        reason = await self._started()
        if reason or self._app is None:
            return no_answer(reason)
        return await post(self._app, query, headers, body)


async def post(app: App, query: str, headers: dict[str, str], body: bytes) -> Reply:
    """Post a video to an ASGI application in this process."""
    status = 500
    heads: dict[str, str] = {}
    parts: list[bytes] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # never disconnects: leaving cancels this task
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            heads.update((k.decode("latin-1"), v.decode("latin-1")) for k, v in message["headers"])
        else:
            parts.append(message.get("body", b""))

    sent = {**headers, "host": "localhost", "content-length": str(len(body))}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": CLASSIFY,
        "raw_path": CLASSIFY.encode(),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in sent.items()],
        "client": None,
        "server": None,
        "state": {"request_id": ""},
    }
    await app(scope, receive, send)
    return Reply(status, heads, b"".join(parts))


class Device:
    """A device in the gateway's list."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name, self.handle = name, handle
        self.resting_reason = "not checked yet"
        """Why it is out of the rotation; empty while it is in."""
        self.served = self.failures = 0


class Gateway:
    """The one endpoint: gives each video to an idle device; if it fails, once to another one."""

    def __init__(self, layout: Layout, names: list[str], handles: list[Any]) -> None:
        self.layout = layout
        self.devices = [Device(*pair) for pair in zip(names, handles, strict=True)]
        self.idle: list[Device] = []
        """Devices in the rotation without a video, the longest idle first."""
        self.queue = Admission(layout.queue, "videos")
        self._changed = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()

    def __serve_build_asgi_app__(self) -> App:
        """The ASGI application; Ray Serve calls this once."""
        start_logging()
        keys = read_keys(Path(self.layout.keys)) if self.layout.keys else ()
        # without keys the guard accepts only requests to localhost, unless `insecure` is set
        host = "0.0.0.0" if self.layout.insecure else "127.0.0.1"
        settings = Settings(host=host, keys=keys, max_bytes=self.layout.max_bytes)
        return Guard(self.answer, settings, Metrics(), lambda: False, self.queue)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or the lifespan events of ASGI.

        Raises:
            Refusal: the guard answers with it.
        """
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise Refusal(404, "a cluster has no WebSocket; connect to a board")
        try:
            response = await self._respond(Request(scope, receive))
        except KgrcError as error:
            raise refusal_of(error) from error
        except Exception as error:
            log.exception("failed")
            raise Refusal(500, "the gateway failed; its log says more") from error
        await response(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        for device in self.devices:
            self._leave(device, device.resting_reason)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for probe in self._probes:
            probe.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _respond(self, request: Request) -> Response:
        path, method = request.url.path, request.method
        if path == CLASSIFY and method == "POST":
            return await self._classify(request)
        if path == "/v2/health/live" and method == "GET":
            return JSONResponse({"live": True})
        if path == "/v2/health/ready" and method == "GET":
            ready = any(not device.resting_reason for device in self.devices)
            return JSONResponse({"ready": ready}, 200 if ready else 503)
        if path == "/v1/devices" and method == "GET":
            return JSONResponse({"devices": [self._describe(d) for d in self.devices]})
        raise Refusal(404, f"nothing at {method[:10]} {path[:50]}; there is POST {CLASSIFY}")

    def _describe(self, device: Device) -> dict[str, Any]:
        state = "resting" if device.resting_reason else "idle" if device in self.idle else "busy"
        return {
            "name": device.name,
            "state": state,
            "trouble": device.resting_reason,
            "served": device.served,
            "failures": device.failures,
        }

    async def _classify(self, request: Request) -> Response:
        with self.queue.enter(client_of(request.scope)):
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
            # normalized: a query that no parser accepts would look like a failure of the board
            query = urlencode(request.query_params.multi_items())
            headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
            video = bytes(body)
            del body
            reply = await self._try(query, headers, video)
            if reply.status in LEAVING:
                log.info("trying a second device", extra={"reason": reply.body[:200]})
                with contextlib.suppress(Refusal):  # no other device: answer with the first reply
                    reply = await self._try(query, headers, video)
        heads = {name: reply.headers[name] for name in PASSED_BACK if name in reply.headers}
        heads.setdefault("content-type", "application/json")
        if reply.status in LEAVING:
            heads.setdefault("retry-after", "5")
        return Response(reply.body, reply.status, heads)

    async def _try(self, query: str, headers: dict[str, str], video: bytes) -> Reply:
        """Give a video to the next idle device; its answer.

        Raises:
            Refusal: 503, no device is in the rotation, or none was idle in time.
        """
        device = await self._take()
        # if this is cancelled the device may still be busy: it leaves until a readiness check
        failure = "its request was cancelled"
        answer = None
        try:
            answer = device.handle.classify.remote(query, headers, video)
            reply = Reply(*await within(answer, self.layout.answer_seconds + READY_SECONDS))
            failure = f"answered {reply.status}" if reply.status in LEAVING else ""
        except asyncio.TimeoutError:
            failure = f"no answer within {self.layout.answer_seconds:g} s"
            reply = no_answer(f"{device.name}: {failure}")
        except (RayError, RayServeException) as error:
            failure = failure_of(error)
            reply = no_answer(f"{device.name}: {failure}")
        finally:
            if failure and answer is not None:
                answer.cancel()
            if failure:
                self._leave(device, failure)
            else:
                self._join(device)
        device.served += not failure
        device.failures += bool(failure)
        return reply

    async def _take(self) -> Device:
        end = time.monotonic() + self.layout.wait_seconds
        while True:
            if self.idle:
                return self.idle.pop(0)
            if all(device.resting_reason for device in self.devices):
                raise Refusal(503, "no device is ready", 5)
            left = end - time.monotonic()
            if left <= 0:
                raise Refusal(503, f"no device was idle within {self.layout.wait_seconds:g} s", 5)
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self._changed.wait(), left)

    def _join(self, device: Device) -> None:
        """Put a device into the rotation."""
        device.resting_reason = ""
        self.idle.append(device)
        self._notify()

    def _leave(self, device: Device, reason: str) -> None:
        """Take a device out of the rotation until a readiness check succeeds."""
        device.resting_reason = reason
        log.warning("a device left the rotation", extra={"device": device.name, "reason": reason})
        task = asyncio.get_running_loop().create_task(self._probe(device))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _probe(self, device: Device) -> None:
        while True:
            try:
                answer = device.handle.unavailable_reason.remote()
                reason = await within(answer, START_SECONDS)
            except asyncio.TimeoutError:
                answer.cancel()
                reason = "its replica does not answer"
            except Exception as error:  # of any kind: the next check may succeed
                reason = failure_of(error)
            if not reason:
                log.info("a device joined the rotation", extra={"device": device.name})
                self._join(device)
                return
            device.resting_reason = reason
            await asyncio.sleep(PROBE_SECONDS)


def build(args: dict[str, Any]) -> Any:
    """The application, for `serve run` and `serve.run`.

    Args:
        args: the fields of `Layout`.

    Raises:
        ConfigError: an unknown field, a bad address, or no device.
    """
    try:
        layout = msgspec.convert(args, Layout, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"cluster: {error}") from error
    replicas: list[tuple[str, Any]] = []
    for url in filter(None, (part.strip() for part in layout.boards.split(","))):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ConfigError(f"board {url!r}: not an address such as http://board:8000")
        board = _deployment(Replica, f"board-{len(replicas)}", 0)
        replicas.append((url, board.bind(url, layout.answer_seconds)))
    if layout.emulators:
        program = str(Path(layout.program or shipped_program()).absolute())
        load(program)
    for number in range(layout.emulators):
        name = f"emulator-{number}"
        emulator = _deployment(Emulator, name, 1).bind(
            program, layout.backend, layout.max_bytes, layout.answer_seconds
        )
        replicas.append((name, emulator))
    if not replicas:
        raise ConfigError("no device: give the address of a board, or how many emulators")
    names, handles = [name for name, _ in replicas], [handle for _, handle in replicas]
    gateway = serve.deployment(
        name="gateway",
        num_replicas=1,  # it alone knows which devices are idle
        max_ongoing_requests=layout.queue + 100,  # its own queue refuses before Ray's does
        max_queued_requests=1000,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Gateway))
    return gateway.bind(layout, names, handles)


def _deployment(kind: type, name: str, cpus: int) -> Any:
    """A deployment of Ray Serve: one replica, which takes one request at a time."""
    return serve.deployment(
        name=name,
        num_replicas=1,
        max_ongoing_requests=1,
        max_queued_requests=4,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": cpus},
    )(kind)


def run_cluster(
    layout: Layout, host: str, port: int, address: str, announce: Callable[[str], None]
) -> None:
    """Start Ray and the application, and serve until SIGTERM or SIGINT; `announce` gets the URL.

    Raises:
        KgrcError: Ray does not start, a field is wrong, or Ray ended.
    """
    application = build(msgspec.to_builtins(layout))
    stopped = threading.Event()
    devices = layout.emulators + layout.boards.count(",") + 1
    with ray_started(layout.emulators + 1, address, STORE_BYTES + devices * layout.max_bytes):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        try:
            serve.start(http_options={"host": host, "port": port})
            serve.run(application, name="pynq_kgrc", route_prefix="/")
            announce(f"http://{host}:{port}")
            while not stopped.wait(1.0):
                if "pynq_kgrc" not in serve.status().applications:
                    raise DeviceError("the application is gone from Ray Serve")
        except (RayError, RayServeException, RuntimeError) as error:
            raise DeviceError(f"Ray Serve failed: {error}") from error
        finally:
            if address == "local":
                serve.shutdown()
            else:  # the cluster may serve other applications
                serve.delete("pynq_kgrc")
