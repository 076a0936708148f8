"""Many boards behind one endpoint: an application of Ray Serve.

client -> guard.py -> Gateway -> a Replica (of a board) or an Emulator, each of which takes one
video or inference at a time. Ray Serve starts them, places them on machines, and restarts one that
dies. All other requests the Gateway passes on to the devices itself (passing.py).

`serve run pynq_kgrc.cluster.serving:build boards=http://a:8000,http://b:8000`, or
`pynq-kgrc cluster`, which also starts Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
import msgspec
import ray
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.websockets import WebSocket

from pynq_kgrc.cluster.local import STORE_BYTES, ray_started
from pynq_kgrc.cluster.passing import (
    CONNECT_SECONDS,
    KEYS,
    PASSED_BACK,
    PASSED_ON,
    SILENT_SECONDS,
    UNREACHABLE,
    Reply,
    ask,
    events,
    named,
    new_client,
    no_answer,
    pass_live,
)
from pynq_kgrc.errors import ConfigError, DeviceError, KgrcError
from pynq_kgrc.program import load
from pynq_kgrc.service.app import make_app
from pynq_kgrc.service.guard import (
    CLIENT_LEFT,
    MANAGE_PATHS,
    WORK_PATHS,
    App,
    Guard,
    Receive,
    Scope,
    Send,
    client_of,
)
from pynq_kgrc.service.jobs import FINAL, MAX_LISTED, Admission
from pynq_kgrc.service.keys import KEY_PROTOCOL, Key, read_keys
from pynq_kgrc.service.live import refuse_live
from pynq_kgrc.service.logs import start_logging
from pynq_kgrc.service.metrics import Metrics
from pynq_kgrc.service.parts import Service
from pynq_kgrc.service.refusal import Refusal, refusal_of
from pynq_kgrc.service.server import Server, listen, make_server
from pynq_kgrc.service.settings import Settings, shipped_program
from pynq_kgrc.service.waiting import within

log = logging.getLogger("pynq_kgrc.service")

PROBE_SECONDS = 1.0
"""Seconds between two readiness checks of a device that left the rotation."""
READY_SECONDS = 10.0
"""Time limit of a readiness check."""
START_SECONDS = 120.0
"""Time limit for Ray to start a replica, and for the replica to start an emulation."""
JOB_SECONDS = 0.5
"""Seconds between two requests for the state of a board's job."""
PASS_SECONDS = 60.0
"""Time limit of a device for a request that is neither a video nor an inference."""
JOB_PATH = re.compile(r"/v1/jobs/([a-z]+-[0-9]+)\.([A-Za-z0-9_-]{1,64})(/events)?")
STATS_PATH = re.compile(r"/v2/models/(.+/)?stats")
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
    name: str = ""
    """Name of that program; empty: that of its file."""
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


def failure_of(error: Exception) -> str:
    """An exception of Ray in one line."""
    first = str(error).strip().splitlines()
    return f"its replica failed ({type(error).__name__}: {first[-1][:200] if first else ''})"


class Replica:
    """A proxy for one board's `pynq-kgrc serve`.

    Args:
        url: its address.
        seconds: time limit of a video or an inference.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url.rstrip("/"), seconds
        self._client: aiohttp.ClientSession | None = None

    @property
    def client(self) -> aiohttp.ClientSession:
        """The HTTP client; aiohttp needs a running event loop to make it."""
        if self._client is None:
            self._client = new_client(self.seconds)
        return self._client

    async def address(self) -> str:
        """Where the gateway reaches the device for all other requests."""
        return self.url

    async def unavailable_reason(self) -> str:
        """Why the board cannot be used now; empty if it can."""
        asked = ask(self.client, "GET", f"{self.url}/v2/health/ready")
        try:
            reply = await within(asked, READY_SECONDS)
        except UNREACHABLE as error:
            return f"does not answer ({type(error).__name__})"
        return "" if reply.status == 200 else f"not ready ({reply.status})"

    async def work(self, target: str, headers: dict[str, str], body: bytes) -> Reply:
        """Send the board a video or an inference.

        If it answers with a job although the client has no `Prefer`, wait for the job's result.
        """
        job = None
        try:
            reply = await ask(self.client, "POST", self.url + target, headers, body)
            if reply.status == 202 and "prefer" not in headers:
                job = reply.headers.get("location", "")
                if not job.startswith("/v1/jobs/"):
                    job = None
                    return no_answer(f"{self.url}: 202 without a job's address")
                reply = await within(self._finished(job, headers), self.seconds)
                job = None
            return reply
        except UNREACHABLE as error:
            return no_answer(f"{self.url} does not answer ({type(error).__name__})")
        finally:
            if job is not None:  # the client does not wait any more
                with contextlib.suppress(*UNREACHABLE):
                    asked = ask(self.client, "DELETE", self.url + job, keys_of(headers))
                    await within(asked, CONNECT_SECONDS)

    async def _finished(self, job: str, headers: dict[str, str]) -> Reply:
        """Poll a job until it is done; its result as if the board had answered with it at once."""
        while True:
            reply = await ask(self.client, "GET", self.url + job, keys_of(headers))
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


def keys_of(headers: dict[str, str]) -> dict[str, str]:
    """Those of a request's headers that have its key."""
    return {name: value for name, value in headers.items() if name in KEYS}


