"""The Open Inference Protocol, version 2, over HTTP, as KServe and Triton clients use it.

A model has one input, `frames`, UINT8 [-1, D, H, W, 3] (RGB), and two outputs, `probabilities` and
`logits`, FP32 [-1, classes]. Probabilities are the soft-max of the logits divided by the
program's temperature. Extensions: binary tensors, classification, model repository.
"""

from __future__ import annotations

import contextlib
import gzip
import re
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from pynq_kgrc.service.catalogue import Catalogue, ServedProgram
from pynq_kgrc.service.guard import client_of
from pynq_kgrc.service.inference import (
    EXTENSIONS,
    OutputTensor,
    chosen_outputs,
    configuration,
    metadata,
    run_inference,
)
from pynq_kgrc.service.parts import Service, limited
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.schemas import ERRORS, NOT_FOUND
from pynq_kgrc.service.tensors import (
    HEADER_LENGTH,
    MAX_HEAD,
    InferRequest,
)

OIP = "Open Inference Protocol"
WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
"""A weight (qvalue) of RFC 9110, 12.4.2."""


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding header asks for gzip (RFC 9110, 12.4.2 and 12.5.3).

    A coding that is not named has the weight of `*`. gzip is not used where the client prefers
    `identity`, and a coding with a malformed weight counts as refused.
    """
    weights: dict[str, float] = {}
    for part in header.lower().split(","):
        coding, *parameters = (piece.strip() for piece in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                weight = float(value) if WEIGHT.fullmatch(value := value.strip()) else 0.0
        weights[coding.removeprefix("x-")] = weight
    gzip_weight = weights.get("gzip", weights.get("*", 0.0))
    return gzip_weight > 0 and gzip_weight >= weights.get("identity", 0.0)


def write_answer(
    program: ServedProgram, request: InferRequest, outputs: list[OutputTensor], accepted: str
) -> Response:
    """Encode the answer as the request asks: JSON or binary, plain or gzip.

    `accepted` is the header Accept-Encoding of the request.
    """
    listed: list[dict[str, Any]] = []
    binaries: list[bytes] = []
    for output in outputs:
        document: dict[str, Any] = {
            "name": output.name, "datatype": output.datatype, "shape": output.shape
        }  # fmt: skip
        if output.binary:
            binaries.append(output.raw)
            document["parameters"] = {"binary_data_size": len(binaries[-1])}
        else:
            document["data"] = output.values
        listed.append(document)
    answer = {"model_name": program.name, "model_version": program.version, "outputs": listed}
    if request.id:
        answer["id"] = request.id
    text = msgspec.json.encode(answer)
    body = b"".join([text, *binaries])
    headers = {"vary": "Accept-Encoding"}
    if binaries:
        headers[HEADER_LENGTH] = str(len(text))
    if accepts_gzip(accepted) and len(body) > 1000:
        body = gzip.compress(body, 1)
        headers["content-encoding"] = "gzip"
    kind = "application/octet-stream" if binaries else "application/json"
    return Response(body, media_type=kind, headers=headers)


def make_router(service: Service) -> APIRouter:
    """The routes below /v2."""
    router = APIRouter(prefix="/v2", responses=ERRORS)
    add_server_routes(router, service)
    add_model_routes(router, service)
    add_repository_routes(router, service.catalogue)
    return router


def add_server_routes(router: APIRouter, service: Service) -> None:
    """Health and metadata of the server."""

    @router.get("/health/live", tags=[OIP])
    async def live() -> dict[str, bool]:
        """Whether the service answers."""
        return {"live": True}

    @router.get("/health/ready", tags=[OIP], responses={503: ERRORS[503]})
    async def ready() -> Response:
        """Whether requests can be served: a worker runs, and a program is loaded."""
        reason = service.unavailable_reason()
        if reason:
            document = {"ready": False, "error": reason}
            return JSONResponse(document, 503, headers={"retry-after": "5"})
        return JSONResponse({"ready": True})

    @router.get("", tags=[OIP])
    async def server() -> dict[str, Any]:
        """Name, version and extensions of this server."""
        return {"name": "pynq_kgrc", "version": "2", "extensions": EXTENSIONS}


def add_model_routes(router: APIRouter, service: Service) -> None:
    """Readiness, metadata and inference of a model, with and without its version."""
    catalogue = service.catalogue
    body = {"requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}}}

    @router.get("/models/{name}/versions/{version}/stats", tags=[OIP], responses=NOT_FOUND)
    @router.get("/models/{name}/stats", tags=[OIP], responses=NOT_FOUND)
    @router.get("/models/stats", tags=[OIP])
    async def stats(name: str | None = None, version: str | None = None) -> dict[str, Any]:
        """What a model, or every loaded one, did since the service was started."""
        chosen = catalogue.served.values() if name is None else [catalogue.find(name, version)]
        return {"model_stats": [statistics_of(service, program) for program in chosen]}

    @router.get("/models/{name}/versions/{version}/ready", tags=[OIP], responses=NOT_FOUND)
    @router.get("/models/{name}/ready", tags=[OIP], responses=NOT_FOUND)
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        """Whether a model is served."""
        try:
            program = catalogue.find(name, version)
        except Refusal:  # without the names of the loaded ones: this route needs no key
            raise Refusal(404, f"no program {name[:100]!r} of that version is loaded") from None
        if reason := service.unavailable_reason():
            raise Refusal(503, reason, 5)
        return {"name": program.name, "ready": True}

    @router.get("/models/{name}/versions/{version}", tags=[OIP], responses=NOT_FOUND)
    @router.get("/models/{name}", tags=[OIP], responses=NOT_FOUND)
    async def model(name: str, version: str | None = None) -> dict[str, Any]:
        """The inputs and outputs of a model."""
        return metadata(catalogue.find(name, version))

    @router.get("/models/{name}/versions/{version}/config", tags=[OIP], responses=NOT_FOUND)
    @router.get("/models/{name}/config", tags=[OIP], responses=NOT_FOUND)
    async def config(name: str, version: str | None = None) -> dict[str, Any]:
        """The configuration of a model, as Triton gives it."""
        return configuration(catalogue.find(name, version))

    @router.post("/models/{name}/versions/{version}/infer", tags=[OIP], openapi_extra=body)
    @router.post("/models/{name}/infer", tags=[OIP], openapi_extra=body)
    async def infer(name: str, request: Request, version: str | None = None) -> Response:
        """Run a model on clips of frames."""
        async with contextlib.AsyncExitStack() as held:
            program = held.enter_context(catalogue.lease(name, version))
            receiving = service.receive_inference(request, program)
            inference, clips = await held.enter_async_context(receiving)
            held.enter_context(service.queue.enter(client_of(request.scope)))
            running = run_inference(service, program, inference, clips)
            results = await service.while_connected(request, running)
            outputs = chosen_outputs(program, inference, results)
            accepted = ", ".join(request.headers.getlist("accept-encoding"))
            return write_answer(program, inference, outputs, accepted)


class IndexRequest(msgspec.Struct):
    """What `index` may be asked: the loaded programs only."""

    ready: bool = False


class LoadRequest(msgspec.Struct):
    """Triton's parameters of `load`, none of which is accepted."""

    parameters: dict[str, Any] = {}


