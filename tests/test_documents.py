"""Runs what the documents show."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import keras_hub
import numpy as np
import pytest
import yaml
from shown import names_of, small_gemma, small_gpt

import tfgptopt
from tfgptopt.quantization import Int4, Int8

ROOT = Path(__file__).parent.parent


def blocks(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), re.S)


PAGES = {path.name: path for path in sorted((ROOT / "docs").glob("*.md")) if blocks(path)}
# They need an engine, a server, or no package at all: test_litertlm, test_server, and below.
ELSEWHERE = {"litertlm.md", "serving.md", "tflite_format.md"}
# Their files answer with text, so that the model has its tokenizer.
WITH_TEXT = {"index.md", "generation.md", "evaluation.md", "explaining.md"}
TWO_LAYERS = {"shrinking.md", "distillation.md"}
# Numbers of examples for which a tiny model has no room, and tests no time.
SMALLER = [
    ("begin_step=100, end_step=800", "begin_step=2, end_step=6, frequency=1"),
    ("begin_step=100, end_step=900, frequency=50", "begin_step=2, end_step=6, frequency=1"),
    ("begin_step=200, end_step=800, frequency=50", "begin_step=2"),
    ("port=9464", "port=0"),
    ("steps_per_epoch=1000", "steps_per_epoch=3"),
    ("load_corpus()", "load_corpus('notes', vocabulary_size=300)"),
    ("depth=2, feedforward=0.75", "depth=1, feedforward=0.75"),
    ("sequence_length=512", "sequence_length=64"),
    ("max_length=64", "max_length=48"),
    ("4, 4, 256, 1024, max_sequence", "2, 2, 32, 64, max_sequence"),
    ("bits=5.0", "bits=6.0"),
    ("Rotate(steps=100)", "Rotate(steps=2)"),
    ("max_new_tokens=40", "max_new_tokens=4"),
]  # fmt: skip
# What must have come of a page, printed or written.
SEEN = {
    "index.md": ["import os\n", "gpt.tflite"],
    "distillation.md": ["student.tflite", "teacher-says/recording.json"],
    "evaluation.md": ["file: perplexity"],
    "explaining.md": ["rank correlation"],
    "monitoring.md": ["'gradient_norm': ", "logs/metrics.jsonl"],
    "pruning.md": ["50.0% zeros in pruned weights", "gpt.tflite"],
    "quantization.md": ["bits.png"],
    "reloading.md": ["gpt.tflite", "small_gpt/recipe.yaml", "run"],
    "saved_model.md": ["(2, 300)"],
    "shrinking.md": ["1 layers, width 64, 2 heads of 32"],
}


def run_blocks(codes: list[str], names: dict, make_gpt: Callable | None = None) -> None:
    """Runs blocks one after the other, each with a model as it was at first."""
    from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

    from tfgptopt.pruning import PolynomialDecay

    schedule = PolynomialDecay(0.0, 0.5, 1, 4, frequency=1)
    names |= {"Pruning": Pruning, "QuantizationAwareTraining": QuantizationAwareTraining}
    names |= {"Int4": Int4, "Int8": Int8, "schedule": schedule}
    for code in codes:
        if make_gpt is not None:
            names["gpt"] = names["model"] = make_gpt()
        for large, small in SMALLER:
            code = code.replace(large, small)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, "document", "exec"), names)


@pytest.mark.parametrize("page", [name for name in PAGES if name not in ELSEWHERE])
def test_the_examples_of_a_page_run(page, few_windows, shown_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(shown_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def make_gpt():
        if page == "data.md":
            return small_gemma()
        gpt = small_gpt(few_windows, 2 if page in TWO_LAYERS else 1)
        if page in WITH_TEXT:
            gpt.preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(few_windows.tokenizer)
        if page == "reloading.md":
            tfgptopt.quantize_aware(gpt, Int8())
        return gpt

    lm = tfgptopt.TFLiteCausalLM(shown_folder / "gpt.tflite")
    names = names_of(make_gpt(), few_windows, lm) | {"data": few_windows.train.take(8)}
    if page == "saved_model.md":
        tfgptopt.export(names["gpt"], "folder")
    if page not in ("evaluation.md", "explaining.md", "generation.md"):
        (tmp_path / "gpt.tflite").unlink()
    codes = blocks(PAGES[page])
    if page == "generation.md":
        tfgptopt.export(small_gemma(), "gemma.tflite")
        codes.append("lm = tfgptopt.TFLiteCausalLM('gemma.tflite')\n" + codes.pop())
    run_blocks(codes, names, make_gpt)
    printed = capsys.readouterr().out
    for seen in SEEN.get(page, []):
        assert seen in printed or (tmp_path / seen).exists(), printed


def test_the_readmes_examples(shown_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(shown_folder / "notes", tmp_path / "notes")
    monkeypatch.chdir(tmp_path)
    first, second = blocks(ROOT / "README.md")
    names: dict = {}
    run_blocks([first], names)
    run_blocks([second], names, lambda: small_gpt(names["corpus"], 2))
    assert "import os" in capsys.readouterr().out
    assert Path("gpt.tflite").is_file() and Path("small.tflite").is_file()


@pytest.mark.parametrize(
    "line",
    sorted(
        {
            line.split("#")[0].strip()
            for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
            for code in blocks(path, "sh")
            for line in code.splitlines()
            if line.startswith("tfgptopt ")
        }
    ),
)
def test_commands_that_documents_show_have_these_options(line):
    import typer

    from tfgptopt.cli.main import app

    _, name, *words = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    assert command.make_context(name, words).args == []  # Raises where it does not know an option.


def test_a_consumer_without_this_package_generates_the_same_text(trained, tmp_path):
    path = tfgptopt.export(trained, tmp_path / "gpt.tflite")
    (code,) = blocks(PAGES["tflite_format.md"])
    assert "import tfgptopt" not in code
    result = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['tfgptopt'] = None\n" + code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ),
    )
    assert result.returncode == 0, result.stderr
    lm = tfgptopt.TFLiteCausalLM(path)
    assert result.stdout.rstrip("\n") == lm.generate("import os\n").rstrip("\n")


def test_the_recipe_of_shrinking():
    (text,) = blocks(PAGES["shrinking.md"], "yaml")
    recipe = tfgptopt.Recipe.from_config(yaml.safe_load(text))
    names = [type(technique).__name__ for technique in recipe.techniques]
    assert names == ["Shrink", "Distill", "Prune", "QuantizeAware"]


def test_what_contributing_shows_is_short_python():
    codes = blocks(ROOT / "CONTRIBUTING.md")
    assert len(codes) == 5
    for code in codes:
        compile(code, "CONTRIBUTING.md", "exec")
        assert len([line for line in code.splitlines() if line.strip()]) <= 15
    names: dict[str, object] = {}
    exec("import dataclasses, numpy as np, tensorflow as tf, tfgptopt", names)
    exec("from tfgptopt.pruning import *", names)
    exec(codes[0].replace("diagonals", "shown"), names)
    pattern = names["Diagonals"]()
    assert isinstance(pattern, names["Pattern"])
    (mask,) = pattern.masks([np.ones((3, 4), np.float32)], [0.5])
    assert pattern.holds(np.asarray(mask)) and np.asarray(mask).mean() == 0.5
