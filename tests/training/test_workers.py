"""Two workers of 127.0.0.1 train as one replica does."""

import signal
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


def workers(folder, *options):
    """Runs two workers with options of their own, and returns their exit codes and outputs."""
    port = free_ports()
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, str(index), str(port), folder, *own],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, own in enumerate(options or ((), ()))
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in started]
    finally:
        for worker in started:
            worker.kill()
    return [worker.returncode for worker in started], said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder in which two workers trained, and what they said."""
    folder = tmp_path_factory.mktemp("workers")
    codes, said = workers(folder)
    assert codes == [0, 0], said
    return folder, said


@pytest.mark.slow
def test_two_workers_train_as_one_replica(trained, tmp_path):
    folder, texts = trained
    _, expected = techniques.train("recorded", tf.distribute.get_strategy(), tmp_path)
    first, second = (np.load(folder / f"worker{i}.npz") for i in range(2))
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
    for index, text in enumerate(texts):
        assert (
            f"MultiWorkerMirroredStrategy, 2 replicas on 2 workers, this is worker {index}" in text
        )
        assert "refused: The workers' data end after 5, 4 batches" in text
        assert "refused: A batch of 1 rows cannot be spread over 2 replicas" in text


@pytest.mark.slow
def test_workers_of_which_one_is_killed_go_on_with_the_same_bits(trained):
    folder, _ = trained
    never = ("killed", "0", "9")
    codes, said = workers(folder, never, ("killed", "15", str(int(signal.SIGKILL))))
    assert codes == [1, -signal.SIGKILL], said
    assert "RuntimeError: Another worker of this training is gone" in said[0], said[0]
    codes, said = workers(folder, never, never)
    assert codes == [0, 0], said
    for index in range(2):
        whole, resumed = (np.load(folder / f"{name}{index}.npz") for name in ("whole", "killed"))
        assert (int(whole["steps"]), int(resumed["steps"])) == (30, 18)
        for name in set(whole.files) - {"steps"}:
            np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
