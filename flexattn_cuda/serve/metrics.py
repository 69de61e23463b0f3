"""Counters for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one server.

    Attributes:
        requests: Responses by path and status.
        seconds: Time from a request to the end of its response, by path.
        first_token_seconds: Time from a request to its first token.
        batch: Requests that were answered together.
        tokens: Tokens of answers.
        images: Images asked about, "encoded" or "kept" from an earlier request.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"flexattn_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"flexattn_{name}", text, labels, registry=self._registry, buckets=buckets)

        self.requests = counter("requests", "Responses", "path", "status")
        self.seconds = histogram("request_seconds", "Time of a request", _SECONDS, "path")
        self.first_token_seconds = histogram("first_token_seconds", "Time to the first token", _SECONDS)
        self.batch = histogram("batch_size", "Requests answered together", _SIZES)
        self.tokens = counter("tokens", "Tokens of answers")
        self.images = counter("images", "Images asked about", "source")

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a value that is read whenever the metrics are."""
        Gauge(f"flexattn_{name}", text, registry=self._registry).set_function(read)

    def page(self) -> bytes:
        """Return all values in Prometheus' text format."""
        return generate_latest(self._registry)