class Emulator(Replica):
    """A service over an emulation in this process, on a port that only this cluster's keys open.

    The service has an event loop and a thread of its own: Ray's loop (uvloop) gives no access to
    the pipes of child processes, whose buffers the service enlarges.
    """

    def __init__(
        self,
        programs: dict[str, str],
        backend: str,
        max_bytes: int,
        seconds: float,
        keys: tuple[Key, ...],
    ) -> None:
        super().__init__("", seconds)
        # deleted when this process exits normally; stays if it is killed
        self._folder = tempfile.TemporaryDirectory(prefix="kgrc-")
        self.settings = Settings(
            programs={name: Path(program) for name, program in programs.items()},
            backend=backend,
            host=ray.util.get_node_ip_address(),
            port=0,
            keys=keys,
            state=Path(self._folder.name),
            max_bytes=max_bytes,
            wait_seconds=seconds,
            job_seconds=seconds,
        )
        self._service: Service | None = None
        self._serving: asyncio.Task[None] | None = None
        asyncio.set_event_loop_policy(None)  # uvloop's cannot wait for child processes (3.11)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="service", daemon=True).start()

    async def unavailable_reason(self) -> str:
        """Why the emulation cannot be used now; empty if it can."""
        started = asyncio.run_coroutine_threadsafe(self._started(), self._loop)
        return await asyncio.wrap_future(started)

    async def work(self, target: str, headers: dict[str, str], body: bytes) -> Reply:
        """Send the emulation a video or an inference."""
        reason = await self.unavailable_reason()
        return no_answer(reason) if reason else await super().work(target, headers, body)

    async def _started(self) -> str:
        """Start the service if it is not running; why it cannot be used, or empty."""
        if self._service is None:
            bound = listen(self.settings.host, 0)
            try:
                service = Service(self.settings)
                await service.start()
            except KgrcError as error:
                bound.close()
                return str(error)
            guard = Guard(
                make_app(service), self.settings, service.metrics, lambda: False, service.queue
            )
            server: Server = make_server(guard, self.settings)
            service.server = server
            self._serving = asyncio.ensure_future(server.serve(sockets=[bound]))
            while not server.started and not self._serving.done():
                await asyncio.sleep(0.01)
            host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
            self.url = f"http://{host}:{bound.getsockname()[1]}"
            self._service = service
        if self._serving is None or self._serving.done():
            return "its server ended"
        return self._service.unavailable_reason()


class Device:
    """A device in the gateway's list.

    Args:
        name: a board's address, or the name of an emulator.
        short: its name in the ids of jobs.
        token: the key that the gateway sends it; empty: the client's.
    """

    def __init__(self, name: str, short: str, token: str = "") -> None:
        self.name, self.short, self.token = name, short, token
        self.handle: Any = None
        self.url = ""
        """Its address, from the last readiness check that succeeded."""
        self.resting_reason = "not checked yet"
        """Why it is out of the rotation; empty while it is in."""
        self.served = self.failures = 0
        self.jobs = self.live = 0
        """Jobs whose clients do not wait, and live sessions, that it has now."""


