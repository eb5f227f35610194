"""Importance against its definitions."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from decoder.families import make
from shrinking.growing import array
from shrinking.test_surgery import batch

from tfgptopt.distillation.views import look
from tfgptopt.shrinking import importance


def test_the_influence_of_layers_and_the_use_of_tokens():
    model, inputs = make("GPT2", num_layers=3), batch()
    backbone, real = model.backbone, inputs["padding_mask"] == 1
    layers = list(backbone.transformer_layers)
    seen = look(backbone, inputs, layers).hidden
    x = backbone.token_embedding(inputs["token_ids"])
    states = [x + backbone.position_embedding(x), *(seen[id(layer)] for layer in layers)]
    states = [np.asarray(state, np.float64)[real] for state in states]
    wanted = []
    for a, b in itertools.pairwise(states):
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        wanted.append(1 - ((a * b).sum(-1) / norms).mean())
    found = importance(model, tf.data.Dataset.from_tensors(inputs))
    np.testing.assert_allclose(found.depth, wanted, rtol=1e-4)
    counts = np.bincount(inputs["token_ids"][real], minlength=211)
    np.testing.assert_array_equal(found.vocabulary, counts)


def test_neurons_count_by_what_they_add():
    model, inputs = make("GPT2", num_layers=1), batch()
    down = model.backbone.transformer_layers[0]._feedforward_output_dense
    call, seen = down.call, []
    object.__setattr__(down, "call", lambda x, **_: (seen.append(np.asarray(x)), call(x))[1])
    model(inputs)
    object.__delattr__(down, "call")
    rows = seen[0][inputs["padding_mask"] == 1].astype(np.float64)
    wanted = np.sqrt((rows**2).mean(0)) * np.linalg.norm(array(down.kernel), axis=1)
    np.testing.assert_allclose(importance(model, inputs).feedforward[0], wanted, rtol=1e-5)


def test_the_loss_without_a_layer():
    model, inputs = make("Llama3", num_layers=3), batch()

    def loss():
        logits = np.asarray(model(inputs), np.float64)[:, :-1]
        logits -= logits.max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(logs, inputs["token_ids"][:, 1:, None], -1)[..., 0]
        real = inputs["padding_mask"][:, 1:]
        return -(picked * real).sum() / real.sum()

    found = importance(model, inputs, "loss")
    assert found.loss == pytest.approx(loss(), rel=1e-5)
    block = model.backbone.transformer_layers[1]
    for layer in (block._self_attention_layer._output_dense, block._feedforward_output_dense):
        layer._kernel.assign(np.zeros(layer._kernel.shape))
    assert found.depth[1] == pytest.approx(loss() - found.loss, abs=1e-5)


def test_what_a_person_sees():
    found = importance(make("Gemma"), batch())
    text = str(found)
    assert "weakest head" in text and f"{found.depth[1]:.4f}" in text
    assert len(found.plot().axes) == 5
