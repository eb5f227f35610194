"""PerformanceMonitor: what a training does, for people and for Prometheus."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgptopt.evaluation.loss import keras_loss, perplexity
from tfgptopt.generation.samplers import check_count
from tfgptopt.model import masks
from tfgptopt.model.changing import strategy_scope
from tfgptopt.model.current import full_precision
from tfgptopt.model.retracing import retrace
from tfgptopt.model.targets import Target, candidates
from tfgptopt.monitoring.training import JsonLines, Prometheus, Sink, TensorBoard
from tfgptopt.quantization.quantizers import quantizers_of
from tfgptopt.training.devices import is_chief
from tfgptopt.training.reducing import watch_gradients

# Times of steps that percentiles are of.
_WINDOW = 1000
_MARK = "_tfgptopt_gradient_norm"


class PerformanceMonitor(keras.callbacks.Callback):
    """Measures `fit`: speed, waiting, memory, gradients, sparsity and rounding noise.

    What is measured goes to `metrics.jsonl` and TensorBoard's files in `log_dir`, and to whoever
    asks `http://host:port/metrics`. Between reports a step costs some microseconds on the host, and
    the norm of its gradients; weights are looked at on the device, at the end of each epoch.

    The norm is computed by the compiled step of the model until it is compiled again. On several
    replicas it is that of the whole batch where `tfgptopt.training.prepare` or a technique has
    taken the step over, else the mean of theirs, each of its part of the batch.

    Args:
        log_dir: Folder for `metrics.jsonl` and TensorBoard. Defaults to `None`: none.
        port: int. TCP port for Prometheus, 0 for one that is free; needs the extra `monitoring`.
            Defaults to `None`: none.
        host: str. Address to listen on. Defaults to `"127.0.0.1"`.
        frequency: int. Steps between two reports. Defaults to `50`.
        run: str. What the run is called. Defaults to `"training"`.
        probe: Batches of `(inputs, labels, sample_weight)` whose perplexity is measured at the end
            of each epoch, so that a drift is seen. Defaults to `None`: none.
        gradient_norm: bool. Whether the step computes it, and counts NaN. Defaults to `True`.

    Attributes:
        history: The reports, dictionaries with `step`.
        port: The port that is listened on, or `None`.

    Raises:
        ValueError: If neither a folder nor a port is given, a number is out of range, or when
            `fit` begins, if the folder cannot be written or the port cannot be had.

    Example:

    ```python
    monitor = PerformanceMonitor("logs", frequency=2)
    model.fit(monitor.watch(data), epochs=2, verbose=0, callbacks=[monitor])
    print(monitor.history[0]["steps_per_second"])
    ```
    """

    def __init__(
        self,
        log_dir: str | Path | None = None,
        port: int | None = None,
        host: str = "127.0.0.1",
        frequency: int = 50,
        run: str = "training",
        probe: tf.data.Dataset | None = None,
        gradient_norm: bool = True,
    ) -> None:
        super().__init__()
        if log_dir is None and port is None:
            raise ValueError("PerformanceMonitor writes nowhere: give `log_dir` or `port`.")
        check_count("frequency", frequency)
        self.history: list[dict[str, Any]] = []
        self.port: int | None = None
        self._log_dir = None if log_dir is None else Path(log_dir)
        self._asked_port, self._host, self._run = port, host, run
        self._frequency, self._probe, self._wants_norm = frequency, probe, gradient_norm
        self._sinks: list[Sink] = []
        # When each batch was there, and its tokens, as far as `watch` saw it.
        self._produced: collections.deque[tuple[float, int]] = collections.deque()
        self._times: collections.deque[float] = collections.deque(maxlen=_WINDOW)

    def watch(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Returns a dataset whose tokens are counted, and the time that a step waits for it.

        Args:
            dataset: Batches with `token_ids` or arrays of tokens, as `fit` takes them.
        """

        def stamp(*batch: Any) -> Any:
            first = batch[0]
            tokens = first.get("token_ids") if isinstance(first, Mapping) else first
            mask = first.get("padding_mask") if isinstance(first, Mapping) else None
            count = tf.size(tokens) if mask is None else tf.reduce_sum(tf.cast(mask, tf.int32))

            def there(count: np.ndarray) -> np.ndarray:
                self._produced.append((time.perf_counter(), int(count)))
                return np.int32(0)  # type: ignore[return-value]

            with tf.control_dependencies([tf.numpy_function(there, [count], tf.int32)]):
                found = tf.nest.map_structure(tf.identity, batch)
            return found if len(batch) > 1 else found[0]

        return dataset.map(stamp).prefetch(2)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self._open()
        if self._wants_norm and not hasattr(self.model.optimizer, _MARK):
            _watch_gradients(self.model)
            retrace(self.model)
        self._produced.clear()
        self._times.clear()
        self._first_step = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
        self._steps = self._since = self._tokens = 0
        self._waited, self._reported = 0.0, time.perf_counter()
        self._epoch, self._in_epoch, self._loss = 0, 0, (0, 0.0)
        self._nonfinite = self._counted_nonfinite()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._epoch, self._in_epoch, self._loss = epoch, 0, (0, 0.0)

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._begin, self._first = time.perf_counter(), batch

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        seconds, steps = time.perf_counter() - self._begin, batch + 1 - self._first
        waited = self._wait(steps)
        compiled = self._steps > 0  # The first call traces.
        self._steps += steps
        self._since += steps
        self._in_epoch = batch + 1
        if compiled:
            self._times.append(seconds / steps)
            self._waited += waited
            for sink in self._sinks:
                sink.step(seconds, steps, waited)
        if self._since >= self._frequency:
            self._report(logs or {}, {})

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        found: dict[str, Any] = {}
        sparsity, noise = _sparsity_by_group(self.model), _noise_by_group(self.model)
        found |= {"sparsity": sparsity} if sparsity else {}
        found |= {"rounding_noise": noise} if noise else {}
        if self._probe is not None:
            found["probe_perplexity"] = perplexity(keras_loss(self.model, self._probe))
        self._report(logs or {}, found)
        self._reported = time.perf_counter()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def _open(self) -> None:
        """Opens what reports go to, on the worker that writes.

        Raises:
            ValueError: If the folder cannot be written, or the port cannot be had.
        """
        self.on_train_end()  # Of a `fit` that was broken off.
        if not is_chief(getattr(self.model, "distribute_strategy", None)):
            return
        if self._asked_port is not None:
            server = Prometheus(self._run, self._asked_port, self._host)
            self.port = server.port
            self._sinks.append(server)
        if self._log_dir is not None:
            try:
                self._sinks += [JsonLines(self._log_dir), TensorBoard(self._log_dir)]
            except OSError as error:
                self.on_train_end()
                raise ValueError(f"Cannot write into '{self._log_dir}': {error}") from None

    def _wait(self, steps: int) -> float:
        """Returns for how long a call waited for its batches; counts their tokens."""
        begin, waited = self._begin, 0.0
        for _ in range(min(steps, len(self._produced))):
            there, tokens = self._produced.popleft()
            self._tokens += tokens
            waited = max(waited, there - begin)
        return waited

    def _report(self, logs: Mapping[str, Any], more: dict[str, Any]) -> None:
        """Gives the numbers since the report before to all sinks."""
        now = time.perf_counter()
        passed = max(now - self._reported, 1e-9)
        numbers: dict[str, Any] = {
            "epoch": self._epoch,
            "memory_bytes": _resident_bytes(),
            "learning_rate": float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)),
        }
        if self._since:
            numbers["steps_per_second"] = self._since / passed
        if self._tokens:
            numbers |= {"tokens": self._tokens, "tokens_per_second": self._tokens / passed}
            numbers["data_wait_share"] = min(1.0, self._waited / passed)
        if self._times:
            for q in (50, 95, 99):
                numbers[f"step_seconds_p{q}"] = float(np.percentile(self._times, q))
        if "loss" in logs and self._in_epoch > self._loss[0]:
            numbers["loss"] = self._loss_since(float(logs["loss"]))
        if hasattr(self.model.optimizer, _MARK):
            total = self._counted_nonfinite()
            numbers["gradient_norm"] = float(
                tf.convert_to_tensor(getattr(self.model.optimizer, _MARK)[0])
            )
            numbers["nonfinite_steps"], self._nonfinite = total - self._nonfinite, total
        numbers |= more
        step = self._first_step + self._steps
        self.history.append({"step": step, **numbers})
        for sink in self._sinks:
            sink.report(step, numbers)
        self._since = self._tokens = 0
        self._waited, self._reported = 0.0, now

    def _loss_since(self, mean: float) -> float:
        """Returns the mean loss since the report before; Keras gives that of the epoch so far."""
        count, total = self._loss
        new = mean * self._in_epoch
        self._loss = (self._in_epoch, new)
        return (new - total) / (self._in_epoch - count)

    def _counted_nonfinite(self) -> int:
        watched = getattr(self.model.optimizer, _MARK, None)
        return 0 if watched is None else int(tf.convert_to_tensor(watched[1]))


