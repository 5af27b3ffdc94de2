"""Counters of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "vgg_transfer_requests",
            "Answered requests by handler and HTTP status",
            ["handler", "code"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "vgg_transfer_request_seconds",
            "Time to answer a request",
            ["handler"],
            registry=self.registry,
        )
        self.images = Counter(
            "vgg_transfer_images",
            "Images by outcome: predicted, or unreadable",
            ["outcome"],
            registry=self.registry,
        )
        self.batches = Histogram(
            "vgg_transfer_batch_images", "Images per batch", buckets=_SIZES, registry=self.registry
        )
        self.waiting = Gauge(
            "vgg_transfer_waiting_images", "Images that wait", registry=self.registry
        )

    def answered(self, handler: str, code: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(handler, str(code)).inc()
        self._seconds.labels(handler).observe(seconds)
