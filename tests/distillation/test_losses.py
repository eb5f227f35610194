"""Every loss against its definition in numpy, on batches with padding and weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from decoder.families import make

from tfgptopt.distillation import AttentionMaps, Distiller, HardLabels, HiddenStates, LogitsKL
from tfgptopt.distillation.distiller import token_weights
from tfgptopt.distillation.divergences import divergence, divergence_of_top_k, log_softmax
from tfgptopt.distillation.views import look

LENGTHS = (12, 5, 1, 9)


def ragged(rows=LENGTHS, length=12, vocabulary=211, seed=0):
    """Returns inputs, labels and weights of rows that end in padding."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, vocabulary, (len(rows), length + 1), np.int32)
    mask = (np.arange(length) < np.asarray(rows)[:, None]).astype(np.int32)
    weights = generator.uniform(0.2, 2.0, mask.shape).astype(np.float32)
    return {"token_ids": tokens[:, :-1], "padding_mask": mask}, tokens[:, 1:], weights


def log_probabilities(logits, temperature=1.0):
    logits = np.asarray(logits, np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def expected(p, q, temperature, direction):
    """Returns the divergence of teacher logits `p` and student logits `q` at each token."""
    p, q = log_probabilities(p, temperature), log_probabilities(q, temperature)
    if direction == "jensen_shannon":
        m = np.log((np.exp(p) + np.exp(q)) / 2)
        value = (kl(p, m) + kl(q, m)) / 2
    else:
        value = kl(p, q) if direction == "forward" else kl(q, p)
    return temperature**2 * value


def soft(model):
    """Scales a random model down, so that its distributions are those of a trained one."""
    model.set_weights([0.3 * weight for weight in model.get_weights()])
    return model


@pytest.fixture(scope="module")
def models():
    return soft(make("GPT2")), soft(make("GPT2", num_layers=4))


DIRECTIONS = ("forward", "reverse", "jensen_shannon")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_and_their_gradients(direction, temperature):
    generator = np.random.default_rng(0)
    p, q = (generator.normal(0, 2, (3, 5, 37)).astype(np.float32) for _ in range(2))
    weights = generator.uniform(0, 1, (3, 5)).astype(np.float32)
    logits = tf.Variable(q)
    with tf.GradientTape() as tape:
        found = divergence(log_softmax(p, temperature), logits, temperature, direction)
        total = tf.reduce_sum(found * weights)
    wanted = expected(p, q, temperature, direction)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    gradient, step = tape.gradient(total, logits).numpy(), 1e-4
    for place in [(0, 0, 0), (1, 3, 7), (2, 4, 36)]:
        ends = []
        for sign in (step, -step):
            moved = q.astype(np.float64)
            moved[place] += sign
            ends.append((expected(p, moved, temperature, direction) * weights).sum())
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_k_likeliest_tokens_and_one_for_the_rest(direction):
    generator = np.random.default_rng(0)
    p, q = (generator.normal(0, 2, (2, 3, 20)).astype(np.float32) for _ in range(2))
    chosen = np.argsort(-p, axis=-1)[..., :4].astype(np.int32)

    def listed(logits):
        logs = np.take_along_axis(log_probabilities(logits, 2.0), chosen, -1)
        return np.concatenate([logs, np.log1p(-np.exp(logs).sum(-1, keepdims=True))], -1)

    # The logits of five tokens that have these probabilities, at this temperature.
    wanted = expected(2.0 * listed(p), 2.0 * listed(q), 2.0, direction)
    log_p = tf.constant(listed(p)[..., :4], tf.float32)
    found = divergence_of_top_k(tf.constant(chosen), log_p, tf.constant(q), 2.0, direction)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_means_over_real_tokens_of_ragged_batches(models, direction):
    student, teacher = models
    inputs, labels, weights = ragged()
    distiller = Distiller(
        student, teacher, [LogitsKL(2.0, direction, weight=0.25), HardLabels(weight=0.5)]
    )
    distiller.compile()
    # Two batches with different numbers of real tokens.
    logs = distiller.evaluate(
        inputs, labels, sample_weight=weights, batch_size=2, verbose=0, return_dict=True
    )
    p, q = (np.asarray(model(inputs)) for model in (teacher, student))
    counts = weights * inputs["padding_mask"]
    value = (expected(p, q, 2.0, direction) * counts).sum() / counts.sum()
    picked = np.take_along_axis(log_probabilities(q), labels[..., None], -1)[..., 0]
    hard = -(picked * counts).sum() / counts.sum()
    assert logs["logits_kl"] == pytest.approx(value, abs=1e-6)
    assert logs["hard_labels"] == pytest.approx(hard, abs=2e-6)
    assert logs["loss"] == pytest.approx(0.25 * value + 0.5 * hard, abs=2e-6)


def test_a_weight_for_each_row(models):
    student, teacher = models
    inputs, labels, _ = ragged()
    distiller = Distiller(student, teacher)
    distiller.compile()
    logs = [
        distiller.evaluate(inputs, labels, sample_weight=w, verbose=0, return_dict=True)["loss"]
        for w in (np.array([1.0, 2.0, 0.0, 0.5]), np.ones(4))
    ]
    values = expected(np.asarray(teacher(inputs)), np.asarray(student(inputs)), 1.0, "forward")
    for found, row in zip(logs, ([1.0, 2.0, 0.0, 0.5], [1, 1, 1, 1]), strict=True):
        counts = inputs["padding_mask"] * np.asarray(row)[:, None]
        assert found == pytest.approx((values * counts).sum() / counts.sum(), abs=1e-6)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_hidden_states_through_a_projection(distance):
    student, teacher = make("GPT2", hidden_dim=16), make("GPT2", num_layers=4)
    inputs, labels, weights = ragged()
    distiller = Distiller(student, teacher, [HiddenStates({0: 1, -1: -1}, distance)])
    distiller.compile()
    logs = distiller.evaluate(inputs, labels, sample_weight=weights, verbose=0, return_dict=True)
    counts, total = weights * inputs["padding_mask"], 0.0
    layers = [model.backbone.transformer_layers for model in (student, teacher)]
    projections = [v.numpy() for v in distiller.trainable_variables if "projection" in v.name]
    assert [p.shape for p in projections] == [(16, 32)] * 2
    for (mine, yours), projection in zip([(0, 1), (1, 3)], projections, strict=True):
        a, b = (
            np.asarray(look(model, inputs, [of[i]]).hidden[id(of[i])], np.float64)
            for model, of, i in zip((student, teacher), layers, (mine, yours), strict=True)
        )
        a = a @ projection
        if distance == "mse":
            values = ((a - b) ** 2).mean(-1)
        else:
            norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            values = 1 - (a * b).sum(-1) / norms
        total += (values * counts).sum() / counts.sum() / 2
    assert logs["hidden_states"] == pytest.approx(total, rel=1e-5)


def attention_of_gpt2(model, inputs):
    """Returns the maps of the first layer, computed from its weights."""
    backbone = model.backbone
    layer = backbone.transformer_layers[0]
    x = backbone.token_embedding(inputs["token_ids"])
    x = layer._self_attention_layer_norm(x + backbone.position_embedding(x))
    inner = layer._self_attention_layer
    q, k = np.asarray(inner.query_dense(x)), np.asarray(inner.key_dense(x))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    length = scores.shape[-1]
    seen = np.tril(np.ones((length, length))) * inputs["padding_mask"][:, None, None]
    return np.exp(log_probabilities(np.where(seen > 0, scores, -1e9)))


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_maps(heads):
    student, teacher = make("GPT2", num_heads=heads), make("GPT2", num_layers=3)
    inputs, labels, weights = ragged()
    distiller = Distiller(student, teacher, [AttentionMaps({0: 0})])
    distiller.compile()
    logs = distiller.evaluate(inputs, labels, sample_weight=weights, verbose=0, return_dict=True)
    p, q = attention_of_gpt2(teacher, inputs), attention_of_gpt2(student, inputs)
    if heads != 4:
        p, q = p.mean(1, keepdims=True), q.mean(1, keepdims=True)
    ratio = np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(q, 1e-30))
    values = (p * ratio).sum(-1).mean(1)
    counts = weights * inputs["padding_mask"]
    assert logs["loss"] == pytest.approx((values * counts).sum() / counts.sum(), rel=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "OPT"])
