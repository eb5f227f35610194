"""What PerformanceMonitor costs a training step, and a server's metrics a token.

Two models of the same shape train by turns, one of them watched. Times are CPU time, in which other
work on the machine does not count.

    python benchmarks/monitoring_cost.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import timeit

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from tfgptopt.callbacks import PerformanceMonitor
from training_overhead import make_model

from tfgptopt.monitoring.generation import GenerationMetrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    tokens = np.random.default_rng(0).integers(0, 4096, (16, 129)).astype(np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((16, 128), np.int32)}
    data = tf.data.Dataset.from_tensors((inputs, tokens[:, 1:])).repeat(arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        monitor = PerformanceMonitor(folder, port=0)
        ways = {"plain": ([], data), "monitored": ([monitor], monitor.watch(data))}
        models = {name: make_model(4, 256, 4096, False) for name in ways}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(arguments.rounds + 1):
            for name, (callbacks, batches) in ways.items():
                began = time.process_time()
                models[name].fit(batches, verbose=0, callbacks=callbacks)
                if round_:  # The first one traces.
                    times[name].append(time.process_time() - began)
    middle = {name: statistics.median(found) / arguments.steps for name, found in times.items()}
    cost = middle["monitored"] / middle["plain"]
    print(f"{1e3 * middle['plain']:.1f} ms of CPU a step, monitored {cost:.3f} times as much")
    metrics = GenerationMetrics()

    def token() -> None:
        metrics.inter_token.observe(0.01)
        metrics.new_tokens.inc(1)

    count = 20_000
    print(f"{1e6 * timeit.timeit(token, number=count) / count:.1f} microseconds a token")


if __name__ == "__main__":
    main()
