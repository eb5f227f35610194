"""Two workers of 127.0.0.1 train as one replica does."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import techniques
import tensorflow as tf

WORKER = Path(__file__).with_name("worker.py")


def free_ports():
    """Returns the first of two ports that follow each other and are free."""
    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError("No two free ports were found.")


@pytest.mark.slow
def test_two_workers_train_as_one_replica(tmp_path):
    port = free_ports()
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(index), str(port), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        _, expected = techniques.train("recorded", tf.distribute.get_strategy(), tmp_path)
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    first, second = (np.load(tmp_path / f"worker{i}.npz") for i in range(2))
    # Rounding makes of a last bit an integer more or less: one replica that adds up in another
    # order differs as much.
    np.testing.assert_allclose(first["losses"], expected, atol=5e-3)
    assert any(first[name].dtype == bool for name in first.files)
    for name in set(first.files) - {"seen", "chief"}:
        np.testing.assert_array_equal(first[name], second[name])
    assert first["chief"] and not second["chief"]
    # Shards are apart, and together are all rows.
    everything = np.concatenate([batch[0]["token_ids"] for batch in techniques.batches()])
    shared = np.concatenate([first["seen"], second["seen"]])
    assert len(shared) == len(everything)
    assert set(map(bytes, shared)) == set(map(bytes, everything))
    for index, text in enumerate(said):
        assert (
            f"MultiWorkerMirroredStrategy, 2 replicas on 2 workers, this is worker {index}" in text
        )
        assert "refused: The workers' data end after 5, 4 batches" in text
        assert "refused: A batch of 1 rows cannot be spread over 2 replicas" in text
