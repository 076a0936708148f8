"""What the service answers, as schemas for the API's description."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorDocument(BaseModel):
    """Of every status from 400 on."""

    error: str


class Label(BaseModel):
    """A class and its probability."""

    label: str
    confidence: float


class Segment(BaseModel):
    """A stretch of the video in which one label is the best; confidence is the mean over it."""

    label: str
    confidence: float
    start_ms: float
    end_ms: float


class Window(BaseModel):
    """What the network saw in one clip."""

    start_ms: float
    end_ms: float
    labels: list[Label]


class ProgramName(BaseModel):
    """Which program it was; the version is the start of its file's SHA-256."""

    name: str
    version: str


class VideoFacts(BaseModel):
    """What the video was, as far as it could be decoded."""

    duration_ms: float
    frames: int
    width: int
    height: int
    codec: str
    container: str
    notes: list[str]


class Timings(BaseModel):
    """Where the time went, on this host."""

    wait_for_device: float
    run: float
    decode_and_rest: float
    total: float


class LayerFacts(BaseModel):
    """One task of the last clip: counted work, time on this host, modelled time on the board."""

    task: str
    macs: int
    bytes: int
    ms: float
    modelled_ms: float


class BoardFacts(BaseModel):
    """Latency of a clip on the accelerator."""

    latency_ms: float
    clock_mhz: float
    kind: str
    note: str


class Classification(BaseModel):
    """What a video shows: the best labels over all of it, and when."""

    program: ProgramName
    backend: str
    video: VideoFacts
    labels: list[Label]
    segments: list[Segment]
    windows: list[Window]
    timings_ms: Timings
    layers: list[LayerFacts]
    board: BoardFacts


class Progress(BaseModel):
    """How far a job is; `share` of the frames that the container declares."""

    windows: int
    frames: int
    share: float | None


class JobDocument(BaseModel):
    """A job: queued, running, done, failed, cancelled, or lost."""

    id: str
    state: str
    created: float
    progress: Progress
    result: Classification | None
    error: str | None


Documented = dict[int | str, dict[str, Any]]

ERRORS: Documented = {
    status: {"model": ErrorDocument, "description": text}
    for status, text in {
        400: "Not understood",
        401: "A key is needed",
        403: "Another origin",
        404: "No such program or job",
        408: "The body came too slowly",
        413: "Too large",
        415: "Another kind of body",
        421: "Another host",
        422: "Not a video, or an option out of range",
        429: "Too many at a time; see Retry-After",
        431: "The head is too large",
        500: "The service failed",
        503: "The device does not answer; see Retry-After",
        504: "Not done in the time asked for",
        507: "No room on the disk",
    }.items()
}

GONE: Documented = {404: ERRORS[404]}
