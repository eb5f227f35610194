import keras_hub
import numpy as np
import pytest
from conftest import VOCABULARY, make_gpt
from decoder.families import of_own_class

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.generation import caches

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 300).tolist()


@pytest.fixture(scope="module")
def model():
    return make_gpt(context=400)


@pytest.fixture(scope="module", params=["float32", "int8"])
def lm(request, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "gpt.tflite"
    return tfgptopt.TFLiteCausalLM(tfgptopt.export(model, path, TFLite(cache_dtype=request.param)))


def held(engine, cache, name):
    heads, size, dtype = engine._caches._parts[name]
    shape = (heads, cache.positions, size)
    return cache.buffers[name].read(int(np.prod(shape)), dtype.type).reshape(shape)


def test_int8_rows_are_the_floats_rounded_to_their_largest(model, tmp_path):
    found = []
    for dtype in ("float32", "int8"):
        file = tfgptopt.export(model, tmp_path / f"{dtype}.tflite", TFLite(cache_dtype=dtype))
        engine = tfgptopt.TFLiteCausalLM(file)._engine
        cache = engine.new_cache()
        engine.read(cache, TOKENS[:150])  # Chunks, and single tokens.
        names = [name for name in cache.buffers if name.endswith("_0")]
        found.append({name: held(engine, cache, name) for name in names})
    floats, integers = found
    names = {f"kv_cache_{name}{part}_0" for name in "kv" for part in ("", "_scale")}
    assert set(integers) == names
    for name in ("kv_cache_k", "kv_cache_v"):
        rows = floats[f"{name}_0"][:, :150]
        scale = integers[f"{name}_scale_0"][:, :150]
        assert integers[f"{name}_0"].dtype == np.int8
        np.testing.assert_allclose(scale, abs(rows).max(-1, keepdims=True), rtol=1e-5)
        # A product at the edge between two integers may fall either way.
        difference = abs(integers[f"{name}_0"][:, :150] - np.rint(rows / scale * 127))
        assert difference.max() <= 1
        assert difference.mean() < 0.001


@pytest.fixture
def expected(model):
    mask = np.ones((1, len(TOKENS)), np.int32)
    return np.asarray(model({"token_ids": np.asarray([TOKENS]), "padding_mask": mask}))[0]


def tolerance(lm, expected):
    """Rounded keys and values differ by 1/254 of the largest of a row at most."""
    exact = lm.metadata.decoder.cache_dtype == "float32"
    return 1e-4 if exact else 0.02 * expected.std()


def check_next(lm, cache, expected):
    """Decodes the next token of the text, and compares the logits."""
    position = len(cache.tokens)
    logits = lm._engine.decode(cache, TOKENS[position])
    np.testing.assert_allclose(logits, expected[position], atol=tolerance(lm, expected))


def test_logits_are_those_of_keras(lm, expected):
    engine, close = lm._engine, tolerance(lm, expected)
    chunks = engine.score(engine.new_cache(), TOKENS)
    np.testing.assert_allclose(chunks, expected, atol=close)
    cache = engine.new_cache()
    engine.read(cache, TOKENS[:120])
    copy = engine.copy_cache(cache)
    for each in (cache, copy):
        singles = np.stack([engine.decode(each, token) for token in TOKENS[120:]])
        np.testing.assert_allclose(singles, expected[120:], atol=close)


def test_caches_grow_with_their_texts_and_shrink_for_others(lm, expected):
    engine = lm._engine
    long, short = engine.new_cache(), engine.new_cache()
    assert long.positions == short.positions == 128
    engine.read(long, TOKENS[:127])
    engine.read(short, TOKENS[:20])
    for _ in range(8):  # By turns, while one of them grows.
        check_next(lm, long, expected)
        check_next(lm, short, expected)
    assert (long.positions, short.positions) == (256, 128)
    engine.read(long, TOKENS[:50])
    assert long.positions == 256  # It may soon need them again.
    engine.read(long, TOKENS[:280])
    assert long.positions == 384
    engine.read(long, TOKENS[:50])
    assert long.positions == 128 and len(long.tokens) == 50
    check_next(lm, long, expected)


def test_a_long_prompt_doubles_its_cache(lm, monkeypatch):
    engine, grown = lm._engine, []
    grow = engine._caches._grow

    def counted(cache, positions):
        grown.append(positions)
        grow(cache, positions)

    monkeypatch.setattr(engine._caches, "_grow", counted)
    engine.read(engine.new_cache(), TOKENS)
    assert grown == [256, 384]  # Twice as many, and then all that 300 tokens need.
    grown.clear()
    monkeypatch.setattr(caches, "_STEP", 16)  # Less than a chunk.
    cache = engine.new_cache()
    engine.read(cache, TOKENS)
    assert cache.positions == 320 and len(grown) <= 6  # In eighths from 256 on.


def test_scoring_a_short_text_after_a_long_one_needs_no_long_cache(lm, expected):
    engine, close = lm._engine, tolerance(lm, expected)
    cache = engine.new_cache()
    engine.score(cache, TOKENS)
    assert cache.positions == 384
    np.testing.assert_allclose(engine.score(cache, TOKENS[:9]), expected[:9], atol=close)
    assert cache.positions == 128


def test_a_resize_that_is_interrupted_is_made_again(lm, expected):
    class Interrupted:
        def __init__(self, model):
            self.model, self.calls = model, 0

        def __getattr__(self, name):
            return getattr(self.model, name)

        def resize_input_tensor(self, *arguments, **settings):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            self.model.resize_input_tensor(*arguments, **settings)

    engine = lm._engine
    cache = engine.new_cache()
    engine.read(cache, TOKENS[:100])
    engine.decode(cache, TOKENS[100])
    long = engine.new_cache()
    engine.read(long, TOKENS[:200])
    model = engine._caches._model
    engine._caches._model = Interrupted(model)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.decode(long, TOKENS[200])
    finally:
        engine._caches._model = model
    check_next(lm, cache, expected)  # Of the size before the interruption.


def test_padding_makes_no_cache_grow(lm, expected):
    engine = lm._engine
    cache = engine.new_cache()
    engine.read(cache, TOKENS[:100])
    engine.read(cache, TOKENS[:118])  # A chunk of 32 would end at 132.
    assert cache.positions == 128 and cache.tokens == TOKENS[:118]
    check_next(lm, cache, expected)


def test_growth_appends_zeros_behind_the_same_rows(lm):
    engine = lm._engine
    cache = engine.new_cache()
    engine.read(cache, TOKENS[:100])
    before = {name: held(engine, cache, name) for name in cache.buffers}
    engine._caches.fit("decode", cache, 129, 129)
    for name, rows in before.items():
        after = held(engine, cache, name)
        np.testing.assert_array_equal(after[:, :128], rows)
        assert after.shape[1] == 256 and not after[:, 128:].any()


def test_growth_that_is_interrupted_leaves_an_empty_cache(lm, expected, monkeypatch):
    engine = lm._engine
    cache = engine.new_cache()
    engine.read(cache, TOKENS[:128])
    grow_layer = engine._caches._grow_layer

    def interrupted(cache, layer, rooms):
        if layer == 1:
            raise KeyboardInterrupt
        grow_layer(cache, layer, rooms)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine._caches, "_grow_layer", interrupted)
        engine.decode(cache, TOKENS[128])
    assert cache.tokens == [] and cache.buffers == {}
    engine.read(cache, TOKENS[:128])
    check_next(lm, cache, expected)


