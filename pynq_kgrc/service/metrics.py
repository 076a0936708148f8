"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one service; each service has its own registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter(
            "kgrc_requests", "Requests answered", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "kgrc_request_seconds",
            "Time from a request's head to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.received_bytes = Counter(
            "kgrc_received_bytes", "Bytes of bodies received", registry=registry
        )
        self.clip_seconds = Histogram(
            "kgrc_clip_seconds", "Time of a clip on the device", buckets=SECONDS, registry=registry
        )
        self.wait_seconds = Histogram(
            "kgrc_wait_seconds", "Time a clip waited for it", buckets=SECONDS, registry=registry
        )
        self.live_frames = Counter(
            "kgrc_live_frames", "Frames of live sessions", ["fate"], registry=registry
        )
        self.refused = self._gauge("kgrc_refused", "Requests refused because there is no room")
        self.at_work = self._gauge("kgrc_at_work", "Videos and inferences waiting or running")
        self.queue_limit = self._gauge("kgrc_queue_limit", "How many there may be")
        self.restarts = self._gauge("kgrc_worker_restarts", "Workers that had to be replaced")
        self.idle = self._gauge("kgrc_workers_idle", "Workers that have nothing to do")
        self.ready = self._gauge("kgrc_ready", "1 if requests are served")

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
