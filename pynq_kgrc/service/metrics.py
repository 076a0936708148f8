"""The metrics of the service, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from pynq_kgrc.service.pool import ClipRun

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter(
            "kgrc_requests", "Requests answered", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "kgrc_request_seconds",
            "Seconds from a request's header to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.received_bytes = Counter(
            "kgrc_received_bytes", "Bytes of request bodies received", registry=registry
        )
        self.clip_seconds = Histogram(
            "kgrc_clip_seconds",
            "Seconds of a clip on the device",
            buckets=SECONDS,
            registry=registry,
        )
        self.wait_seconds = Histogram(
            "kgrc_wait_seconds",
            "Seconds a clip waited for an idle worker",
            buckets=SECONDS,
            registry=registry,
        )
        self.live_frames = Counter(
            "kgrc_live_frames", "Frames of live sessions", ["fate"], registry=registry
        )
        self.models: dict[tuple[str, str], ModelCounts] = {}
        """Name and version of a program -> what it did; those of unloaded ones stay."""
        self.now: Callable[[], dict[str, tuple[str, float]]] = dict
        """Name of a gauge or counter that the parts of the service have -> its text and value."""
        registry.register(_Current(self))

    def model(self, name: str, version: str) -> ModelCounts:
        """The counts of a program."""
        return self.models.setdefault((name, version), ModelCounts())

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


@dataclass
class ModelCounts:
    """What one program did; Triton's statistics of a model."""

    succeeded: int = 0
    """Requests (videos and inferences) that were answered."""
    failed: int = 0
    clips: int = 0
    last: float = 0.0
    """When the last request ended, in seconds since 1970."""
    seconds: float = 0.0
    """Of the requests that were answered, from the program's lease to its scores."""
    failed_seconds: float = 0.0
    queue_seconds: float = 0.0
    """In which clips waited for an idle worker."""
    device_seconds: float = 0.0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request, and how long it took, when the context ends."""
        began = time.perf_counter()
        try:
            yield
        except BaseException:
            self.failed += 1
            self.failed_seconds += time.perf_counter() - began
            raise
        else:
            self.succeeded += 1
            self.seconds += time.perf_counter() - began
        finally:
            self.last = time.time()

    def count(self, run: ClipRun) -> None:
        """Count a clip."""
        self.clips += 1
        self.queue_seconds += run.waited
        self.device_seconds += run.seconds

    def statistics(self) -> dict[str, Any]:
        """Triton's document of a model's statistics; times in nanoseconds."""

        def times(count: int, seconds: float) -> dict[str, int]:
            return {"count": count, "ns": round(1e9 * seconds)}

        return {
            "last_inference": round(1e3 * self.last),
            "inference_count": self.clips,
            "execution_count": self.clips,  # a clip is run alone
            "inference_stats": {
                "success": times(self.succeeded, self.seconds),
                "fail": times(self.failed, self.failed_seconds),
                "queue": times(self.clips, self.queue_seconds),
                "compute_input": times(0, 0),
                "compute_infer": times(self.clips, self.device_seconds),
                "compute_output": times(0, 0),
            },
            "batch_stats": [],
        }


TRITON: dict[str, tuple[str, Callable[[ModelCounts], float]]] = {
    "nv_inference_request_success": ("Requests answered", lambda m: m.succeeded),
    "nv_inference_request_failure": ("Requests that failed", lambda m: m.failed),
    "nv_inference_count": ("Clips", lambda m: m.clips),
    "nv_inference_exec_count": ("Runs on the device", lambda m: m.clips),
    "nv_inference_request_duration_us": ("Of requests answered", lambda m: 1e6 * m.seconds),
    "nv_inference_queue_duration_us": ("Waited for a worker", lambda m: 1e6 * m.queue_seconds),
    "nv_inference_compute_infer_duration_us": ("On a worker", lambda m: 1e6 * m.device_seconds),
}
"""Triton's metrics of a model: its name of each, what it is, and its value."""


class _Current(Collector):
    """Metrics that are read when they are asked for."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Those of each program under Triton's names, then those of the service's parts."""
        for name, (text, read) in TRITON.items():
            # they are counters, but have no _total in their names
            metric = Metric(name, text, "unknown")
            for (model, version), counts in self.metrics.models.items():
                metric.add_sample(name, {"model": model, "version": version}, read(counts))
            yield metric
        for name, (text, value) in self.metrics.now().items():
            counter = name.endswith("_total")
            kind = CounterMetricFamily if counter else GaugeMetricFamily
            yield kind(name.removesuffix("_total"), text, value=value)
