"""The Open Inference Protocol over gRPC, as KServe's and Triton's clients use it.

The same models, keys and texts of errors as over HTTP (`protocol_v2.py`). Without a key it tells
only whether the server is live and ready. Streams, shared memory and traces are not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from pynq_kgrc.errors import ConfigError, KgrcError
from pynq_kgrc.service.guard import client_of
from pynq_kgrc.service.inference import EXTENSIONS, chosen_outputs, metadata, run_inference
from pynq_kgrc.service.keys import find_key
from pynq_kgrc.service.messages import CLASSES, METHODS, SERVICE
from pynq_kgrc.service.parts import Service
from pynq_kgrc.service.refusal import Refusal, refusal_of
from pynq_kgrc.service.tensors import (
    INPUT,
    InferRequest,
    RequestedOutput,
    Tensor,
    read_clips,
    split_clips,
)
from pynq_kgrc.service.wire import BodyRequest

log = logging.getLogger("pynq_kgrc.service")

MAX_MESSAGE = 12_000_000
"""Largest request in bytes; gRPC holds it in memory before the service sees it."""
AT_ONCE = 10
"""Requests that are received and answered at a time; gRPC refuses further ones."""
OPEN_METHODS = ("ServerLive", "ServerReady")
"""Methods that need no key."""
MANAGE_METHODS = ("RepositoryModelLoad", "RepositoryModelUnload")
"""Methods that need a key that manages."""
QUIET_METHODS = ("ServerLive", "ServerReady", "ModelReady")
"""Methods whose calls are logged for debugging only."""

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP status of a refusal -> gRPC's; others are INTERNAL."""


