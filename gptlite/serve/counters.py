"""Numbers for `/metrics`, in Prometheus' text form."""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gptlite.serve.engine import Job, News

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Counters:
    """Counted by the engine's thread and by the event loop; the library locks."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.tokens = Counter(
            "gptlite_tokens", "Tokens written.", labelnames=("model",), registry=registry
        )
        self.first_token = Histogram(
            "gptlite_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            labelnames=("model",),
            registry=registry,
        )
        self.answers = Counter(
            "gptlite_answers",
            "Requests answered, by path and status.",
            labelnames=("path", "status"),
            registry=registry,
        )
        self.writing = Gauge("gptlite_writing", "Completions being written.", registry=registry)
        self.waiting = Gauge("gptlite_waiting", "Requests without a place yet.", registry=registry)

    def count_tokens(self, model: str, news: Sequence[tuple[Job, News]]) -> None:
        """What one step has written."""
        self.tokens.labels(model).inc(len(news))
        for job, _ in news:
            if not job.begun:
                job.begun = True
                self.first_token.labels(model).observe(time.perf_counter() - job.queued_at)

    def as_text(self, n_writing: int, n_waiting: int) -> bytes:
        self.writing.set(n_writing)
        self.waiting.set(n_waiting)
        return generate_latest(self.registry)