class DeviceMetrics(Collector):
    """State of the devices and how much they did, for Prometheus."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    def collect(self) -> Iterator[Metric]:
        """A gauge or counter of each kind, with a value per device."""
        idle = self.gateway.idle
        kinds: dict[str, tuple[type, str, Callable[[Device], float]]] = {
            "up": (GaugeMetricFamily, "In the rotation", lambda d: not d.resting_reason),
            "busy": (
                GaugeMetricFamily,
                "Has a video or an inference",
                lambda d: not d.resting_reason and d not in idle,
            ),
            "jobs": (GaugeMetricFamily, "Jobs that no client waits for", lambda d: d.jobs),
            "live": (GaugeMetricFamily, "Live sessions", lambda d: d.live),
            "served": (CounterMetricFamily, "Videos and inferences answered", lambda d: d.served),
            "failures": (CounterMetricFamily, "Those that it failed", lambda d: d.failures),
        }
        for name, (kind, text, read) in kinds.items():
            family = kind(f"kgrc_device_{name}", text, labels=["device"])
            for device in self.gateway.devices:
                family.add_metric([device.name], float(read(device)))
            yield family


class Gateway:
    """The one endpoint.

    It gives each video and each inference to an idle device, and if that fails, once to another
    one. A request about a job goes to the device that has it, any other to a device that is ready.
    """

    def __init__(
        self, layout: Layout, keys: tuple[Key, ...], devices: list[Device], handles: list[Any]
    ) -> None:
        self.layout, self.keys = layout, keys
        self.devices = devices
        for device, handle in zip(devices, handles, strict=True):
            device.handle = handle
        self.idle: list[Device] = []
        """Devices in the rotation without a video, the longest idle first."""
        self.queue = Admission(layout.queue, "videos")
        self.metrics = Metrics()
        self.metrics.registry.register(DeviceMetrics(self))
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._client: aiohttp.ClientSession | None = None

    @property
    def client(self) -> aiohttp.ClientSession:
        """The HTTP client; aiohttp needs a running event loop to make it."""
        if self._client is None:
            self._client = new_client(PASS_SECONDS)
        return self._client

    def __serve_build_asgi_app__(self) -> App:
        """The ASGI application; Ray Serve calls this once."""
        start_logging()
        # without keys the guard accepts only requests to localhost, unless `insecure` is set
        host = "0.0.0.0" if self.layout.insecure else "127.0.0.1"
        settings = Settings(host=host, keys=self.keys, max_bytes=self.layout.max_bytes)
        return Guard(self.answer, settings, self.metrics, lambda: False, self.queue)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or the lifespan events of ASGI.

        Raises:
            Refusal: the guard answers with it.
        """
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        scope["route"] = SimpleNamespace(path=route_of(scope["path"]))
        if scope["type"] == "websocket":
            await self._live(WebSocket(scope, receive, send))
            return
        try:
            response = await self._respond(Request(scope, receive))
        except KgrcError as error:
            raise refusal_of(error) from error
        except ClientDisconnect:
            response = Response(status_code=CLIENT_LEFT)  # for the metrics and the log
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
        for task in self._tasks:
            task.cancel()
        if self._client is not None:
            await self._client.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _respond(self, request: Request) -> Response:
        path, method = request.url.path, request.method
        if method == "GET" and path in OWN_PATHS:
            return await OWN_PATHS[path](self, request)
        if method in ("GET", "DELETE") and path.startswith("/v1/jobs/"):
            return await self._job(request)
        if method == "POST" and WORK_PATHS.fullmatch(path):
            return await self._work(request)
        if method == "POST" and MANAGE_PATHS.fullmatch(path):
            return await self._manage(request)
        if STATS_PATH.fullmatch(path):
            raise Refusal(404, "a cluster has no statistics of models: each board has its own")
        return await self._pass(request)

    async def _alive(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = bool(self._sound())
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.metrics.text(), media_type=kind)

    async def _devices(self, request: Request) -> Response:
        return JSONResponse({"devices": [self._describe(device) for device in self.devices]})

    def _describe(self, device: Device) -> dict[str, Any]:
        state = "resting" if device.resting_reason else "idle" if device in self.idle else "busy"
        return {
            "name": device.name,
            "state": state,
            "trouble": device.resting_reason,
            "served": device.served,
            "failures": device.failures,
            "jobs": device.jobs,
            "live": device.live,
        }

    def _sound(self) -> list[Device]:
        """The devices in the rotation, those first that are idle."""
        found = [device for device in self.devices if not device.resting_reason]
        return sorted(found, key=lambda device: device not in self.idle)

    async def _ask(
        self,
        device: Device,
        request: Request,
        target: str = "",
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        seconds: float = PASS_SECONDS,
    ) -> Reply:
        """A device's answer to a request, or to one of the same client; 503 if it has none."""
        if headers is None:
            headers = keys_of(headers_of(request))
        url = device.url + (target or target_of(request))
        try:
            sent = for_device(device, headers)
            return await ask(self.client, request.method, url, sent, body, seconds)
        except UNREACHABLE as error:
            failure = f"does not answer ({type(error).__name__})"
            if device in self.idle:  # where it is busy, its request finds that out
                self.idle.remove(device)
                self._leave(device, failure)
            return no_answer(f"{device.name} {failure}")

    async def _pass(self, request: Request) -> Response:
        """Pass a request on to a device that is ready, and if it fails to the next one."""
        reply = None
        headers = headers_of(request)
        with contextlib.ExitStack() as held:
            body = b""
            if request.method != "GET":
                held.enter_context(self.queue.enter(client_of(request.scope)))
                body = await request.body()
            for device in self._sound():
                reply = await self._ask(device, request, headers=headers, body=body)
                if reply.status not in LEAVING:
                    break
        if reply is None:
            raise Refusal(503, "no device is ready", 5)
        return response_of(reply)

    async def _asked_all(self, request: Request) -> list[tuple[Device, Reply]]:
        """The answers of all devices in the rotation.

        Raises:
            Refusal: 503, there is none.
        """
        found = [device for device in self.devices if not device.resting_reason]
        if not found:
            raise Refusal(503, "no device is ready", 5)
        replies = await asyncio.gather(*(self._ask(device, request) for device in found))
        return list(zip(found, replies, strict=True))

    async def _programs(self, request: Request) -> Response:
        """The programs that all devices have in the same version, and those that differ."""
        answers = await self._asked_all(request)
        good = [
            (device, json.loads(reply.body)) for device, reply in answers if reply.status == 200
        ]
        if not good:
            return response_of(answers[0][1])
        holders: dict[tuple[str, str], list[str]] = {}
        for device, document in good:
            for program in document["programs"]:
                key = (program["name"], program["version"])
                holders.setdefault(key, []).append(device.name)
        common = {key for key, names in holders.items() if len(names) == len(good)}
        document = good[0][1]
        kept = [p for p in document["programs"] if (p["name"], p["version"]) in common]
        differing = [
            {"name": name, "version": version, "devices": names}
            for (name, version), names in holders.items()
            if (name, version) not in common
        ]
        if differing:
            log.warning("the devices serve different programs", extra={"differing": differing})
        backends = " and ".join(sorted({document["backend"] for _, document in good}))
        return JSONResponse({"backend": backends, "programs": kept, "differing": differing})

    async def _jobs(self, request: Request) -> Response:
        """The jobs of all devices that answer, newest first by the clocks of the devices."""
        answers = await self._asked_all(request)
        good = [
            (device, json.loads(reply.body)) for device, reply in answers if reply.status == 200
        ]
        if not good:
            return response_of(answers[0][1])
        jobs = [
            {**job, "id": f"{device.short}.{job['id']}"}
            for device, document in good
            for job in document["jobs"]
        ]
        jobs.sort(key=lambda job: -job["created"])
        asked = [device for device, _ in good]
        missing = [device.name for device in self.devices if device not in asked]
        return JSONResponse({"jobs": jobs[:MAX_LISTED], "missing": missing})

    async def _job(self, request: Request) -> Response:
        """State, events or cancellation of a job, from the device that took it."""
        found = JOB_PATH.fullmatch(request.url.path)
        short, key, stream = found.groups() if found else ("", "", None)
        device = next((device for device in self.devices if device.short == short), None)
        if device is None or not device.url:
            raise Refusal(404, f"no job {request.url.path.removeprefix('/v1/jobs/')[:50]!r}")
        target = f"/v1/jobs/{key}"
        if not stream:
            return response_of(named(short, await self._ask(device, request, target)))
        limit = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS
        )
        headers = for_device(device, keys_of(headers_of(request)))
        url = f"{device.url}{target}/events"
        try:
            answer = await self.client.request(request.method, url, headers=headers, timeout=limit)
            if answer.status != 200:
                body = await answer.read()
                answer.close()
                return Response(body, answer.status, media_type="application/json")
        except UNREACHABLE as error:
            why = f"{device.name} does not answer ({type(error).__name__})"
            raise Refusal(503, why, 5) from error
        return StreamingResponse(events(short, answer), media_type="text/event-stream")

    async def _manage(self, request: Request) -> Response:
        """Load or unload a program on every device.

        Raises:
            Refusal: 503, a device is not ready, and none was asked; 409, the devices now differ.
        """
        resting = [device.name for device in self.devices if device.resting_reason]
        if resting:
            text = "; programs are loaded and unloaded on all devices at once"
            raise Refusal(503, f"not ready: {', '.join(resting)}{text}", 5)
        with self.queue.enter(client_of(request.scope)):
            body, headers = await request.body(), headers_of(request)
            replies = await asyncio.gather(
                *(
                    self._ask(device, request, "", headers, body, self.layout.answer_seconds)
                    for device in self.devices
                )
            )
        if len({(reply.status, reply.body) for reply in replies}) > 1:
            texts = [
                f"{device.name} answered {reply.status} {reply.body[:200].decode(errors='replace')}"
                for device, reply in zip(self.devices, replies, strict=True)
            ]
            raise Refusal(409, f"the devices differ now: {'; '.join(texts)}")
        return response_of(replies[0])

    async def _work(self, request: Request) -> Response:
        """Give a video or an inference to an idle device, and if it fails to another one."""
        with self.queue.enter(client_of(request.scope)):
            headers, target = headers_of(request), target_of(request)
            body = await request.body()
            device, reply = await self._try(target, headers, body)
            if reply.status in LEAVING:
                log.info("trying a second device", extra={"reason": reply.body[:200]})
                with contextlib.suppress(Refusal):  # no other device: answer with the first reply
                    device, reply = await self._try(target, headers, body)
        if reply.status == 202:
            job = reply.headers.get("location", "")
            self._start(self._follow(device, job, for_device(device, keys_of(headers))))
            reply = named(device.short, reply)
        return response_of(reply)

    async def _follow(self, device: Device, job: str, headers: dict[str, str]) -> None:
        """Count a job as its device's until it ends, so that devices without jobs come first."""
        device.jobs += 1
        end = time.monotonic() + self.layout.answer_seconds
        try:
            while time.monotonic() < end:
                await asyncio.sleep(JOB_SECONDS)
                reply = await ask(self.client, "GET", device.url + job, headers)
                if reply.status != 200 or json.loads(reply.body)["state"] in FINAL:
                    return
        except (*UNREACHABLE, ValueError):
            return
        finally:
            device.jobs -= 1

    async def _live(self, client: WebSocket) -> None:
        """Pass a live session through to the device with the fewest.

        Raises:
            Refusal: 404, there is no such WebSocket.
        """
        if client.url.path != "/v1/live":
            raise Refusal(404, "the WebSocket of live sessions is /v1/live")
        reason = "no device is ready"
        for device in sorted(self._sound(), key=lambda device: device.live):
            url = device.url + target_of(client)
            headers = for_device(device, keys_of(headers_of(client)))
            device.live += 1
            try:
                failure = await pass_live(client, self.client, url, headers)
            finally:
                device.live -= 1
            if not failure:
                return
            reason = f"{device.name}: {failure}"
        offered = client.scope.get("subprotocols", [])
        await client.accept(next((o for o in offered if o.startswith(KEY_PROTOCOL)), None))
        await refuse_live(client, Refusal(503, reason, 5))

    async def _try(self, target: str, headers: dict[str, str], body: bytes) -> tuple[Device, Reply]:
        """Give a video or an inference to the next idle device; the device, and its answer.

        Raises:
            Refusal: 503, no device is in the rotation, or none was idle in time.
        """
        device = await self._take()
        # if this is cancelled the device may still be busy: it leaves until a readiness check
        failure = "its request was cancelled"
        answer = None
        try:
            answer = device.handle.work.remote(target, for_device(device, headers), body)
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
        return device, reply

    async def _take(self) -> Device:
        """The device that is idle for longest, of those with the fewest jobs."""
        end = time.monotonic() + self.layout.wait_seconds
        while True:
            if self.idle:
                device = min(self.idle, key=lambda device: device.jobs)
                self.idle.remove(device)
                return device
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
        self._start(self._probe(device))
        self._notify()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _probe(self, device: Device) -> None:
        while True:
            try:
                answer = device.handle.unavailable_reason.remote()
                reason = await within(answer, START_SECONDS)
                if not reason:
                    answer = device.handle.address.remote()
                    device.url = await within(answer, START_SECONDS)
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


