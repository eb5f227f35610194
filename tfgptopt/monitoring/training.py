"""Where the numbers of a training go: Prometheus, TensorBoard, and lines of JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

# Seconds of a step, from a tiny model to a large one on a CPU.
_STEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Sink(Protocol):
    """Takes numbers."""

    def step(self, seconds: float, steps: int, waited: float) -> None:
        """Takes the time of a call of the train function, which makes some steps."""

    def report(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Takes numbers by name; those by group are dictionaries."""

    def close(self) -> None:
        """Ends it."""


class JsonLines:
    """Appends a line of JSON for each report to `metrics.jsonl`.

    Args:
        folder: Where the file is.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def step(self, seconds: float, steps: int, waited: float) -> None:
        """Passes a step over: reports tell of steps."""

    def report(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Appends a line; what is not finite is null."""
        line = {"time": round(time.time(), 3), "step": step, **_finite(numbers)}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Writes scalars for TensorBoard.

    Args:
        folder: The log directory.
    """

    def __init__(self, folder: Path) -> None:
        import tensorflow as tf  # Prometheus and JSON do without.

        self._tf = tf
        self._writer = tf.summary.create_file_writer(str(folder))
        # As `tf.summary.scalar` has it, which needs TensorBoard itself.
        self._metadata = tf.compat.v1.SummaryMetadata(data_class="DATA_CLASS_SCALAR")
        self._metadata.plugin_data.plugin_name = "scalars"

    def step(self, seconds: float, steps: int, waited: float) -> None:
        """Passes a step over: reports tell of steps."""

    def report(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Writes scalars, those by group as `name/group`."""
        with self._writer.as_default():
            for name, value in numbers.items():
                values = value if isinstance(value, Mapping) else {"": value}
                for group, one in values.items():
                    tag = f"{name}/{group}" if group else name
                    number = self._tf.constant(one, self._tf.float32)
                    self._tf.summary.write(tag, number, step, self._metadata)
        self._writer.flush()

    def close(self) -> None:
        """Closes the writer."""
        self._writer.close()


class Prometheus:
    """Answers Prometheus over HTTP, from a registry of its own.

    Args:
        run: Label of all metrics.
        port: TCP port; 0 for one that is free.
        host: Address. Defaults to `"127.0.0.1"`.

    Attributes:
        port: The port.
        registry: What is exported.

    Raises:
        ImportError: If prometheus-client is not installed.
        ValueError: If the port cannot be had.
    """

    def __init__(self, run: str, port: int, host: str = "127.0.0.1") -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise ImportError(
                "`port` needs prometheus-client: pip install 'tfgptopt[monitoring]'."
            ) from None
        self.registry = prometheus.CollectorRegistry()
        self._run = run

        def gauge(name: str, text: str, *labels: str) -> Any:
            return prometheus.Gauge(
                f"tfgptopt_{name}", text, ("run", *labels), registry=self.registry
            )

        def counter(name: str, text: str) -> Any:
            found = prometheus.Counter(f"tfgptopt_{name}", text, ("run",), registry=self.registry)
            return found.labels(run)

        self._steps = counter("train_steps", "Steps of the training.")
        self._tokens = counter("train_tokens", "Tokens that were trained on.")
        self._waited = counter("train_data_wait_seconds", "Time waiting for data.")
        self._nonfinite = counter("train_nonfinite_steps", "Steps with NaN or infinite gradients.")
        self._seconds = prometheus.Histogram(
            "tfgptopt_train_step_seconds",
            "Of a step.",
            ("run",),
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        ).labels(run)
        self._gauges = {
            "running": gauge("train_running", "1 while it trains."),
            "loss": gauge("train_loss", "Mean since the report before."),
            "tokens_per_second": gauge("train_tokens_per_second", "Since the report before."),
            "learning_rate": gauge("train_learning_rate", "Of the optimizer."),
            "gradient_norm": gauge("train_gradient_norm", "Of the last step."),
            "memory_bytes": gauge("train_memory_bytes", "Resident memory of the process."),
            "sparsity": gauge("sparsity_ratio", "Share of zeros in pruned weights.", "group"),
            "rounding_noise": gauge(
                "rounding_noise_ratio", "Root mean square error of rounding, relative.", "group"
            ),
            "probe_perplexity": gauge("probe_perplexity", "Of held-out data."),
        }
        self._gauges["running"].labels(run).set(1)
        try:
            self._server, thread = prometheus.start_http_server(port, host, self.registry)
        except OSError as error:
            raise ValueError(
                f"Cannot answer Prometheus on {host}:{port}: {error}. Give another `port`, or 0 "
                "for one that is free."
            ) from None
        self._thread = thread
        self.port: int = self._server.server_port

    def step(self, seconds: float, steps: int, waited: float) -> None:
        """Counts steps and their time."""
        self._steps.inc(steps)
        self._waited.inc(waited)
        for _ in range(steps):
            self._seconds.observe(seconds / steps)

    def report(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Sets gauges, and counts what was counted since."""
        self._tokens.inc(numbers.get("tokens", 0))
        self._nonfinite.inc(numbers.get("nonfinite_steps", 0))
        for name, value in numbers.items():
            if name not in self._gauges:
                continue
            if isinstance(value, Mapping):
                for group, one in value.items():
                    self._gauges[name].labels(self._run, group).set(one)
            else:
                self._gauges[name].labels(self._run).set(value)

    def close(self) -> None:
        """Stops answering."""
        self._gauges["running"].labels(self._run).set(0)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _finite(value: Any) -> Any:
    """Returns numbers with `None` for those that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
