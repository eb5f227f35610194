"""What is mended in KerasHub computes what KerasHub computes, and techniques reach it."""

import io
import re

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from decoder.families import CONTEXT, VOCABULARY, logits, make, prompt
from keras_hub.src.models.gemma4.gemma4_decoder_block import Gemma4TextDecoderBlock
from rich.console import Console
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.pruning import ConstantSparsity
from tfgptopt.quantization import Int8

_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 3,
    "expert_intermediate_dim": 8,
    "num_experts_per_token": 2,
}


@pytest.mark.parametrize("settings", [{}, _EXPERTS], ids=["dense", "experts"])
def test_blocks_of_gemma4_give_what_kerashub_computes(settings, monkeypatch):
    model = make("Gemma 4", **settings)
    found = logits(model, prompt(20))
    # The method that was there before.
    monkeypatch.setattr(Gemma4TextDecoderBlock, "call", Gemma4TextDecoderBlock.call.__wrapped__)
    np.testing.assert_allclose(found, logits(model, prompt(20)), atol=1e-5, rtol=0)


def test_gemma4_counts_positions_itself():
    model, ids = make("Gemma 4"), np.asarray([prompt(12), prompt(12, 2)])
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    places = np.tile(np.arange(12), (2, 1))
    expected = np.asarray(model({**inputs, "position_ids": places}))
    tensors = {name: keras.ops.convert_to_tensor(value) for name, value in inputs.items()}
    for given in (inputs, tensors):
        np.testing.assert_array_equal(np.asarray(model(given)), expected)


def test_gemma3n_gives_logits_with_the_table_as_it_is():
    model = make("Gemma 3n")
    table = model.backbone.language_model.embed_tokens.embedding.embeddings
    table.assign(table + 0.1)
    mask = np.ones((1, 12), bool)
    hidden = model.backbone({"token_ids": np.asarray([prompt(12)]), "padding_mask": mask})
    expected = 5 * np.tanh(np.asarray(hidden)[0] @ table.numpy().T / 5)
    np.testing.assert_allclose(logits(model, prompt(12)), expected, atol=1e-5, rtol=0)


def bytes_looked_up(path):
    """Returns the sizes of the int8 tables in which a file looks tokens up."""
    file = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    lookup = schema.BuiltinOperator.EMBEDDING_LOOKUP
    tables = [
        graph.tensors[operator.inputs[1]]
        for graph in file.subgraphs
        for operator in graph.operators
        if file.operatorCodes[operator.opcodeIndex].builtinCode == lookup
    ]
    integers = [table for table in tables if table.type == schema.TensorType.INT8]
    return {len(file.buffers[table.buffer].data) for table in integers}


@pytest.mark.parametrize("name", ["Gemma 4", "Gemma 3n"])
def test_a_step_of_training_prunes_and_rounds_all_of_a_gemma(name, tmp_path):
    model = make(name)
    tokens = np.asarray([prompt(17, seed) for seed in range(4)])
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((4, 16), np.int32)}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, run_eagerly=True)  # To trace it takes longer than to run it once.
    pruning = Pruning(ConstantSparsity(0.5, 0, frequency=1))
    callbacks = [pruning, QuantizationAwareTraining(Int8())]
    model.fit(inputs, tokens[:, 1:], batch_size=4, verbose=0, callbacks=callbacks)
    path = tfgptopt.export(model, tmp_path / "gpt.tflite", TFLite(context_length=CONTEXT))
    # The table of inputs of each layer is looked up in integers, as they are in the file.
    assert VOCABULARY * 4 * 8 in bytes_looked_up(path)
    lm = tfgptopt.TFLiteCausalLM(path)
    found = lm._engine.score(lm._engine.new_cache(), prompt(30))
    difference = np.abs(found - logits(model, prompt(30)))
    assert np.median(difference) < 1e-2  # An activation on an edge may fall either way.
    tfgptopt.finalize(model)
    kernels = {w.path: w for w in model.weights if w.path.endswith("kernel")}
    console = Console(file=io.StringIO(), width=200)
    tfgptopt.summary(model, console)
    shown = console.file.getvalue().splitlines()
    idle = [path for path in kernels if name == "Gemma 3n" and re.search("_3/.*/[kv]_proj", path)]
    for path, kernel in kernels.items():
        shown_as = path.removesuffix("/kernel") if path in idle else path
        (line,) = (line for line in shown if f" {shown_as} " in line)
        assert ("never called" if path in idle else "int8, final") in line
        zeros = (kernel.numpy() == 0).mean()
        assert zeros == 0 if path in idle else 0.45 < zeros < 0.75, path


def test_gemma3n_drops_out_in_training_and_its_logits_keep_their_precision():
    model = make("Gemma 3n", attention_dropout=0.5)
    assert model._call_has_training_arg
    inputs = {"token_ids": np.asarray([prompt(12)]), "padding_mask": np.ones((1, 12), bool)}
    apart = [np.asarray(model(inputs, training=flag)) for flag in (True, False)]
    assert np.abs(apart[0] - apart[1]).max() > 1e-2
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = make("Gemma 3n")
        assert half(inputs).dtype == "float32"
        tfgptopt.quantize_aware(half, Int8())
        assert half(inputs).dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")
