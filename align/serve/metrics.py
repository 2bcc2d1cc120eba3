"""What Prometheus is told, beside vLLM's own metrics: they share its registry, and so its ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from align.decoding.request import Answer

_OUTCOMES = {
    400: "bad",
    401: "unauthorised",
    404: "bad",
    408: "timeout",
    413: "too_large",
    422: "no_answer",
    429: "busy",
    503: "unavailable",
    504: "timeout",
}


def outcome_of(status: int) -> str:
    """What became of a request by the status of its reply; beside these there is ``hung_up``."""
    return _OUTCOMES.get(status, "ok" if status < 400 else "bad" if status < 500 else "error")


class Metrics:
    """Counts of what this server did with our settings.

    Args:
        running, waiting: how many particles are drawn now, and wait.
        registry: where they are entered.
    """

    def __init__(
        self,
        running: Callable[[], float] = lambda: 0.0,
        waiting: Callable[[], float] = lambda: 0.0,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"align_{name}", what, labels, registry=registry)

        self._requests = counter("requests", "Requests by method and what became of them.", "method", "outcome")
        self._tokens = counter("tokens", "Tokens drawn by all particles.")
        self._evaluations = counter("evaluations", "Verdicts on single tokens that constraints gave.")
        self._masks = counter("masks", "Verdicts on all tokens at once that constraints gave.")
        self._dead = counter("dead_particles", "Particles whose log-weight was -inf in the end or on the way.")
        self._per_token = Histogram(
            "align_evaluations_per_token",
            "Mean verdicts on single tokens for each token of a request.",
            buckets=(0, 1, 2, 4, 8, 16, 32, 64, 256, 1024),
            registry=registry,
        )
        self._seconds = Histogram(
            "align_request_seconds",
            "From a request's arrival to its answer, by method.",
            ("method",),
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            registry=registry,
        )
        for name, what, value in (
            ("running", "Particles that are drawn now.", running),
            ("waiting", "Particles that wait for a place.", waiting),
        ):
            Gauge(f"align_particles_{name}", what, registry=registry).set_function(value)

    def done(self, method: str, outcome: str, seconds: float) -> None:
        """A request is over."""
        self._requests.labels(method, outcome).inc()
        if outcome == "ok":
            self._seconds.labels(method).observe(seconds)

    def refused(self, status: int) -> None:
        """A request did not get past the gate."""
        self._requests.labels("none", outcome_of(status)).inc()

    def answered(self, answer: Answer) -> None:
        """What an answer took."""
        self._masks.inc(answer.masks)
        self._evaluations.inc(sum(answer.evaluations))
        self._tokens.inc(len(answer.evaluations))
        if answer.evaluations:
            self._per_token.observe(sum(answer.evaluations) / len(answer.evaluations))
        if answer.result is not None:
            self._dead.inc(answer.result.dead_ends)
