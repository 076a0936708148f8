"""Many boards behind one endpoint: an application of Ray Serve.

client -> guard.py -> Gateway -> a Replica or an Emulator, each a replica that takes one request at a
time. Ray Serve starts the replicas, puts them on machines, and starts another where one dies.

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
from typing import Any, NamedTuple, TypeVar
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
from pynq_kgrc.service.app import Service, make_app
from pynq_kgrc.service.guard import App, Guard, Message, Receive, Scope, Send
from pynq_kgrc.service.jobs import FINAL, Admission
from pynq_kgrc.service.logs import start_logging
from pynq_kgrc.service.metrics import Metrics
from pynq_kgrc.service.refusal import Refusal, refusal_of
from pynq_kgrc.service.settings import Settings, read_keys, shipped_program
from pynq_kgrc.service.waiting import within

log = logging.getLogger("pynq_kgrc.service")

CLASSIFY = "/v1/videos:classify"
CONNECT_SECONDS = 5.0
PROBE_SECONDS = 1.0
"""Between two questions whether a device that left the rotation is ready again."""
READY_SECONDS = 10.0
"""To answer that."""
START_SECONDS = 120.0
"""Ray may take so long to start a replica, and that to start an emulation."""
JOB_SECONDS = 0.5
"""Between two questions whether a board is done with a long video."""
PASSED_ON = ("content-type", "authorization", "x-api-key")
"""Of the client's headers: the boards check its key themselves."""
PASSED_BACK = ("content-type", "retry-after")
MAX_REPLY = 50_000_000
"""Bytes of a board's answer."""
T = TypeVar("T")

LEAVING = (429, 503)
"""A device that answers so has no time or no health; it rests until it is ready."""


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `build` takes; `serve run` gives it as NAME=VALUE. Times are in seconds."""

    boards: str = ""
    """Addresses of `pynq-kgrc serve`, with commas between them."""
    emulators: int = 0
    """Emulations that Ray starts itself."""
    program: str = ""
    """Of the emulators; as a default, the one that ships with the package."""
    backend: str = "emulate"
    """Of the emulators: emulate or csim."""
    keys: str = ""
    """A file of keys, as `serve --api-key-file` takes it; none: only this machine is answered."""
    insecure: bool = False
    """Whether others may come without a key."""
    max_bytes: int = 50_000_000
    """Of a video. As many as `queue` says are in memory at a time."""
    queue: int = 16
    """Videos waiting or running; more are refused with 429."""
    wait_seconds: float = 60.0
    """A video waits so long for a device."""
    answer_seconds: float = 600.0
    """A device may take so long for a video; then it rests, and the video goes to another."""


class Reply(NamedTuple):
    """What a device answered."""

    status: int
    headers: dict[str, str]
    body: bytes


def no_answer(why: str) -> Reply:
    """The reply of a device that gives none."""
    return Reply(503, {}, json.dumps({"error": why}).encode())


def failure_of(error: Exception) -> str:
    """A failure of Ray's in one line."""
    first = str(error).strip().splitlines()
    return f"its replica failed ({type(error).__name__}: {first[-1][:200] if first else ''})"


