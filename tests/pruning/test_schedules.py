import os
import subprocess
import sys

import pytest
import tensorflow as tf

from tfgptopt.pruning import ConstantSparsity, PolynomialDecay, PruningSchedule
from tfgptopt.pruning.schedules import Timeline, deserialize_schedule, serialize_schedule


def test_timeline_is_the_schedule():
    schedule = PolynomialDecay(0.1, 0.8, 100, 900, frequency=50)
    timeline = Timeline(schedule)
    for step in (0, 99, 100, 101, 150, 511, 512, 550, 900, 950, 5000):
        fires, sparsity = schedule(tf.constant(step))
        assert timeline.at(step) == (bool(fires), pytest.approx(float(sparsity), abs=1e-6))


def test_the_end_fires_even_where_the_frequency_misses_it():
    timeline = Timeline(PolynomialDecay(0.0, 0.5, 0, 100, frequency=30))
    assert timeline.last_firing(91, 200) == pytest.approx(0.5)


def test_begin_equal_to_end_gives_the_final_sparsity_where_tfmot_gives_nan():
    schedule = PolynomialDecay(0.0, 0.5, 10, 10)
    assert str(float(schedule(tf.constant(10))[1])) == "nan"
    assert Timeline(schedule).at(10) == (True, 0.5)


def test_a_users_own_schedule():
    class Stairs(PruningSchedule):
        def __call__(self, step):
            return tf.equal(step % 5, 0), 0.1 * tf.cast(step // 5, tf.float32)

        def get_config(self):
            return {}

    timeline = Timeline(Stairs())
    assert timeline.last_firing(0, 12) == pytest.approx(0.2)
    assert timeline.last_firing(11, 14) is None
    with pytest.raises(ValueError, match=r"sparsity 1.0.* at step 50"):
        timeline.at(50)


@pytest.mark.parametrize(
    "schedule", [PolynomialDecay(0.0, 0.5, 1, 9, frequency=2), ConstantSparsity(0.3, 5)]
)
def test_schedules_survive_serialization(schedule):
    config = serialize_schedule(schedule)
    again = deserialize_schedule(config)
    assert type(again) is type(schedule)
    assert serialize_schedule(again) == config


def test_bad_schedules():
    with pytest.raises(ValueError, match="must be a tfmot PruningSchedule"):
        Timeline(0.5)
    with pytest.raises(ValueError, match="begin_step should be <= end_step"):
        PolynomialDecay(0.0, 0.5, 10, 5)
    with pytest.raises(ValueError, match=r"range \[0,1\)"):
        ConstantSparsity(1.0, 0)
    with pytest.raises(ValueError, match="named polynomial_decay or constant_sparsity"):
        deserialize_schedule({"name": "linear"})
    with pytest.raises(ValueError, match="Wrong settings for constant_sparsity"):
        deserialize_schedule({"name": "constant_sparsity", "sparsity": 0.5})


def test_import_leaves_the_environment_alone():
    code = (
        "import os, tfgptopt.pruning; assert 'TF_USE_LEGACY_KERAS' not in os.environ;"
        "import keras; assert keras.__version__ >= '3'"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_pruner_is_due_exactly_at_the_firings(gpt):
    from tfgptopt.pruning import Prune, Pruner

    pruner = Pruner(gpt, Prune(PolynomialDecay(0.0, 0.5, 3, 11, frequency=4)))
    due = []
    for step in range(20):
        if pruner.due(step):
            due.append(step)
            pruner.advance(step)
    assert due == [3, 7, 11]
    # Batches may run ahead of the optimizer: it stays due until the optimizer is there.
    late = Pruner(gpt, Prune(PolynomialDecay(0.0, 0.5, 3, 11, frequency=4)))
    assert not late.due(2) and late.due(4)
    late.advance(2)
    assert late.due(4)
    late.advance(4)
    assert not late.due(6) and late.due(8)