OWN_PATHS: dict[str, Callable[[Gateway, Request], Coroutine[Any, Any, Response]]] = {
    "/v2/health/live": Gateway._alive,
    "/v2/health/ready": Gateway._ready,
    "/metrics": Gateway._metrics,
    "/v1/devices": Gateway._devices,
    "/v1/programs": Gateway._programs,
    "/v1/jobs": Gateway._jobs,
}
"""Path -> what the gateway answers to GET, itself or from the answers of all devices."""


def route_of(path: str) -> str:
    """A request's path for the metrics, without the names of jobs and models."""
    if path in OWN_PATHS or path in ("/", "/docs", "/openapi.json", "/v1/live"):
        return path
    if path.startswith("/v1/jobs/"):
        return "/v1/jobs/{key}"
    if WORK_PATHS.fullmatch(path):
        return path if path.startswith("/v1/") else "/v2/models/{name}/infer"
    return "other"


def target_of(request: HTTPConnection) -> str:
    """Path and query of a request, quoted anew.

    A query that no parser accepts would look like a failure of the board.
    """
    path = quote(request.scope["path"], safe="/:")
    query = urlencode(request.query_params.multi_items())
    return f"{path}?{query}" if query else path


def headers_of(request: HTTPConnection) -> dict[str, str]:
    """The headers of a request that are passed on."""
    return {name: request.headers[name] for name in PASSED_ON if name in request.headers}


