"""Layers with a window hold the last rows alone, and say what they would say with all of them."""

import keras
import keras_hub
import numpy as np
import pytest

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.exporting.tflite import described
from tfgptopt.file.names import WINDOW_START, window_positions
from tfgptopt.generation import Beam, Random

WINDOW, CONTEXT, VOCABULARY = 16, 900, 60


def gemma():
    """Returns a Gemma 3 whose second layer of three sees everything."""
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=VOCABULARY, image_size=None, num_layers=7, num_query_heads=2,
        num_key_value_heads=1, hidden_dim=16, intermediate_dim=16, head_dim=8,
        use_sliding_window_attention=True, sliding_window_size=WINDOW, vision_encoder=None,
    )  # fmt: skip
    return keras_hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone)


def mistral():
    backbone = keras_hub.models.MistralBackbone(VOCABULARY, 2, 2, 16, 16, 2, sliding_window=WINDOW)
    return keras_hub.models.MistralCausalLM(backbone, preprocessor=None)


@pytest.fixture(scope="module", params=[gemma, mistral])
def pair(request, tmp_path_factory):
    """Two files of a model, with short caches of layers with a window and without."""
    keras.utils.set_random_seed(3)
    model, folder = request.param(), tmp_path_factory.mktemp("windows")
    settings = TFLite(context_length=CONTEXT, batch_sizes=(2,))
    if request.param is mistral:  # Each head has keys of its own.
        settings = TFLite(context_length=CONTEXT, batch_sizes=(2,), cache_dtype="int8")
    with pytest.MonkeyPatch.context() as patch:
        short = tfgptopt.export(model, folder / "short.tflite", settings)
        patch.setattr(described, "windowed_layers", lambda *arguments: ())
        whole = tfgptopt.export(model, folder / "whole.tflite", settings)
    return tfgptopt.TFLiteCausalLM(short), tfgptopt.TFLiteCausalLM(whole)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY, length).tolist()


def test_what_the_files_say(pair):
    short, whole = pair
    decoder = short.metadata.decoder
    assert decoder.window == WINDOW and whole.metadata.decoder.windowed_layers == ()
    layers = {7: (0, 1, 2, 3, 4, 6), 2: (0, 1)}  # Each sixth layer of Gemma sees everything.
    assert decoder.windowed_layers == layers[decoder.num_layers]
    versions = [one.metadata.format_version for one in pair]
    assert versions == [6, 5]


@pytest.mark.parametrize("length", [3, 200, 520, 880])
def test_texts_are_the_same(pair, length):
    texts = [
        lm.generate(prompt(length), max_length=CONTEXT, sampler=[Random(2.0)], seed=1, stop=None)
        for lm in pair
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) > 40


def test_caches_end_with_the_window(pair):
    engine = pair[0]._engine
    cache = engine.new_cache()
    engine.read(cache, prompt(CONTEXT - 1))
    most = window_positions(WINDOW, 128)
    assert cache.windowed == most < cache.positions == CONTEXT
    begin = cache.start
    for token in prompt(1, seed=1):
        engine.decode(cache, token)
    assert 0 < begin <= cache.start <= CONTEXT - WINDOW
    held = {
        name: tensor["shape"]
        for name, tensor in engine._model.get_input_tensor_details("decode").items()
    }
    assert tuple(held[WINDOW_START]) == (1,)


def test_rewinding_further_than_rows_are_held_reads_again(pair):
    text = prompt(CONTEXT - 1)
    for length in (860, 300, 861, 40):  # Each begins as the one before did.
        engine = pair[0]._engine
        cache, fresh = pair[0]._idle, engine.new_cache()
        with cache.lent() as held:
            engine.read(held, text)
            engine.read(held, text[:length])
            after = engine.decode(held, 7)
        engine.read(fresh, text[:length])
        np.testing.assert_allclose(after, engine.decode(fresh, 7), atol=1e-5)


def test_other_ways_to_decode(pair):
    short, whole = pair
    long, longer = prompt(600), prompt(700, seed=2)
    for settings in ({"speculative": "auto"}, {"sampler": Beam(2)}):
        texts = [lm.generate(long, max_length=700, stop=None, **settings) for lm in pair]
        assert texts[0] == texts[1], settings
    one = short.generate(long, max_length=800, stop=None)  # Its cache goes on in the batch.
    both = short.generate([long, longer], max_length=800, stop=None)
    assert both[0] == one and both == whole.generate([long, longer], max_length=800, stop=None)
    engine, cache = short._engine, short._engine.new_cache()
    engine.read(cache, longer)
    copy = engine.copy_cache(cache)
    np.testing.assert_array_equal(engine.decode(copy, 5), engine.decode(cache, 5))
    np.testing.assert_allclose(short.score(longer), whole.score(longer), atol=1e-5)


def test_an_interrupt_while_rows_move_leaves_nothing_half_done(pair, monkeypatch):
    engine = pair[0]._engine
    cache, text = engine.new_cache(), prompt(CONTEXT - 1)
    with monkeypatch.context() as patch:
        patch.setattr(np, "roll", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.read(cache, text)
    assert cache.tokens == [] and cache.start == 0
    fresh = engine.new_cache()
    for one in (cache, fresh):
        engine.read(one, text)
    np.testing.assert_array_equal(engine.decode(cache, 7), engine.decode(fresh, 7))
