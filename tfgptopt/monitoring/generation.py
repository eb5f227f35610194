"""What Prometheus can ask a server of texts, in a registry of its own."""

from __future__ import annotations

import prometheus_client as prometheus

# Seconds, from a small model on a good machine to a queue that is too long.
_TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_FIRST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class GenerationMetrics:
    """Counts requests and tokens, and times them.

    Attributes:
        registry: What they are in.
        requests: Requests by route and status.
        prompt_tokens, new_tokens: Tokens that were read and made.
        first_token: Seconds from a request to its first token.
        inter_token: Seconds between two tokens of a text.
        waiting: Texts that wait for a slot.
        running: Texts that have one.
    """

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(f"tfgptopt_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> prometheus.Gauge:
            return prometheus.Gauge(f"tfgptopt_{name}", text, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> prometheus.Histogram:
            return prometheus.Histogram(
                f"tfgptopt_{name}", text, registry=self.registry, buckets=buckets
            )

        self.requests = counter("requests", "Requests by route and status.", "route", "status")
        tokens = counter("tokens", "Tokens read and made.", "kind")
        # Looked up once: it is done for each token.
        self.prompt_tokens, self.new_tokens = tokens.labels("prompt"), tokens.labels("completion")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From a request to its first token.", _FIRST_BUCKETS
        )
        self.inter_token = histogram(
            "inter_token_seconds", "Between two tokens of a text.", _TOKEN_BUCKETS
        )
        self.waiting = gauge("waiting_texts", "Texts that wait for a slot.")
        self.running = gauge("running_texts", "Texts that are being continued.")

    def exposition(self) -> bytes:
        """Returns what Prometheus reads."""
        found: bytes = prometheus.generate_latest(self.registry)
        return found
