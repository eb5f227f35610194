import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from conftest import CONTEXT, make_gpt

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.model.targets import select, target_of
from tfgptopt.quantization import Int4, Int8, rounding


def all_logits(model, tokens):
    mask = np.ones((1, len(tokens)), np.int32)
    return np.asarray(model({"token_ids": np.asarray([tokens]), "padding_mask": mask}))[0]


def greedy(model, prompt, new):
    """The slow definition of greedy generation: the whole text again for each token."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(all_logits(model, tokens)[-1].argmax()))
    return tokens


def logits_of_file(path, tokens):
    lm = tfgptopt.TFLiteCausalLM(path)
    return lm._engine.score(lm._engine.new_cache(), tokens)


def prompts(model, count, length=8):
    size = model.backbone.vocabulary_size
    return np.random.default_rng(0).integers(0, size, (count, length)).tolist()


def test_float32_file_is_the_keras_model(gpt, tmp_path):
    path = tfgptopt.export(gpt, tmp_path / "gpt.tflite")
    lm = tfgptopt.TFLiteCausalLM(path)
    for prompt in prompts(gpt, 5):
        assert lm.generate(prompt, max_length=CONTEXT, stop=None) == greedy(gpt, prompt, 24)
        tokens = prompt * 4
        np.testing.assert_allclose(logits_of_file(path, tokens), all_logits(gpt, tokens), atol=1e-4)


def test_trained_file_computes_as_the_dressed_model(trained, tmp_path):
    path = tfgptopt.export(trained, tmp_path / "gpt.tflite")
    lm = tfgptopt.TFLiteCausalLM(path)
    cache = lm._engine.new_cache()
    same = total = 0
    for prompt in prompts(trained, 20):
        tokens = prompt * 3
        ours, theirs = lm._engine.score(cache, tokens), all_logits(trained, tokens)
        # One activation at the edge between two integers may fall either way.
        assert np.abs(ours - theirs).max() < 0.02 * theirs.std() + 0.02
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        total += len(tokens)
    assert same / total >= 0.99


def tensors_by_name(path):
    """Reads every constant of the file as integers or floats, straight from the flatbuffer."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    found = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is None or not len(data):
                continue
            raw = np.asarray(data, np.uint8)
            if tensor.type == schema.TensorType.INT4:
                pairs = np.stack([raw & 0xF, raw >> 4], 1).reshape(-1).astype(np.int8)
                values = np.where(pairs > 7, pairs - 16, pairs)[: np.prod(tensor.shape)]
            elif tensor.type == schema.TensorType.INT8:
                values = raw.view(np.int8)
            else:
                continue
            scale = np.asarray(tensor.quantization.scale, np.float32)
            found[tensor.name.decode()] = (values.reshape(tensor.shape), scale)
    return found


@pytest.mark.parametrize("spec", [Int8(), Int4(), Int4(embedding_bits=4)], ids=str)
def test_integers_in_the_file_are_those_of_the_rounding_function(spec, tmp_path):
    model = make_gpt()
    tfgptopt.prune(model, 0.5)
    tfgptopt.quantize_aware(model, spec)
    stored = tensors_by_name(tfgptopt.export(model, tmp_path / "gpt.tflite"))
    assert len(stored) == 1 + 2 * 4
    block = model.backbone.transformer_layers[0]
    attention = block._self_attention_layer

    def rounded(layer, bits):
        target = target_of(layer)
        integers, scale = rounding.quantize(
            target.variable.value, rounding.Grid(bits, target.input_axes)
        )
        order = target.output_axes + target.input_axes
        rows = integers.numpy().transpose(order).reshape(scale.shape.num_elements(), -1)
        return rows, scale.numpy().reshape(-1)

    dense = block._feedforward_intermediate_dense
    values, scale = stored[dense._kernel.path]
    np.testing.assert_array_equal(values, rounded(dense, spec.bits)[0])
    np.testing.assert_array_equal(scale, rounded(dense, spec.bits)[1])
    assert ((values == 0).mean()) >= 0.5
    parts = [attention._query_dense, attention._key_dense, attention._value_dense]
    values, scale = stored[f"{parts[0]._kernel.path}+key+value"]
    np.testing.assert_array_equal(values, np.concatenate([rounded(p, spec.bits)[0] for p in parts]))
    np.testing.assert_array_equal(scale, np.concatenate([rounded(p, spec.bits)[1] for p in parts]))
    table = model.backbone.token_embedding
    values, scale = stored[table._embeddings.path]
    np.testing.assert_array_equal(values, rounded(table, spec.embedding_bits)[0])


