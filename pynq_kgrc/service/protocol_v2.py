"""The Open Inference Protocol, version 2, over HTTP, as KServe and Triton clients use it.

A model has one input, `frames`, UINT8 [-1, D, H, W, 3] (RGB), and two outputs, `probabilities` and
`logits`, FP32 [-1, classes]. Probabilities are the soft-max of the logits divided by the
program's temperature. Extensions: binary tensors, classification, model repository.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from pynq_kgrc.quant import Array
from pynq_kgrc.service.catalogue import Catalogue, ServedProgram
from pynq_kgrc.service.guard import client_of
from pynq_kgrc.service.parts import Service
from pynq_kgrc.service.pool import Pool
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.schemas import ERRORS, NOT_FOUND
from pynq_kgrc.service.tensors import (
    HEADER_LENGTH,
    INPUT,
    InferRequest,
    RequestedOutput,
    flag_parameter,
    whole_parameter,
)
from pynq_kgrc.service.waiting import in_order, within

OIP = "Open Inference Protocol"
OUTPUTS = ("probabilities", "logits")
WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
"""A weight (qvalue) of RFC 9110, 12.4.2."""
MAX_CLASSES = 1000
"""Most classes of an output that is asked for as a classification."""
EXTENSIONS = ["classification", "binary_tensor_data", "model_repository"]


def metadata(program: ServedProgram) -> dict[str, Any]:
    """The names, types and shapes of a model's inputs and outputs."""
    outputs = [
        {"name": name, "datatype": "FP32", "shape": [-1, len(program.labels)]} for name in OUTPUTS
    ]
    return {
        "name": program.name,
        "versions": [program.version],
        "platform": "pynq_kgrc",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *program.clip_shape]}],
        "outputs": outputs,
    }


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
    program: ServedProgram, request: InferRequest, results: dict[str, Any], accepted: str
) -> Response:
    """Encode the answer as the request asks: JSON or binary, values or classes, plain or gzip.

    `accepted` is the header Accept-Encoding of the request.

    Raises:
        Refusal: 400, the model has no such output.
    """
    everything = flag_parameter(request.parameters, "binary_data_output", False)
    outputs: list[dict[str, Any]] = []
    binaries: list[bytes] = []
    asked: set[str] = set()
    for wanted in request.outputs or [RequestedOutput(name) for name in OUTPUTS]:
        if wanted.name not in results:
            there = ", ".join(results)
            raise Refusal(400, f"no output {wanted.name[:50]!r}; there are {there}")
        if wanted.name in asked:
            raise Refusal(400, f"output {wanted.name!r} is asked for twice; accepted is once")
        asked.add(wanted.name)
        values = results[wanted.name]
        best = whole_parameter(wanted.parameters, "classification", 0, MAX_CLASSES, 0)
        as_binary = flag_parameter(wanted.parameters, "binary_data", everything)
        output: dict[str, Any] = {"name": wanted.name}
        if best:
            texts = [_classes(row, program.labels, best) for row in values]
            output |= {"datatype": "BYTES", "shape": [len(texts), len(texts[0])]}
            flat = [text for row in texts for text in row]
            data = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in flat)
            plain: Any = flat
        else:
            output |= {"datatype": "FP32", "shape": list(values.shape)}
            data, plain = values.astype("<f4").tobytes(), values.reshape(-1).tolist()
        if as_binary:
            output["parameters"] = {"binary_data_size": len(data)}
            binaries.append(data)
        else:
            output["data"] = plain
        outputs.append(output)
    document = {"model_name": program.name, "model_version": program.version, "outputs": outputs}
    if request.id:
        document["id"] = request.id
    text = msgspec.json.encode(document)
    body = b"".join([text, *binaries])
    headers = {"vary": "Accept-Encoding"}
    if binaries:
        headers[HEADER_LENGTH] = str(len(text))
    if accepts_gzip(accepted) and len(body) > 1000:
        body = gzip.compress(body, 1)
        headers["content-encoding"] = "gzip"
    kind = "application/octet-stream" if binaries else "application/json"
    return Response(body, media_type=kind, headers=headers)


def _classes(row: Any, labels: list[str], best: int) -> list[str]:
    order = np.argsort(-row, kind="stable")[:best]
    return [f"{row[i]:.6f}:{i}:{labels[i]}" for i in order]


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

    @router.post("/models/{name}/versions/{version}/infer", tags=[OIP], openapi_extra=body)
    @router.post("/models/{name}/infer", tags=[OIP], openapi_extra=body)
    async def infer(name: str, request: Request, version: str | None = None) -> Response:
        """Run a model on clips of frames."""
        async with contextlib.AsyncExitStack() as held:
            program = held.enter_context(catalogue.lease(name, version))
            receiving = service.receive_inference(request, program)
            inference, clips = await held.enter_async_context(receiving)
            held.enter_context(service.queue.enter(client_of(request.scope)))
            # microseconds, as Triton has it; 0: no timeout of its own
            timeout = whole_parameter(inference.parameters, "timeout", 0, 10**15, 0)
            seconds = timeout / 1e6 if timeout else service.settings.job_seconds
            began = time.perf_counter()
            try:
                running = within(run_clips(service.pool, program.key, clips), seconds)
                scores = await service.while_connected(request, running)
            except asyncio.TimeoutError:
                waited = time.perf_counter() - began
                raise Refusal(504, f"not done within the {waited:.3f} s asked for") from None
            results = {"logits": scores[:, 0], "probabilities": scores[:, 1]}
            accepted = ", ".join(request.headers.getlist("accept-encoding"))
            return write_answer(program, inference, results, accepted)


async def run_clips(pool: Pool, key: str, clips: list[memoryview]) -> Array:
    """Logits and probabilities of clips: float32 [clips, 2, classes]; every worker runs some."""

    async def listed() -> AsyncIterator[memoryview]:
        for clip in clips:
            yield clip

    runs = in_order(listed(), lambda clip: pool.run(key, clip), pool.size)
    async with contextlib.aclosing(runs):
        found = [run async for _, run in runs]
    scores: Array = np.stack([np.frombuffer(run.scores, "<f4").reshape(2, -1) for run in found])
    return scores


def add_repository_routes(router: APIRouter, catalogue: Catalogue) -> None:
    """The model repository extension: list, load and unload programs."""

    @router.post("/repository/index", tags=["Model repository"])
    async def index() -> list[dict[str, str]]:
        """Every program that is loaded or may be loaded, and why it is not loaded."""
        rows = []
        for name in {**catalogue.sources(), **catalogue.served}:
            program = catalogue.served.get(name)
            rows.append(
                {
                    "name": name,
                    "version": "" if program is None else program.version,
                    "state": "UNAVAILABLE" if program is None else "READY",
                    "reason": catalogue.reasons.get(name, ""),
                }
            )
        return rows

    @router.post("/repository/models/{name}/load", tags=["Model repository"], responses=NOT_FOUND)
    async def load(name: str) -> dict[str, Any]:
        """Load a program, or reload its file.

        The old version is served until the new one has run a clip in every worker.
        """
        program = await catalogue.load(name)
        return {"name": program.name, "version": program.version}

    @router.post("/repository/models/{name}/unload", tags=["Model repository"], responses=NOT_FOUND)
    async def unload(name: str) -> dict[str, Any]:
        """Stop serving a program; requests that use it still finish."""
        await catalogue.unload(name)
        return {"name": name}
