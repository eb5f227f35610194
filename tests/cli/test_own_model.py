"""Commands for a model of somebody else's: quantize, optimize with adapters, evaluate, inspect."""

from __future__ import annotations

import json

import keras
import keras_hub
import numpy as np
import pytest
from cli.test_cli import assert_refused, run

import tfgptopt
from tfgptopt.quantization import Int4, Int8
from tfgptopt.quantization.post_training import _automatic
from tfgptopt.quantization.specs import parse_spec


@pytest.fixture(scope="module")
def preset(corpus, tmp_path_factory):
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        corpus.tokenizer.vocabulary_size(), 2, 2, 32, 64, 0.0, max_sequence_length=64
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=64)
    folder = tmp_path_factory.mktemp("own") / "gpt"
    keras_hub.models.GPT2CausalLM(backbone, preprocessor).save_to_preset(str(folder))
    return folder


def test_quantize_evaluate_inspect(preset, text_files, tmp_path):
    path, text = tmp_path / "small.tflite", text_files / "scanner.py"
    result = run("quantize", preset, path, "--spec", "int4:32", "--calibration", text,
                 "--text", text, "--sequence-length", 32)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "perplexity" in result.stdout and "before" in result.stdout
    metadata = tfgptopt.TFLiteCausalLM(path).metadata
    assert metadata.recipe["techniques"][0]["spec"]["block_size"] == 32
    shown = run("inspect", path)
    for word in ("GPT2CausalLM", "decode", "byte pairs", "quantize_aware", "float32"):
        assert word in shown.stdout, shown.stdout
    compared = run("evaluate", path, preset, "--text", text, "--sequence-length", 16)
    assert compared.returncode == 0, compared.stderr
    assert "small.tflite" in compared.stdout and "perp" in compared.stdout


def test_what_cannot_be_done_is_one_sentence_and_writes_nothing(preset, tmp_path):
    path = tmp_path / "small.tflite"
    for options, message in (
        (("--spec", "int3"), "int8"),
        (("--spec", "int4:no"), "int4:32"),
        (("--spec", "int4:33"), "multiple of 32"),
        (("--method", "gptq"), "needs calibration data"),
        (("--method", "magic"), "'auto', one of"),
        (("--calibration", "nowhere.txt"), "no text file"),
    ):
        assert_refused(run("quantize", preset, path, *options), message)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    assert_refused(run("quantize", tmp_path / "broken", path), "safetensors")
    assert not path.exists()


@pytest.mark.slow
def test_optimize_with_adapters_on_chats(preset, tmp_path):
    records = [{"prompt": f"say {i}", "response": f"{'abc' * (i % 3 + 1)} {i}"} for i in range(40)]
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    out = tmp_path / "out"
    result = run("optimize", data, "--preset", preset, "--lora", 2, "--out", out, "--steps", 4,
                 "--sequence-length", 48, "--batch-size", 4)  # fmt: skip
    assert result.returncode == 0, result.stderr
    lm = tfgptopt.TFLiteCausalLM(out / "model.tflite")
    kinds = [technique["name"] for technique in lm.metadata.recipe["techniques"]]
    assert kinds == ["quantize_aware"]  # Nothing is pruned unless it is asked for.
    assert lm.metadata.weights.nonzero > 0.95 * lm.metadata.weights.parameters
    again = keras_hub.models.CausalLM.from_preset(str(out / "model"))
    before = keras_hub.models.CausalLM.from_preset(str(preset))
    moved = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max()) > 0.0
        for a, b in zip(again.backbone.weights, before.backbone.weights, strict=True)
    ]
    assert any(moved)


def test_specs_and_the_best_methods_by_name():
    assert parse_spec("int8") == Int8() and parse_spec("int4") == Int4()
    assert parse_spec("int4:64") == Int4(block_size=64)
    assert _automatic(Int8(), None) == ("rtn",) and _automatic(Int4(), None) == ("mse",)
    assert _automatic(Int8(), [1]) == ("smoothquant", "awq", "gptq")
    assert _automatic(Int4(), [1]) == ("gptq",)