class Replica:
    """A replica that stands for one `pynq-kgrc serve` elsewhere.

    Args:
        url: its address.
        seconds: it may take so long for a video.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url.rstrip("/"), seconds
        self._client: aiohttp.ClientSession | None = None

    @property
    def client(self) -> Any:
        """Connections, made where there is a loop; nothing is followed or decoded on the way."""
        if self._client is None:
            limit = aiohttp.ClientTimeout(total=self.seconds, sock_connect=CONNECT_SECONDS)
            self._client = aiohttp.ClientSession(timeout=limit)
        return self._client

    async def ready(self) -> str:
        """Why the board cannot be used now; empty if it can."""
        try:
            reply = await within(self._ask("GET", "/v2/health/ready"), READY_SECONDS)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            return f"does not answer ({type(error).__name__})"
        return "" if reply.status == 200 else f"not ready ({reply.status})"

    async def classify(self, query: str, headers: dict[str, str], body: bytes) -> Reply:
        """What the board says to a video; a long one is waited for."""
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
            if job is not None:  # nobody waits for it
                with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                    await within(self._ask("DELETE", job, headers), CONNECT_SECONDS)

    async def _finished(self, job: str, headers: dict[str, str]) -> Reply:
        """The result of a job, as if it had been answered at once."""
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
    """A replica that is a service of its own, without its sockets.

    The service has a loop and a thread of its own: Ray's loop (uvloop) does not show the pipes of
    child processes, which the service widens.
    """

    def __init__(self, program: str, backend: str, max_bytes: int, seconds: float) -> None:
        # swept when this process ends well, and left to the system if it is killed
        self._folder = tempfile.TemporaryDirectory(prefix="kgrc-")
        self.settings = Settings(
            programs=(Path(program),),
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

    async def ready(self) -> str:
        """Why there is nothing to run on; empty if there is."""
        return await self._there(self._ready())

    async def classify(self, query: str, headers: dict[str, str], body: bytes) -> Reply:
        """What the service answers to a video."""
        return await self._there(self._classify(query, headers, body))

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something on the service's own loop; whoever leaves cancels it."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _ready(self) -> str:
        if self._service is None:
            try:
                service = Service(self.settings)
                await service.start()
            except KgrcError as error:
                return str(error)
            self._service, self._app = service, make_app(service)
        return self._service.unavailable_reason()

    async def _classify(self, query: str, headers: dict[str, str], body: bytes) -> Reply:
        trouble = await self._ready()
        if trouble or self._app is None:
            return no_answer(trouble)
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
        await asyncio.Event().wait()  # whoever leaves cancels all of this
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
    """A device as the gateway sees it."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name, self.handle = name, handle
        self.trouble = "not asked yet"
        """Why it rests; empty while it is in the rotation."""
        self.served = self.failures = 0


