"""Commands for a model of somebody else's: quantize, optimize with adapters, evaluate, inspect."""

from __future__ import annotations

import contextlib
import json

import keras
import keras_hub
import numpy as np
import pytest
from cli.test_cli import assert_refused, run
from conftest import make_gpt
from data.chatty import CHATS, gemma_tokenizer

import tfgptopt
from tfgptopt.calibration.journal import FolderJournal
from tfgptopt.data import load_corpus, load_preset
from tfgptopt.evaluation.energy import why_not_measured
from tfgptopt.evaluation.loss import tflite_loss
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


def held_out(preset, text, sequence_length):
    """All of a text, as windows."""
    tokenizer = load_preset(preset).preprocessor.tokenizer
    return load_corpus(
        text,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        batch_size=2,
        validation_share=1.0,
    ).validation


def test_quantize_evaluate_inspect(preset, text_files, tmp_path, monkeypatch):
    path, text = tmp_path / "small.tflite", text_files / "scanner.py"
    command = ("quantize", preset, path, "--spec", "int4:32", "--calibration", text,
               "--text", text, "--sequence-length", 32)  # fmt: skip
    with monkeypatch.context() as patch:
        write = FolderJournal.write

        def stop(journal, *step):
            write(journal, *step)
            raise KeyboardInterrupt

        patch.setattr(FolderJournal, "write", stop)
        stopped = run(*command)
    assert stopped.returncode == 130 and "the same call goes on" in stopped.stderr
    assert not path.exists()
    assert_refused(run(*command), "--resume")
    result = run(*command, "--resume")
    assert result.returncode == 0, result.stderr
    assert "Going on from" in result.stdout and list(tmp_path.iterdir()) == [path]
    words = result.stdout.split("perplexity")[-1].split()
    after = tflite_loss(tfgptopt.TFLiteCausalLM(path), held_out(preset, text, 32))
    assert float(words[2]) == pytest.approx(np.exp(after), abs=1e-4)  # That of the file.
    metadata = tfgptopt.TFLiteCausalLM(path).metadata
    turned, rounded = metadata.recipe["techniques"]
    assert turned["name"] == "rotate" and rounded["spec"]["block_size"] == 32
    shown = run("inspect", path)
    for word in ("GPT2CausalLM", "decode", "byte pairs", "quantize_aware", "float32", "4.50"):
        assert word in shown.stdout, shown.stdout
    (tmp_path / "task.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}')
    lacking = why_not_measured()
    energy = ["--energy"] if lacking else []
    noted = pytest.warns(UserWarning, match="Energy was not measured: this machine|may not be")
    with noted if lacking else contextlib.nullcontext():
        compared = run("evaluate", path, preset, "--text", text, "--sequence-length", 16,
                       "--json", tmp_path / "results.json", "--reference", preset, "--stride", 8,
                       "--task", tmp_path / "task.jsonl", "--prompt", "import os",
                       "--explain", "occlusion", *energy)  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    assert "small.tflite" in compared.stdout and "perp" in compared.stdout
    assert all(len(line) <= 80 and "…" not in line for line in compared.stdout.splitlines())
    saved = json.loads((tmp_path / "results.json").read_text())
    file, model = saved["results"]
    assert file["name"] == "small.tflite" and model["quality"]["kl"] < 1e-6 < file["quality"]["kl"]
    assert 1 < file["quality"]["bits_per_byte"] < 8
    assert "task accuracy_norm" in compared.stdout and "sliding by 8" in compared.stdout
    assert file["tasks"]["task"]["items"] == 1 and "import os" in file["continuations"]
    assert len(file["attributions"]["import os"]["values"]) >= 2
    made = run("report", tmp_path / "results.json", "--out", tmp_path / "report.html")
    assert made.returncode == 0 and "rank correlation" in (tmp_path / "report.html").read_text()
    assert_refused(run("evaluate", path, "--text", text, "--explain", "lime"), "with --prompt")
    wrong = run("evaluate", path, "--text", text, "--explain", "tea", "--prompt", "a")
    assert_refused(wrong, "must be one of occlusion")
    assert saved["reference"] == "gpt" and saved["machine"]["cores"] >= 1
    none = run("evaluate", path, "--text", tmp_path / "task.jsonl")
    assert_refused(none, "Give a preset with a tokenizer")


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


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    backbone = keras_hub.models.GemmaBackbone(400, 2, 2, 1, 16, 32, 8)
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(
        gemma_tokenizer(), sequence_length=160
    )
    folder = tmp_path_factory.mktemp("gemma") / "preset"
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=preprocessor)
    model.save_to_preset(str(folder))
    return folder


