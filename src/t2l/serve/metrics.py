"""What the server counts, for Prometheus. Knows the engine's and the store's numbers."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from t2l.serve.answers import Answer, End

if TYPE_CHECKING:
    from t2l.serve.engine import Engine
    from t2l.serve.store import AdapterStore

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "t2l_http_requests", "Requests by route and status.", ["method", "route", "status"], registry=self.registry
        )
        self._answers = Counter("t2l_answers", "Answers by how they ended.", ["end"], registry=self.registry)
        self._first = Histogram(
            "t2l_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=self.registry
        )
        self._whole = Histogram(
            "t2l_answer_seconds", "From a request to its end.", buckets=_SECONDS, registry=self.registry
        )

    def watch(self, engine: "Engine", store: "AdapterStore") -> None:
        """Reads these two whenever somebody asks for the numbers."""
        self.registry.register(_Now(engine, store))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts a request; `route` is the pattern, so that there are few of them."""
        known = method if method in ("GET", "POST", "DELETE") else "other"
        self._requests.labels(known, route, str(status)).inc()

    def answer(self, answer: Answer, end: End) -> None:
        """Counts an answer that has ended."""
        self._answers.labels(end).inc()
        self._whole.observe(time.monotonic() - answer.submitted)
        if answer.tokens:
            self._first.observe(answer.first_token - answer.submitted)

    def text(self) -> bytes:
        """All numbers in Prometheus' format."""
        return generate_latest(self.registry)


class _Now:
    """Numbers that are read when they are asked for."""

    def __init__(self, engine: "Engine", store: "AdapterStore") -> None:
        self._engine, self._store = engine, store

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine's and the store's numbers."""
        for name, value in self._engine.state.items():
            yield GaugeMetricFamily(f"t2l_engine_{name}", f"The engine's {name.replace('_', ' ')}.", value=value)
        for name, value in dict(self._engine.counts).items():
            what = f"The engine's {name.replace('_', ' ')} since the start."
            yield CounterMetricFamily(f"t2l_engine_{name}", what, value=value)
        yield GaugeMetricFamily("t2l_adapters", "Adapters that are stored.", value=len(self._store))
        what = "Memory of adapters that are ready to use."
        yield GaugeMetricFamily("t2l_adapter_cache_bytes", what, value=self._store.cached_bytes)