class Gateway:
    """The one endpoint: takes a video, finds a device that has time, and tries a second one if
    that fails.
    """

    def __init__(self, layout: Layout, names: list[str], handles: list[Any]) -> None:
        self.layout = layout
        self.devices = [Device(*pair) for pair in zip(names, handles, strict=True)]
        self.idle: list[Device] = []
        """In the rotation and without work, the longest idle first."""
        self.queue = Admission(layout.queue, "videos")
        self._changed = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()

    def __serve_build_asgi_app__(self) -> App:
        """What Ray Serve calls for each request."""
        start_logging()
        keys = read_keys(Path(self.layout.keys)) if self.layout.keys else ()
        # without keys the guard answers only who asks for localhost, unless it is told otherwise
        host = "0.0.0.0" if self.layout.insecure else "127.0.0.1"
        settings = Settings(host=host, keys=keys, max_bytes=self.layout.max_bytes)
        return Guard(self.answer, settings, Metrics(), lambda: False, self.queue)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the beginning and the end of the application.

        Raises:
            Refusal: which the guard answers.
        """
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            raise Refusal(404, "there is no WebSocket here; ask a board")
        try:
            response = await self._respond(Request(scope, receive))
        except KgrcError as error:
            raise refusal_of(error) from error
        except Exception as error:
            log.exception("failed")
            raise Refusal(500, "the gateway failed; its log says more") from error
        await response(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        for device in self.devices:
            self._rest(device, device.trouble)
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
            ready = any(not device.trouble for device in self.devices)
            return JSONResponse({"ready": ready}, 200 if ready else 503)
        if path == "/v1/devices" and method == "GET":
            return JSONResponse({"devices": [self._describe(d) for d in self.devices]})
        raise Refusal(404, f"nothing at {method[:10]} {path[:50]}; there is POST {CLASSIFY}")

    def _describe(self, device: Device) -> dict[str, Any]:
        state = "resting" if device.trouble else "idle" if device in self.idle else "busy"
        return {
            "name": device.name,
            "state": state,
            "trouble": device.trouble,
            "served": device.served,
            "failures": device.failures,
        }

    async def _classify(self, request: Request) -> Response:
        with self.queue.enter():
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
            # parsed and written anew: what no board could read must not look like a board's fault
            query = urlencode(request.query_params.multi_items())
            headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
            video = bytes(body)
            del body
            reply = await self._try(query, headers, video)
            if reply.status in LEAVING:
                log.info("a second device is tried", extra={"reason": reply.body[:200]})
                with contextlib.suppress(Refusal):  # there is none: the first one's answer holds
                    reply = await self._try(query, headers, video)
        heads = {name: reply.headers[name] for name in PASSED_BACK if name in reply.headers}
        heads.setdefault("content-type", "application/json")
        if reply.status in LEAVING:
            heads.setdefault("retry-after", "5")
        return Response(reply.body, reply.status, heads)

    async def _try(self, query: str, headers: dict[str, str], video: bytes) -> Reply:
        """The answer of the next device that has time.

        Raises:
            Refusal: 503, none is in the rotation, or none had time.
        """
        device = await self._take()
        trouble = "its request was given up"  # it may still be busy with it, and is asked first
        answer = None
        try:
            answer = device.handle.classify.remote(query, headers, video)
            reply = Reply(*await within(answer, self.layout.answer_seconds + READY_SECONDS))
            trouble = f"answered {reply.status}" if reply.status in LEAVING else ""
        except asyncio.TimeoutError:
            trouble = f"no answer within {self.layout.answer_seconds:g} s"
            reply = no_answer(f"{device.name}: {trouble}")
        except (RayError, RayServeException) as error:
            trouble = failure_of(error)
            reply = no_answer(f"{device.name}: {trouble}")
        finally:
            if trouble and answer is not None:
                answer.cancel()
            if trouble:
                self._rest(device, trouble)
            else:
                self._enter(device)
        device.served += not trouble
        device.failures += bool(trouble)
        return reply

    async def _take(self) -> Device:
        end = time.monotonic() + self.layout.wait_seconds
        while True:
            if self.idle:
                return self.idle.pop(0)
            if all(device.trouble for device in self.devices):
                raise Refusal(503, "no device is ready", 5)
            left = end - time.monotonic()
            if left <= 0:
                raise Refusal(503, f"no device had time within {self.layout.wait_seconds:g} s", 5)
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self._changed.wait(), left)

    def _enter(self, device: Device) -> None:
        """Into the rotation."""
        device.trouble = ""
        self.idle.append(device)
        self._tell()

    def _rest(self, device: Device, trouble: str) -> None:
        """Out of the rotation, until the device is ready."""
        device.trouble = trouble
        log.warning("a device rests", extra={"device": device.name, "reason": trouble})
        task = asyncio.get_running_loop().create_task(self._probe(device))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _probe(self, device: Device) -> None:
        while True:
            try:
                answer = device.handle.ready.remote()
                trouble = await within(answer, START_SECONDS)
            except asyncio.TimeoutError:
                answer.cancel()
                trouble = "its replica does not answer"
            except Exception as error:  # whatever it is, the next answer may be a better one
                trouble = failure_of(error)
            if not trouble:
                log.info("a device is back", extra={"device": device.name})
                self._enter(device)
                return
            device.trouble = trouble
            await asyncio.sleep(PROBE_SECONDS)


def build(args: dict[str, Any]) -> Any:
    """The application, for `serve run` and `serve.run`.

    Args:
        args: the fields of `Layout`.

    Raises:
        ConfigError: a field that there is not, an address that is none, or no device.
    """
    try:
        layout = msgspec.convert(args, Layout, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"cluster: {error}") from error
    replicas: list[tuple[str, Any]] = []
    for url in filter(None, (part.strip() for part in layout.boards.split(","))):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ConfigError(f"board {url!r}: is no address such as http://board:8000")
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
        num_replicas=1,  # it alone knows who has time
        max_ongoing_requests=layout.queue + 100,  # its own queue refuses first, and says why
        max_queued_requests=1000,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Gateway))
    return gateway.bind(layout, names, handles)


def _deployment(kind: type, name: str, cpus: int) -> Any:
    """A deployment of one replica that takes one request at a time."""
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
    """Start Ray and the application, and serve until SIGTERM or SIGINT; `announce` hears the URL.

    Raises:
        KgrcError: Ray does not start, a field is wrong, or Ray came to an end.
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
            else:  # others may serve there as well
                serve.delete("pynq_kgrc")