class GrpcServer:
    """A gRPC server of a service; `start` binds it.

    Args:
        service: the parts that answer.
        address: host and port; port 0 takes a free one.
    """

    def __init__(self, service: Service, host: str, port: int) -> None:
        self.service = service
        self.host, self.port = f"[{host}]" if ":" in host else host, port
        self._server: Any = None

    async def start(self) -> None:
        """Listen; `port` is the one that is bound afterwards.

        Raises:
            ConfigError: the address is in use, or does not belong to this machine.
        """
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # else two servers share a port without a word
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_metadata_size", self.service.settings.max_header_bytes),
            ],
            maximum_concurrent_rpcs=AT_ONCE,
        )
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._method(name),
                request_deserializer=CLASSES[f"{name}Request"].FromString,
                response_serializer=CLASSES[f"{name}Response"].SerializeToString,
            )
            for name in METHODS
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        try:
            address, tls = f"{self.host}:{self.port}", self.service.settings.tls
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                certificate, key = (path.read_bytes() for path in tls)
                credentials = grpc.ssl_server_credentials([(key, certificate)])
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {self.host} port {self.port} for gRPC: is it in use?"
            ) from error
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Accept no more requests; those that run have that time to finish."""
        if self._server is not None:
            await self._server.stop(seconds)

    def _method(self, name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        """The method of that name, with keys, errors, metrics and the log around it."""
        answer = getattr(self, _verb(name))

        async def method(request: Any, context: Any) -> Any:
            began, code = time.perf_counter(), grpc.StatusCode.OK
            head = {key: str(value) for key, value in context.invocation_metadata() or ()}
            client = _client(context)
            try:
                self._check_key(name, head)
                return await answer(request, client)
            except KgrcError as error:
                refusal = refusal_of(error)
                code = CODES.get(refusal.status, grpc.StatusCode.INTERNAL)
                await context.abort(code, refusal.text)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception:
                code = grpc.StatusCode.INTERNAL
                log.exception("failed", extra={"method": name})
                await context.abort(code, "the service failed; its log says more")
            finally:
                self._count(name, code.name, time.perf_counter() - began, client)

        return method

    def _check_key(self, name: str, head: dict[str, str]) -> None:
        keys = self.service.settings.keys
        if not keys or name in OPEN_METHODS:
            return
        key = find_key(keys, head)
        if key is None:
            raise Refusal(401, "a key is needed: metadata authorization: Bearer KEY")
        if name in MANAGE_METHODS and not key.manages:
            raise Refusal(403, f"the key {key.name} may {key.role}, not manage")

    def _count(self, name: str, code: str, seconds: float, client: str) -> None:
        route = f"/{SERVICE}/{name}"
        self.service.metrics.requests.labels(route, "GRPC", code).inc()
        self.service.metrics.request_seconds.labels(route).observe(seconds)
        level = logging.DEBUG if name in QUIET_METHODS else logging.INFO
        fields = {"method": "GRPC", "path": route, "status": code, "ms": round(1e3 * seconds, 1)}
        log.log(level, "request", extra={**fields, "client": client})

    # ---- server and models ------------------------------------------------------------------

    async def _server_live(self, request: Any, client: str) -> Any:
        return CLASSES["ServerLiveResponse"](live=True)

    async def _server_ready(self, request: Any, client: str) -> Any:
        return CLASSES["ServerReadyResponse"](ready=not self.service.unavailable_reason())

    async def _server_metadata(self, request: Any, client: str) -> Any:
        return CLASSES["ServerMetadataResponse"](
            name="pynq_kgrc", version="2", extensions=EXTENSIONS
        )

    async def _model_ready(self, request: Any, client: str) -> Any:
        self.service.catalogue.find(request.name, request.version or None)
        return CLASSES["ModelReadyResponse"](ready=not self.service.unavailable_reason())

    async def _model_metadata(self, request: Any, client: str) -> Any:
        program = self.service.catalogue.find(request.name, request.version or None)
        return CLASSES["ModelMetadataResponse"](**metadata(program))

    # ---- inference --------------------------------------------------------------------------

    async def _model_infer(self, request: Any, client: str) -> Any:
        service = self.service
        async with contextlib.AsyncExitStack() as held:
            held.enter_context(service.queue.enter(client))
            leased = service.catalogue.lease(request.model_name, request.model_version or None)
            program = held.enter_context(leased)
            how = BodyRequest(program.name, program.clip_shape, MAX_MESSAGE)
            asked, values = read_message(request)
            clips = split_clips(how, read_clips(how, asked, memoryview(values)))
            results = await run_inference(service, program, asked, clips)
            outputs = chosen_outputs(program, asked, results)
        return CLASSES["ModelInferResponse"](
            model_name=program.name,
            model_version=program.version,
            id=request.id,
            outputs=[
                {"name": output.name, "datatype": output.datatype, "shape": output.shape}
                for output in outputs
            ],
            raw_output_contents=[output.raw for output in outputs],
        )

    # ---- the repository ---------------------------------------------------------------------

    async def _repository_index(self, request: Any, client: str) -> Any:
        rows = self.service.catalogue.index(request.ready)
        return CLASSES["RepositoryIndexResponse"](models=rows)

    async def _repository_model_load(self, request: Any, client: str) -> Any:
        if request.parameters:
            raise Refusal(400, "parameters; accepted are none: a program file has all it needs")
        await self.service.catalogue.load(request.model_name)
        return CLASSES["RepositoryModelLoadResponse"]()

    async def _repository_model_unload(self, request: Any, client: str) -> Any:
        await self.service.catalogue.unload(request.model_name)
        return CLASSES["RepositoryModelUnloadResponse"]()


def read_message(request: Any) -> tuple[InferRequest, bytes]:
    """A ModelInferRequest as the same request over HTTP, and the bytes of its tensor.

    Raises:
        Refusal: 400, values outside of uint8, or both forms of values at a time.
    """
    raw = list(request.raw_input_contents)
    tensors, values = [], b""
    for given in request.inputs:
        parameters = _plain(given.parameters)
        contents = given.contents
        if raw and contents.ByteSize():
            raise Refusal(400, f"input {INPUT}: raw_input_contents beside contents; send one")
        try:
            values = raw[0] if len(raw) == 1 else bytes(contents.uint_contents)
        except ValueError:
            raise Refusal(400, f"input {INPUT}: data beyond 255, not uint8") from None
        parameters["binary_data_size"] = len(values)
        tensors.append(Tensor(given.name, list(given.shape), given.datatype, parameters))
    if len(raw) > 1:
        raise Refusal(400, f"{len(raw)} raw_input_contents; accepted is one, of {INPUT}")
    outputs = [RequestedOutput(one.name, _plain(one.parameters)) for one in request.outputs]
    asked = InferRequest(tensors, request.id or None, outputs or None, _plain(request.parameters))
    return asked, values


def _plain(parameters: Any) -> dict[str, Any]:
    """Parameters as values of Python."""
    found = {}
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        found[name] = None if kind is None else getattr(value, kind)
    return found


def _verb(name: str) -> str:
    """The name of a method here: ServerLive -> _server_live."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def _client(context: Any) -> str:
    """The address of a client; empty for this machine, as `guard.client_of` gives it."""
    host = str(context.peer()).split(":", 1)[-1].rpartition(":")[0].strip("[]")
    return client_of({"client": (host, 0)})