Order = TypeVar("Order", bound=msgspec.Struct)


def statistics_of(service: Service, program: ServedProgram) -> dict[str, Any]:
    """What a program did since the service was started, as Triton gives it."""
    counts = service.metrics.model(program.name, program.version)
    return {"name": program.name, "version": program.version, **counts.statistics()}


async def read_order(request: Request, kind: type[Order]) -> Order:
    """The JSON body of an order to the repository; the defaults if it is empty.

    Raises:
        Refusal: 400, it is not of that form; 413.
    """
    body = b"".join([part async for part in limited(request.stream(), MAX_HEAD)])
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body: {error}") from error


def body_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """An optional JSON body for FastAPI's `openapi_extra`."""
    schema = msgspec.json.schema(kind)["$defs"][kind.__name__]
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}


def add_repository_routes(router: APIRouter, catalogue: Catalogue) -> None:
    """The model repository extension: list, load and unload programs."""

    @router.post(
        "/repository/index", tags=["Model repository"], openapi_extra=body_of(IndexRequest)
    )
    async def index(request: Request) -> list[dict[str, str]]:
        """Every program that is loaded or may be loaded, and why it is not loaded."""
        return catalogue.index((await read_order(request, IndexRequest)).ready)

    @router.post(
        "/repository/models/{name}/load",
        tags=["Model repository"],
        responses=NOT_FOUND,
        openapi_extra=body_of(LoadRequest),
    )
    async def load(name: str, request: Request) -> dict[str, Any]:
        """Load a program, or reload its file.

        The old version is served until the new one has run a clip in every worker.
        """
        given = (await read_order(request, LoadRequest)).parameters
        if given:
            raise Refusal(
                400,
                f"parameters {', '.join(sorted(given))[:100]}; accepted are none: a program "
                f"file has all of its configuration",
            )
        program = await catalogue.load(name)
        return {"name": program.name, "version": program.version}

    @router.post("/repository/models/{name}/unload", tags=["Model repository"], responses=NOT_FOUND)
    async def unload(name: str) -> dict[str, Any]:
        """Stop serving a program; requests that use it still finish."""
        await catalogue.unload(name)
        return {"name": name}