def _watch_gradients(model: keras.Model) -> None:
    """Makes the compiled step compute the norm of its gradients, and count those that are none."""
    optimizer = model.optimizer
    with strategy_scope(model):
        shared = {
            "trainable": False,
            "synchronization": tf.VariableSynchronization.ON_READ,
        }
        mean, first = tf.VariableAggregation.MEAN, tf.VariableAggregation.ONLY_FIRST_REPLICA
        norm = tf.Variable(0.0, aggregation=mean, **shared)
        nonfinite = tf.Variable(0, dtype=tf.int64, aggregation=first, **shared)

    def look(grads: list[Any]) -> None:
        found = [tf.cast(grad, tf.float32) for grad in map(_dense, grads) if grad is not None]
        scale = getattr(optimizer, "dynamic_scale", None)
        value = tf.linalg.global_norm(found)
        if scale is not None:
            value /= tf.convert_to_tensor(scale)
        norm.assign(value)
        nonfinite.assign_add(tf.cast(~tf.math.is_finite(value), tf.int64))

    watch_gradients(optimizer, look)
    object.__setattr__(optimizer, _MARK, (norm, nonfinite))


def _dense(grad: Any) -> Any:
    """Returns the numbers of a gradient: of rows of a table those, as in TensorFlow's clipping."""
    return grad.values if isinstance(grad, tf.IndexedSlices) else grad


