"""Inference by the Open Inference Protocol, over HTTP or gRPC: tensors, run, outputs of a model."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import numpy as np

from pynq_kgrc.quant import Array
from pynq_kgrc.service.catalogue import ServedProgram
from pynq_kgrc.service.parts import Service
from pynq_kgrc.service.pool import Pool
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.tensors import (
    INPUT,
    MAX_BATCH,
    InferRequest,
    RequestedOutput,
    flag_parameter,
    whole_parameter,
)
from pynq_kgrc.service.waiting import in_order, within

OUTPUTS = ("probabilities", "logits")
MAX_CLASSES = 1000
"""Most classes of an output that is asked for as a classification."""
EXTENSIONS = [
    *("classification", "binary_tensor_data", "model_repository"),
    *("model_configuration", "statistics"),
]


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


def configuration(program: ServedProgram) -> dict[str, Any]:
    """Triton's configuration of a model, as far as it says something here."""
    classes = [len(program.labels)]
    return {
        "name": program.name,
        "platform": "pynq_kgrc",
        "backend": "pynq_kgrc",
        "max_batch_size": MAX_BATCH,
        "input": [
            {"name": INPUT, "data_type": "TYPE_UINT8", "dims": [*program.clip_shape]},
        ],
        "output": [{"name": name, "data_type": "TYPE_FP32", "dims": classes} for name in OUTPUTS],
    }


class OutputTensor(NamedTuple):
    """An output as a request asks for it."""

    name: str
    datatype: str
    """FP32, or BYTES for a classification."""
    shape: list[int]
    values: list[Any]
    """Numbers or texts, in row-major order."""
    binary: bool
    """Whether the client asked for bytes instead of JSON."""

    @property
    def raw(self) -> bytes:
        """The values as the protocol's binary form has them."""
        if self.datatype == "FP32":
            return np.asarray(self.values, "<f4").tobytes()
        texts = (text.encode() for text in self.values)
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)


async def run_inference(
    service: Service, program: ServedProgram, request: InferRequest, clips: list[memoryview]
) -> dict[str, Array]:
    """The outputs by name, float32 [clips, classes], in the request's or a job's time.

    Raises:
        Refusal: 400, a timeout that is none; 503; 504, not done in time.
    """
    # microseconds, as Triton has it; 0: no timeout of its own
    timeout = whole_parameter(request.parameters, "timeout", 0, 10**15, 0)
    began = time.perf_counter()
    try:
        seconds = timeout / 1e6 if timeout else service.settings.job_seconds
        with service.metrics.model(program.name, program.version).request():
            scores = await within(run_clips(service.pool, program.key, clips), seconds)
    except asyncio.TimeoutError:
        waited = time.perf_counter() - began
        raise Refusal(504, f"not done within the {waited:.3f} s asked for") from None
    return {"logits": scores[:, 0], "probabilities": scores[:, 1]}


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


def chosen_outputs(
    program: ServedProgram, request: InferRequest, results: dict[str, Array]
) -> list[OutputTensor]:
    """The outputs that a request asks for, or all: values, or the best classes.

    Raises:
        Refusal: 400, the model has no such output, or one is asked for twice.
    """
    everything = flag_parameter(request.parameters, "binary_data_output", False)
    chosen: list[OutputTensor] = []
    for wanted in request.outputs or [RequestedOutput(name) for name in OUTPUTS]:
        if wanted.name not in results:
            there = ", ".join(results)
            raise Refusal(400, f"no output {wanted.name[:50]!r}; there are {there}")
        if wanted.name in {output.name for output in chosen}:
            raise Refusal(400, f"output {wanted.name!r} is asked for twice; accepted is once")
        values = results[wanted.name]
        best = whole_parameter(wanted.parameters, "classification", 0, MAX_CLASSES, 0)
        binary = flag_parameter(wanted.parameters, "binary_data", everything)
        if best:
            rows = [_classes(row, program.labels, best) for row in values]
            shape, flat = [len(rows), len(rows[0])], [text for row in rows for text in row]
            chosen.append(OutputTensor(wanted.name, "BYTES", shape, flat, binary))
        else:
            shape, flat = list(values.shape), values.reshape(-1).tolist()
            chosen.append(OutputTensor(wanted.name, "FP32", shape, flat, binary))
    return chosen


def _classes(row: Any, labels: list[str], best: int) -> list[str]:
    order = np.argsort(-row, kind="stable")[:best]
    return [f"{row[i]:.6f}:{i}:{labels[i]}" for i in order]
