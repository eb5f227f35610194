"""`tune` on a small model: files, the record, crashes, going on."""

import json

import keras_hub
import numpy as np
import pytest
from cli.test_cli import assert_refused, run
from conftest import make_gpt
from rich.console import Console

import tfgptopt
from tfgptopt.data import tokens_as_input
from tfgptopt.evaluation.loss import keras_loss, tflite_loss
from tfgptopt.job import tuning
from tfgptopt.job.search import Candidate, Limits
from tfgptopt.job.tuning import Tuning, tune

QUIET = Console(quiet=True)
CANDIDATES = [
    Candidate("int8", 0, "int8", "rtn"),
    Candidate("crashes", 0, "int4:64", "rtn"),  # Of 32 inputs.
    Candidate("larger", 2, "int8", sparsity=0.5),
    Candidate("half", 3, "int8", depth=0.5),
]
SETTINGS = Tuning(600, (2, 4))


@pytest.fixture(scope="module")
def gpt(corpus):
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=32)
    return make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)


def test_tune_measures_files_passes_crashes_over_and_goes_on(gpt, corpus, tmp_path, monkeypatch):
    before, out = gpt.get_weights(), tmp_path / "out"
    limits = Limits(max_size=1)  # Nothing meets it: all are tried, the smallest is kept.
    found = tune(gpt, corpus, limits, out, SETTINGS, CANDIDATES, QUIET)
    for old, new in zip(before, gpt.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    # None goes on to more steps, or is trained at all: training makes no file smaller.
    assert [trial.name for trial in found.trials] == ["int8", "crashes", "half"]
    assert found.skipped == {"larger": "its file is as large as that of int8"}
    assert "64" in found.trials[1].error
    kept = found.kept
    lm = tfgptopt.TFLiteCausalLM(out / "model.tflite")
    assert (
        (out / "model.tflite").stat().st_size
        == kept.size
        == min(trial.size for trial in found.trials if trial.error is None)
    )
    held_out = corpus.validation.take(tuning._BATCHES)
    with tokens_as_input(gpt):
        dense = keras_loss(gpt, held_out)
    assert kept.rise == pytest.approx(np.exp(tflite_loss(lm, held_out) - dense) - 1, abs=1e-4)
    assert "Chosen: " in (out / "report.html").read_text("utf-8")
    assert (out / "recipe.yaml").is_file() and not (out / "trying.tflite").exists()
    # A process that ended in the middle of a trial.
    with (out / tuning.RECORD).open("a") as file:
        file.write(json.dumps({"begun": "later", "steps": 0}) + '\n{"cut of')
    monkeypatch.setattr(tuning, "carry_out", lambda *a: pytest.fail("measured again"))
    more = [*CANDIDATES, Candidate("later", 1, "int4")]
    again = tune(gpt, corpus, limits, out, SETTINGS, CANDIDATES, QUIET)
    assert again.trials == found.trials and again.kept == kept
    ended = tune(gpt, corpus, limits, out, SETTINGS, more, QUIET)
    assert "process ended" in next(t.error for t in ended.trials if t.name == "later")
    other = make_gpt(corpus.tokenizer.vocabulary_size(), gpt.preprocessor)
    other.set_weights([weight * 1.5 for weight in before])
    with pytest.raises(ValueError, match="of another model or text"):
        tune(other, corpus, limits, out, SETTINGS, CANDIDATES, QUIET)


def test_other_limits_keep_another_file(gpt, corpus, tmp_path):
    two = [Candidate("int8", 0, "int8", "rtn"), Candidate("int4", 0, "int4", "rtn")]
    found = tune(gpt, corpus, Limits(max_rise=-0.9), tmp_path, SETTINGS, two, QUIET)
    sizes = {trial.name: trial.size for trial in found.trials}
    assert sizes["int4"] < sizes["int8"]
    for name, limits in (
        ("int4", Limits(max_size=(sizes["int4"] + sizes["int8"]) // 2)),
        (found.kept.name, Limits(max_rise=-0.9)),
    ):
        again = tune(gpt, corpus, limits, tmp_path, SETTINGS, two, QUIET)
        assert again.kept.name == name
        assert (tmp_path / "model.tflite").stat().st_size == sizes[name]


def test_the_command(gpt, text_files, tmp_path):
    gpt.save_to_preset(str(tmp_path / "gpt"))
    text, common = text_files / "decoder.py", ("--preset", tmp_path / "gpt")
    result = run("tune", text, *common, "--max-size", "1MB", "--sequence-length", 16,
                 "--out", tmp_path / "out", "--minutes", 5)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "it meets all limits." in " ".join(result.stdout.split())
    assert (tmp_path / "out" / "report.html").is_file()
    assert_refused(run("tune", text, *common), "Give a limit")
    for option, value, message in (
        ("--max-size", "4 parsecs", "such as 40MB"),
        ("--max-rise", "x%", "such as 3%"),
        ("--min-speed", "-3", "`min_speed` must be positive"),
    ):
        assert_refused(run("tune", text, *common, option, value), message)
    wrong = run("tune", text, *common, "--max-size", "1MB", "--steps", 9, "--steps", 3)
    assert_refused(wrong, "must rise")