@pytest.mark.slow
def test_the_whole_job_on_a_gemma_with_sentence_pieces_adapters_and_chats(gemma, tmp_path):
    preset, data, out = gemma, tmp_path / "chats.jsonl", tmp_path / "out"
    data.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    result = run("optimize", data, "--preset", preset, "--lora", 2, "--out", out, "--steps", 4,
                 "--sequence-length", 128, "--batch-size", 4)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "12 records" in result.stdout or "records" in result.stdout
    lm = tfgptopt.TFLiteCausalLM(out / "model.tflite")
    assert "<start_of_turn>" in lm.metadata.chat.template
    assert isinstance(lm.chat().generate("What is 1 plus 1?", max_new_tokens=6), str)
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
    gpt, other = make_gpt(), keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert _automatic(other, Int8(), None, None) == ("rtn",)
    assert _automatic(other, Int4(), None, None) == ("mse",)
    assert _automatic(other, Int8(), [1], None) == ("smoothquant", "awq", "gptq")
    assert _automatic(other, Int4(), [1], None) == ("gptq",)
    assert _automatic(gpt, Int8(), None, None) == ("rotation", "rtn")
    assert _automatic(gpt, Int8(), [1], None) == ("rotation", "gptq")
    assert _automatic(gpt, Int8(), [1], "feedforward") == ("smoothquant", "awq", "gptq")


def test_shrink_writes_a_smaller_preset_and_says_what_is_left(preset, text_files, tmp_path):
    folder, text = tmp_path / "small", text_files / "scanner.py"
    result = run("shrink", preset, folder, "--depth", 1, "--feedforward", "0.5",
                 "--calibration", text, "--text", text, "--sequence-length", 32)  # fmt: skip
    assert result.returncode == 0, result.stderr
    small = load_preset(folder)
    assert small.backbone.num_layers == 1 and small.backbone.intermediate_dim == 32
    words = result.stdout.split()
    assert "50%" in words and f"{small.backbone.count_params():,}" in words
    assert "perplexity" in words and max(map(len, result.stdout.splitlines()[:12])) <= 80
    file = tmp_path / "small.tflite"
    result = run("shrink", preset, file, "--parameters", "0.7", "--calibration", text,
                 "--sequence-length", 32)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert tfgptopt.TFLiteCausalLM(file).metadata.recipe["techniques"][0]["name"] == "shrink"


def test_bad_shrinking_and_bad_recipes_are_one_sentence(preset, text_files, tmp_path):
    text, out = text_files / "scanner.py", tmp_path / "small"
    for options, message in (
        ((), "Give what to shrink"),
        (("--depth", "9"), "depth=2"),
        (("--depth", "1", "--latency", "0.5"), "budget"),
        (("--vocabulary", "0.5", "--text", text), "do not compare"),
    ):
        command = ["shrink", preset, out, "--calibration", text, "--sequence-length", 32]
        assert_refused(run(*command, *options), message)
    assert run("shrink", preset, out, "--calibration", text, "--depth", "few").returncode == 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("techniques: [{name: shrink, depth: 1}]")
    command = ["optimize", text, "--preset", preset, "--out", out, "--sequence-length", 32]
    for options, message in (
        (("--recipe", recipe, "--spec", "int4"), "leave out --spec"),
        (("--recipe", recipe, "--lora", 2), "cannot train LoRA adapters alone"),
        (("--spec", "int4", "--bits", 4), "say the same"),
        (("--bits", 3), "--bits must be 4 or 8"),
        (("--context-length", 16), "`context_length` must be at least 32"),
        (("--context-length", 999), "at most 64"),
    ):
        assert_refused(run(*command, *options), message)
    assert not out.exists()


def test_a_preset_without_tokenizer_can_be_exported_and_not_read_text(text_files, tmp_path):
    folder, text = tmp_path / "bare", text_files / "scanner.py"
    make_gpt().save_to_preset(str(folder))
    for command in (
        ("optimize", text, "--preset", folder, "--out", tmp_path / "out"),
        ("quantize", folder, tmp_path / "a.tflite", "--text", text),
        ("shrink", folder, tmp_path / "small", "--depth", 1, "--calibration", text),
        ("evaluate", folder, "--text", text),
    ):
        assert_refused(run(*command), "has no tokenizer")
    assert list(tmp_path.iterdir()) == [folder]
    assert run("quantize", folder, tmp_path / "a.tflite").returncode == 0