def test_a_cache_begins_with_zeros_where_memory_is_used_again(lm):
    engine = lm._engine
    cache = engine.new_cache()
    engine.read(cache, TOKENS[:150])
    del cache
    for _ in range(3):
        fresh = engine.new_cache()
        assert not any(held(engine, fresh, name).any() for name in fresh.buffers)


def test_what_has_no_int8_cache_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"`cache_dtype` must be one of .* Received: 'float16'"):
        tfgptopt.export(model, tmp_path / "a.tflite", TFLite(cache_dtype="float16"))
    with pytest.raises(ValueError, match=r"TFLite ends with '\.tflite'\. .* SavedModel"):
        tfgptopt.export(model, tmp_path / "saved", TFLite(cache_dtype="int8"))
    grouped = keras_hub.models.LlamaBackbone(VOCABULARY, 1, 4, 32, 48, 2)
    llama = keras_hub.models.LlamaCausalLM(grouped, preprocessor=None)
    with pytest.raises(ValueError, match=r"4 heads on 2 it is no faster"):
        tfgptopt.export(llama, tmp_path / "a.tflite", TFLite(64, cache_dtype="int8"))
    with pytest.raises(ValueError, match="needs a reader for OwnCausalLM"):
        tfgptopt.export(of_own_class(llama), tmp_path / "a.tflite", TFLite(cache_dtype="int8"))
    assert list(tmp_path.iterdir()) == []