def test_every_family_shows_its_insides(family):
    student, teacher = make(family), make(family, num_layers=3)
    inputs, labels, _ = ragged()
    losses = [LogitsKL(), HiddenStates(), AttentionMaps()]
    distiller = Distiller(student, teacher, losses)
    distiller.compile(run_eagerly=True)
    logs = distiller.evaluate(inputs, labels, verbose=0, return_dict=True)
    assert all(np.isfinite(value) and value > 0 for value in logs.values())
    maps = look(teacher, inputs, attention=distiller.teacher.attention).attention
    for attention in maps.values():
        assert attention.shape == (4, 4, 12, 12)
        np.testing.assert_allclose(np.asarray(attention)[0].sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_padding_has_exactly_no_gradient(family):
    student, teacher = make(family), make(family, num_layers=3)
    inputs, labels, weights = ragged(rows=(7, 5, 6))
    distiller = Distiller(
        student, teacher, [LogitsKL(), HardLabels(), HiddenStates(), AttentionMaps()]
    )
    distiller.compile(optimizer=keras.optimizers.SGD(0.0))
    first = student.backbone.transformer_layers[0]
    call, caught = first.call, []

    def watching(x, *args, **kwargs):
        caught.append(x)
        return call(x, *args, **kwargs)

    object.__setattr__(first, "call", watching)
    with tf.GradientTape() as tape:
        view = distiller._look(inputs, training=True)
        counts = token_weights(inputs, weights, view.logits[..., 0])
        loss = distiller._loss(view, distiller._lesson(inputs, None), labels, counts)
    gradient = tape.gradient(loss, caught[0]).numpy()
    padded = inputs["padding_mask"] == 0
    assert (gradient[padded] == 0.0).all()
    assert (np.abs(gradient[~padded]).max(-1) > 0).all()
