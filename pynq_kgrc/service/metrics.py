"""The metrics of the service, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

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
        self.refused = self._gauge("kgrc_refused", "Requests refused because the queue is full")
        self.at_work = self._gauge("kgrc_at_work", "Videos and inferences waiting or running")
        self.queue_limit = self._gauge("kgrc_queue_limit", "Limit of kgrc_at_work")
        self.restarts = self._gauge("kgrc_worker_restarts", "Attempts to replace a worker")
        self.idle = self._gauge("kgrc_workers_idle", "Idle workers")
        self.ready = self._gauge("kgrc_ready", "1 if requests can be served, else 0")

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
