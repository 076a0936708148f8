"""Documents that the service answers with, as msgspec structs; OpenAPI's schemas come from them."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from pynq_kgrc.results import Recognition
from pynq_kgrc.service.wire import LayerRun, ProgramDocument


class ErrorDocument(msgspec.Struct, frozen=True):
    """The body of every answer whose status is 400 or more."""

    error: str


class ProgramName(msgspec.Struct, frozen=True):
    """Which program ran; the version is the first 12 hex digits of its file's SHA-256."""

    name: str
    version: str


class VideoFacts(msgspec.Struct, frozen=True):
    """Properties of the part of the video that could be decoded."""

    duration_ms: float
    frames: int
    width: int
    height: int
    codec: str
    container: str
    notes: list[str]


class Timings(msgspec.Struct, frozen=True):
    """Milliseconds on this host, summed over all clips."""

    wait_for_device: float
    run: float
    decode_and_rest: float
    total: float


class LayerFacts(LayerRun, frozen=True, kw_only=True):
    """One task of the last clip: counted work, time on this host, modelled time on the board."""

    modelled_ms: float


class BoardFacts(msgspec.Struct, frozen=True):
    """Latency of a clip on the accelerator; `kind` says how it was found."""

    latency_ms: float
    clock_mhz: float
    kind: str
    note: str


class Classification(Recognition, frozen=True, kw_only=True):
    """The best labels of the whole video, of its segments, and of each window, and their cost."""

    program: ProgramName
    video: VideoFacts
    timings_ms: Timings
    layers: list[LayerFacts]
    board: BoardFacts


class Progress(msgspec.Struct, frozen=True):
    """How far a job is; `share` is of the frames that the container declares, if it does."""

    windows: int
    frames: int
    share: float | None


class JobDocument(msgspec.Struct, frozen=True):
    """A job; `state` is queued, running, done, failed, cancelled or lost."""

    id: str
    state: str
    created: float
    progress: Progress
    result: Classification | None
    error: str | None


class ListedJob(msgspec.Struct, frozen=True):
    """A job without its result."""

    id: str
    state: str
    created: float


class JobList(msgspec.Struct, frozen=True):
    """Jobs, newest first."""

    jobs: list[ListedJob]


class ListedProgram(ProgramDocument, frozen=True, kw_only=True):
    """A loaded program: its description and version."""

    version: str


class ProgramList(msgspec.Struct, frozen=True):
    """All loaded programs, and the backend that runs them."""

    backend: str
    programs: list[ListedProgram]


class StructResponse(JSONResponse):
    """A msgspec struct as JSON."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return msgspec.json.encode(content)


_, COMPONENTS = msgspec.json.schema_components(
    [ErrorDocument, Classification, JobDocument, JobList, ProgramList],
    ref_template="#/components/schemas/{name}",
)


class DescribedApp(FastAPI):
    """FastAPI with the schemas of msgspec structs in `/openapi.json`."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document; FastAPI makes it once and caches it."""
        document = super().openapi()
        document.setdefault("components", {}).setdefault("schemas", {}).update(COMPONENTS)
        return document


Documented = dict[int | str, dict[str, Any]]
"""Status -> what FastAPI's `responses` takes."""


def answer_of(kind: type[msgspec.Struct], description: str) -> dict[str, Any]:
    """A response for FastAPI's `responses` whose body is this struct as JSON."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


ERRORS: Documented = {
    status: answer_of(ErrorDocument, text)
    for status, text in {
        400: "The request is malformed",
        401: "A key is needed",
        403: "The request comes from a page of another origin",
        404: "No such program or job",
        408: "The body arrived too slowly",
        413: "Too large",
        415: "Unsupported type of body",
        421: "The Host header names another host",
        422: "Not a video, or an option out of range",
        429: "Too many requests at a time; see Retry-After",
        431: "The header is too large",
        500: "The service failed",
        503: "The device does not answer; see Retry-After",
        504: "Not done within the time the request asked for",
        507: "The disk is full",
    }.items()
}

NOT_FOUND: Documented = {404: ERRORS[404]}