def test_export_is_the_same_before_and_after_finalize(trained, tmp_path):
    before = tensors_by_name(tfgptopt.export(trained, tmp_path / "before.tflite"))
    weights = trained.get_weights()
    copy = make_gpt(trained.backbone.vocabulary_size)
    copy.set_weights(weights)
    tfgptopt.quantize_aware(copy, Int8())
    tfgptopt.finalize(copy)
    after = tensors_by_name(tfgptopt.export(copy, tmp_path / "after.tflite"))
    for (_, (ours, scale)), (_, (theirs, other)) in zip(before.items(), after.items(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(scale, other)


def test_weights_that_moved_after_finalize_are_rounded_again_with_a_warning(gpt, tmp_path):
    tfgptopt.quantize_aware(gpt, Int8())
    tfgptopt.finalize(gpt)
    kernel = select(gpt)[0].variable
    kernel.assign(kernel * 1.01 + 0.001)
    with pytest.warns(UserWarning, match="changed since `finalize`"):
        tfgptopt.export(gpt, tmp_path / "gpt.tflite")


def test_any_runtime_loads_it(gpt, tmp_path):
    path = tfgptopt.export(gpt, tmp_path / "gpt.tflite")
    tokens = prompts(gpt, 1, length=CONTEXT)[0]
    expected = all_logits(gpt, tokens)
    for interpreter in (Interpreter(str(path)), tf.lite.Interpreter(str(path))):
        run = interpreter.get_signature_runner("score_32")
        shapes = run.get_input_details()
        inputs = {n: np.zeros(d["shape"], np.float32) for n, d in shapes.items() if "kv_" in n}
        positions = np.arange(CONTEXT, dtype=np.int32)
        result = run(tokens=np.asarray(tokens, np.int32), input_pos=positions, **inputs)
        np.testing.assert_allclose(result["logits"][0], expected, atol=1e-4)
        run = interpreter.get_signature_runner("decode")
        for positions in (20, 32, 24):  # Caches of any size, which the runner resizes.
            cache = {n: result[n][:, :positions] for n in inputs}
            position = np.asarray([positions - 1], np.int32)
            one = run(
                tokens=np.asarray(tokens[positions - 1 :][:1], np.int32),
                input_pos=position,
                **cache,
            )
            np.testing.assert_allclose(one["logits"][0, 0], expected[positions - 1], atol=1e-4)


def test_builtin_operators_only_and_the_table_once(trained, tmp_path):
    path = tfgptopt.export(trained, tmp_path / "gpt.tflite")
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    assert all(code.customCode is None for code in model.operatorCodes)
    table = trained.backbone.vocabulary_size * trained.backbone.hidden_dim
    large = [b for b in model.buffers if b.data is not None and len(b.data) == table]
    assert len(large) == 1


def test_metadata(trained, tmp_path):
    metadata = tfgptopt.TFLiteCausalLM(tfgptopt.export(trained, tmp_path / "g.tflite")).metadata
    names = [technique["name"] for technique in metadata.recipe["techniques"]]
    assert names == ["prune", "quantize_aware"]
    assert metadata.source.class_name == "GPT2CausalLM"
    assert metadata.source.config["num_layers"] == 2
    assert metadata.weights.parameters == trained.count_params()


def test_a_shorter_context(gpt, tmp_path):
    path = tfgptopt.export(gpt, tmp_path / "gpt.tflite", TFLite(context_length=20))
    lm = tfgptopt.TFLiteCausalLM(path)
    prompt = prompts(gpt, 1)[0]
    assert lm.generate(prompt, stop=None) == greedy(gpt, prompt, 12)


def test_bad_targets_leave_nothing_behind(gpt, tmp_path):
    path = tmp_path / "gpt.tflite"
    with pytest.raises(ValueError, match=f"an int from 2 to {CONTEXT}"):
        tfgptopt.export(gpt, path, TFLite(context_length=CONTEXT + 1))
    for length in (1, "8", True):
        with pytest.raises(ValueError, match="must be an int >= 2"):
            TFLite(context_length=length)
    import keras

    with pytest.raises(ValueError, match="not built"):
        tfgptopt.export(keras.Sequential([keras.layers.Dense(2)]), path)
    with pytest.raises(ValueError, match="Cannot write"):
        tfgptopt.export(gpt, "/proc/gpt.tflite")
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists already"):
        tfgptopt.export(gpt, path)
    assert path.read_bytes() == b"precious"
    tfgptopt.export(gpt, path, overwrite=True)
    assert path.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [path]
