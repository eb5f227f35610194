"""What a TPU asks of a step, as far as a machine without one can show it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import make_gpt, random_batch

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import ConstantSparsity, Movement, Prune
from tfgptopt.pruning.pruner import Pruner
from tfgptopt.quantization import Int8
from tfgptopt.training import prepare
from tfgptopt.training.stepping import _TrainStep


@pytest.mark.slow
def test_the_step_with_every_technique_is_one_static_program():
    student = make_gpt()
    distiller = tfgptopt.Distiller(student, "self")
    distiller.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0), weighted_metrics=[])
    prepare(distiller, accumulate=2)
    distiller.optimizer.build(distiller.trainable_variables)
    tfgptopt.quantize_aware(student, Int8())
    Pruner(distiller, Prune(ConstantSparsity(0.5, 0), score=Movement())).attach()
    inputs, labels = random_batch(rows=8)
    batch = tf.nest.map_structure(tf.constant, (inputs, labels))
    step = _TrainStep(distiller, 2)

    @tf.function(jit_compile=True, autograph=False)
    def run(data):
        step(data)
        return distiller.get_metrics_result()["loss"]

    graph = run.get_concrete_function(batch).graph
    graphs = [graph, *(f.graph for f in graph._functions.values() if hasattr(f, "graph"))]
    operations = [op for one in graphs for op in one.get_operations()]
    assert len(operations) > 100
    assert not [op.name for op in operations if "PyFunc" in op.type]
    placeholders = [op for op in graph.get_operations() if op.type == "Placeholder"]
    assert all(op.outputs[0].shape.is_fully_defined() for op in placeholders)
    first = run(batch).numpy()
    before = [target.variable.numpy() for target in select(student)]
    for _ in range(3):
        distiller.reset_metrics()
        last = run(batch).numpy()
    assert run.experimental_get_tracing_count() == 1
    assert np.isfinite(last) and last != first
    for old, target in zip(before, select(student), strict=True):
        assert (old != target.variable.numpy()).any()
    assert int(distiller.optimizer.iterations) == 4
