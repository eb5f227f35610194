"""A family from outside the package, in one file: it exports and generates."""

from dataclasses import replace

import keras
import keras_hub
import numpy as np
import pytest

import tfgptopt
from tfgptopt import decoder, families
from tfgptopt.exporting import TFLite
from tfgptopt.families import Layout, Part

VOCABULARY, WIDTH, HEADS = 61, 16, 2


class ToyBlock(keras.layers.Layer):
    """Attention and a feed-forward network that read the same input, norms of mean squares."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        size = WIDTH // HEADS
        for name in ("q", "k", "v"):
            dense = keras.layers.EinsumDense("btw,whd->bthd", (None, HEADS, size), name=name)
            setattr(self, name, dense)
        self.o = keras.layers.EinsumDense("bthd,hdw->btw", (None, WIDTH), name="o")
        self.wide = keras.layers.Dense(24, activation="relu", name="wide")
        self.narrow = keras.layers.Dense(WIDTH, name="narrow")
        self.one, self.two = (keras.layers.LayerNormalization(name=n) for n in ("one", "two"))

    def build(self, shape):
        head = (*shape[:2], HEADS, WIDTH // HEADS)
        for layer in (self.q, self.k, self.v, self.one, self.two, self.wide):
            layer.build(shape)
        self.o.build(head)
        self.narrow.build((*shape[:2], 24))

    def call(self, x):
        normed = self.one(x)
        scores = keras.ops.einsum("bthd,bshd->bhts", self.q(normed), self.k(normed))
        scores = scores * (WIDTH // HEADS) ** -0.5
        causal = keras.ops.tril(keras.ops.ones(keras.ops.shape(scores)[-2:]))
        weights = keras.ops.softmax(scores - 1e9 * (1 - causal))
        attended = self.o(keras.ops.einsum("bhts,bshd->bthd", weights, self.v(normed)))
        return x + attended + self.narrow(self.wide(self.two(x)))


class ToyBackbone(keras.Model):
    def __init__(self, depth=2, **kwargs):
        super().__init__(**kwargs)
        self.depth, self.hidden_dim, self.n_head = depth, WIDTH, HEADS
        self.vocabulary_size, self.max_sequence_length = VOCABULARY, 32
        self.tokens = keras_hub.layers.ReversibleEmbedding(VOCABULARY, WIDTH, name="tokens")
        self.places = keras_hub.layers.PositionEmbedding(32, name="places")
        self.stack = [ToyBlock(name=f"block_{i}") for i in range(depth)]
        self.last = keras.layers.LayerNormalization(name="last")

    def call(self, inputs):
        x = self.tokens(inputs["token_ids"])
        x = x + self.places(x)
        for block in self.stack:
            x = block(x)
        return self.last(x)

    def get_config(self):
        return {"depth": self.depth}


LAYOUT = Layout(
    query=Part("q", kind="query"),
    key=Part("k"),
    value=Part("v"),
    output=Part("o", kind="writes"),
    up=Part("wide"),
    down=Part("narrow", kind="writes"),
    attention_norm=Part("one", kind="norm"),
    feedforward_norm=Part("two", kind="norm"),
    activation="wide.activation",
    parallel=True,
    heads="n_head",
    kv_heads=None,
    blocks="stack",
    token_embedding="tokens",
    final_norm="last",
    positions="places",
    own_layers=(ToyBlock,),
)


@pytest.fixture
def toy():
    keras.utils.set_random_seed(0)
    model = ToyBackbone()
    model({"token_ids": np.zeros((1, 4), np.int32), "padding_mask": np.ones((1, 4), np.int32)})
    for weight in model.weights:
        weight.assign(weight + keras.random.normal(weight.shape, stddev=0.2))
    return model


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(families, "_LAYOUTS", dict(families._LAYOUTS))
    monkeypatch.setattr(decoder, "_ARITHMETIC", dict(decoder._ARITHMETIC))
    families.register(ToyBackbone, LAYOUT)


def _logits(model, tokens):
    hidden = model({"token_ids": np.asarray([tokens])})
    return np.asarray(model.tokens(hidden, reverse=True))[0]


def test_a_family_from_outside_exports_and_generates(toy, registered, tmp_path):
    tokens = [3, 14, 15, 9]
    path = tfgptopt.export(toy, tmp_path / "toy.tflite", TFLite(24))
    lm = tfgptopt.TFLiteCausalLM(path)
    found = lm._engine.score(lm._engine.new_cache(), tokens)
    np.testing.assert_allclose(found, _logits(toy, tokens), atol=1e-4)
    greedy = list(tokens)
    for _ in range(10):
        greedy.append(int(_logits(toy, greedy)[-1].argmax()))
    assert lm.generate(tokens, max_length=14, stop=None) == greedy


def test_a_family_that_is_not_registered_is_refused(toy):
    assert "no reader for ToyBackbone" in decoder.why_unreadable(toy)


def test_layers_that_a_layout_does_not_name_are_refused(toy, registered):
    class Other(ToyBlock):
        pass

    toy.stack[0].__class__ = Other
    assert "a layer of its own, Other" in decoder.why_unreadable(toy)


def test_a_family_that_can_be_read_but_not_shrunk_says_so(toy, registered):
    with pytest.raises(ValueError, match=r"Cannot shrink ToyBackbone.*families GPT2, Gemma"):
        tfgptopt.shrink(toy, depth=1, calibration=np.zeros((1, 4), np.int32))


def test_what_a_family_computes_beyond_its_layout_is_registered_too(toy, registered):
    changed = decoder.Arithmetic(attention=lambda block, found: replace(found, window=3))
    decoder.register(ToyBackbone, changed)
    assert "window 3" in str(decoder.read_decoder(toy))
    with pytest.raises(ValueError, match="Expected a tfgptopt"):
        decoder.register(ToyBackbone, "window")


def test_a_layout_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="`query_key_value` in place"):
        replace(LAYOUT, query=None)
    with pytest.raises(ValueError, match="`axes` of every part"):
        replace(LAYOUT, shrinks=True)
    with pytest.raises(ValueError, match="Expected a subclass"):
        families.register(ToyBlock, LAYOUT)
    with pytest.raises(ValueError, match="Layout"):
        families.register(ToyBackbone, {})
