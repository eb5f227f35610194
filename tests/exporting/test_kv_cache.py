import keras_hub
import numpy as np
import pytest
from conftest import VOCABULARY, make_gpt

import tfgptopt

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 200).tolist()


@pytest.fixture(scope="module")
def model():
    return make_gpt(context=256)


@pytest.fixture(scope="module", params=["float32", "int8"])
def lm(request, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "gpt.tflite"
    return tfgptopt.TFLiteCausalLM(tfgptopt.export(model, path, cache_dtype=request.param))


def held(engine, cache, name):
    shape, dtype = engine._cache_shapes[name]
    return cache.buffers[name].read(int(np.prod(shape)), dtype.type).reshape(shape)


def test_int8_rows_are_the_floats_rounded_to_their_largest(model, tmp_path):
    found = []
    for dtype in ("float32", "int8"):
        file = tfgptopt.export(model, tmp_path / f"{dtype}.tflite", cache_dtype=dtype)
        engine = tfgptopt.TFLiteCausalLM(file)._engine
        cache = engine.new_cache()
        engine.read(cache, TOKENS[:150])  # Chunks, and single tokens.
        names = [name for name in engine._cache_shapes if name.endswith("_0")]
        found.append({name: held(engine, cache, name) for name in names})
    floats, integers = found
    assert set(integers) == {"key_0", "value_0", "key_scale_0", "value_scale_0"}
    for name in ("key", "value"):
        rows = floats[f"{name}_0"][:, :150]
        scale = integers[f"{name}_scale_0"][:, :150]
        assert integers[f"{name}_0"].dtype == np.int8
        np.testing.assert_allclose(scale, abs(rows).max(-1, keepdims=True), rtol=1e-5)
        # A product at the edge between two integers may fall either way.
        difference = abs(integers[f"{name}_0"][:, :150] - np.rint(rows / scale * 127))
        assert difference.max() <= 1
        assert difference.mean() < 0.001


def test_logits_are_those_of_keras(lm, model):
    mask = np.ones((1, len(TOKENS)), np.int32)
    inputs = {"token_ids": np.asarray([TOKENS]), "padding_mask": mask}
    expected = np.asarray(model(inputs))[0]
    engine = lm._engine
    # Rounded keys and values differ by 1/254 of the largest of a row at most.
    tolerance = 1e-4 if len(engine._cache_shapes) == 4 else 0.02 * expected.std()
    chunks = engine.score(engine.new_cache(), TOKENS)
    np.testing.assert_allclose(chunks, expected, atol=tolerance)
    cache = engine.new_cache()
    engine.read(cache, TOKENS[:120])
    copy = engine.copy_cache(cache)
    for each in (cache, copy):
        singles = np.stack([engine.decode(each, token) for token in TOKENS[120:]])
        np.testing.assert_allclose(singles, expected[120:], atol=tolerance)


def test_a_cache_begins_with_zeros_where_memory_is_used_again(lm):
    engine = lm._engine
    cache = engine.new_cache()
    engine.read(cache, TOKENS[:150])
    del cache
    for _ in range(3):
        fresh = engine.new_cache()
        assert not any(held(engine, fresh, name).any() for name in engine._cache_shapes)


def test_what_has_no_int8_cache_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"`cache_dtype` must be one of .* Received: 'float16'"):
        tfgptopt.export(model, tmp_path / "a.tflite", cache_dtype="float16")
    with pytest.raises(ValueError, match=r"are for a \.tflite file only"):
        tfgptopt.export(model, tmp_path / "saved", cache_dtype="int8")
    grouped = keras_hub.models.LlamaBackbone(VOCABULARY, 1, 4, 32, 48, 2)
    llama = keras_hub.models.LlamaCausalLM(grouped, preprocessor=None)
    with pytest.raises(ValueError, match=r"4 heads on 2 it is no faster"):
        tfgptopt.export(llama, tmp_path / "a.tflite", 64, cache_dtype="int8")
    mixture = keras_hub.models.MixtralBackbone(VOCABULARY, 1, 4, 32, 48, 2, num_experts=2)
    with pytest.raises(ValueError, match="needs a reader for MixtralCausalLM"):
        tfgptopt.export(
            keras_hub.models.MixtralCausalLM(mixture, preprocessor=None),
            tmp_path / "a.tflite",
            cache_dtype="int8",
        )
    assert list(tmp_path.iterdir()) == []
