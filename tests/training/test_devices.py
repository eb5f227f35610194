import json

import numpy as np
import pytest
import techniques
import tensorflow as tf
from conftest import two_replicas

from tfgptopt.training import describe, is_chief, strategy
from tfgptopt.training.devices import workers_of


@pytest.mark.slow
def test_two_replicas_train_as_one(tmp_path):
    _, expected = techniques.train("self", tf.distribute.get_strategy(), tmp_path)
    student, losses = techniques.train("self", two_replicas(), tmp_path)
    assert len(losses) == 50
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    found = techniques.state(student)
    assert all(len(copies) == 2 for copies in found)
    for first, second in found:
        np.testing.assert_array_equal(first, second)
    shares = [(first == 0).mean() for first, _ in found if first.dtype == bool]
    assert shares == pytest.approx([0.5] * 6, abs=2e-3)


def test_choice(monkeypatch):
    assert describe(strategy("auto")) == "default strategy, 1 replica: one device"
    assert describe(strategy("mirrored")) == "MirroredStrategy, 2 replicas: 2 CPUs"
    assert is_chief(strategy("auto"))
    with pytest.raises(ValueError, match="must be one of auto, default, mirrored, workers, tpu"):
        strategy("gpu")
    with pytest.raises(ValueError, match="no TF_CONFIG that names workers"):
        strategy("workers")
    monkeypatch.setenv("TF_CONFIG", '{"cluster": ')
    with pytest.raises(ValueError, match="TF_CONFIG cannot be read"):
        strategy("auto")


def test_cluster_of_tf_config():
    two = {"worker": ["a:1", "b:1"]}

    def read(cluster, **task):
        return workers_of(json.dumps({"cluster": cluster, "task": task}))

    assert read(two, type="worker", index=1) == ["a:1", "b:1"]
    assert read({"chief": ["c:1"], **two}, type="chief", index=0) == ["c:1", "a:1", "b:1"]
    assert read({}) == []
    for cluster, task, message in (
        (two, {"type": "worker", "index": 2}, "none of the cluster"),
        ({"worker": ["a:1", "a:1"]}, {"type": "worker", "index": 0}, "one address for each"),
        ({"worker": ["a"]}, {"type": "worker", "index": 0}, "one address for each"),
        ({"ps": ["p:1"], **two}, {"type": "worker", "index": 0}, "Only clusters of workers"),
    ):
        with pytest.raises(ValueError, match=message):
            read(cluster, **task)