def for_device(device: Device, headers: dict[str, str]) -> dict[str, str]:
    """Headers with the key that the device takes."""
    if not device.token:
        return headers
    kept = {name: value for name, value in headers.items() if name not in KEYS}
    return {**kept, "x-api-key": device.token}


def response_of(reply: Reply) -> Response:
    """A device's answer, for the client."""
    heads = {name: reply.headers[name] for name in PASSED_BACK if name in reply.headers}
    heads.setdefault("content-type", "application/json")
    if reply.status in LEAVING:
        heads.setdefault("retry-after", "5")
    return Response(reply.body, reply.status, heads)


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
    keys = read_keys(Path(layout.keys)) if layout.keys else ()
    token = secrets.token_urlsafe(24)
    own_keys = keys or (Key("cluster", hashlib.sha256(token.encode()).digest()),)
    devices: list[tuple[Device, Any]] = []
    for url in filter(None, (part.strip() for part in layout.boards.split(","))):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ConfigError(f"board {url!r}: not an address such as http://board:8000")
        short = f"board-{len(devices)}"
        board = _deployment(Replica, short, 0).bind(url, layout.answer_seconds)
        devices.append((Device(url, short), board))
    if layout.emulators:
        program = Path(layout.program or shipped_program()).absolute()
        load(program)
        programs = {layout.name or program.stem: str(program)}
    for number in range(layout.emulators):
        name = f"emulator-{number}"
        emulator = _deployment(Emulator, name, 1).bind(
            programs, layout.backend, layout.max_bytes, layout.answer_seconds, own_keys
        )
        devices.append((Device(name, name, "" if keys else token), emulator))
    if not devices:
        raise ConfigError("no device: give the address of a board, or how many emulators")
    gateway = serve.deployment(
        name="gateway",
        num_replicas=1,  # it alone knows which devices are idle
        max_ongoing_requests=layout.queue + 1000,  # its own queue refuses before Ray's does
        max_queued_requests=1000,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Gateway))
    listed, handles = [device for device, _ in devices], [handle for _, handle in devices]
    return gateway.bind(layout, keys, listed, handles)


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