def _sparsity_by_group(model: keras.Model) -> dict[str, float]:
    """Returns the share of zeros in pruned weights, by role."""
    zeros: dict[str, list[tuple[int, int]]] = {}
    for target in _targets(model):
        if masks.masked(target.variable):
            count = int(tf.math.count_nonzero(target.variable.value))
            zeros.setdefault(target.role, []).append((target.size - count, target.size))
    return {role: sum(z for z, _ in x) / sum(n for _, n in x) for role, x in zeros.items()}


def _noise_by_group(model: keras.Model) -> dict[str, float]:
    """Returns the error of rounding, relative to the weights, by role."""
    sums: dict[str, list[tuple[float, float]]] = {}
    for target in _targets(model):
        for quantizer in quantizers_of(target.layer):
            if quantizer.variable is target.variable:
                exact = full_precision(quantizer.variable)
                error = tf.reduce_sum(tf.square(quantizer.rounded(exact) - exact))
                pair = (float(error), float(tf.reduce_sum(tf.square(exact))))
                sums.setdefault(target.role, []).append(pair)
    return {role: _root(sum(e for e, _ in x), sum(n for _, n in x)) for role, x in sums.items()}


def _root(error: float, total: float) -> float:
    return float(np.sqrt(error / total)) if total > 0 else 0.0


def _targets(model: keras.Model) -> list[Target]:
    return [item for item in candidates(model) if isinstance(item, Target)]


def _resident_bytes() -> int:
    """Returns the memory that the process has, or 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
