"""Runs what the documents show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml

import tfgptopt

ROOT = Path(__file__).parent.parent


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text("utf-8"), re.S)


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result


def test_the_readmes_example(tmp_path, text_files):
    code = blocks("README.md")[0]
    assert "load_corpus()" in code and "steps_per_epoch=1000" in code
    small = code.replace("load_corpus()", f"load_corpus({str(text_files)!r}, vocabulary_size=300)")
    small = small.replace("steps_per_epoch=1000", "steps_per_epoch=3")
    printed = run("import warnings; warnings.simplefilter('ignore')\n" + small, tmp_path).stdout
    assert "import os" in printed
    assert (tmp_path / "gpt.tflite").is_file()


def test_a_consumer_without_this_package_generates_the_same_text(trained, tmp_path):
    path = tfgptopt.export(trained, tmp_path / "gpt.tflite")
    (code,) = blocks("docs/tflite_format.md")
    assert "import tfgptopt" not in code
    printed = run("import sys; sys.modules['tfgptopt'] = None\n" + code, tmp_path).stdout
    lm = tfgptopt.TFLiteCausalLM(path)
    assert printed.rstrip("\n") == lm.generate("import os\n").rstrip("\n")


def test_the_examples_of_generation(trained, tmp_path):
    tfgptopt.export(trained, tmp_path / "gpt.tflite")
    code, *_ = blocks("docs/generation.md")  # The others run with a model for chats.
    small = re.sub(r"max_length=\d+", "max_length=24", code)
    printed = run("import sys; sys.modules['keras'] = None\n" + small, tmp_path).stdout
    assert printed.startswith("import os\n")


def test_the_examples_of_many_texts_and_saved_models(
    trained, corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks("docs/generation.md") if "batch_sizes" in block)
    exec(code, {"gpt": trained, "tfgptopt": tfgptopt})
    assert len(capsys.readouterr().out.splitlines()) >= 3
    tfgptopt.export(trained, "folder")
    (code,) = blocks("docs/saved_model.md")
    exec(code, {})
    (evaluating,) = blocks("docs/evaluation.md")
    tfgptopt.export(trained, "gpt.tflite")
    exec(evaluating, {"gpt": trained, "tfgptopt": tfgptopt, "corpus": corpus})
    (explaining,) = blocks("docs/explaining.md")
    exec(explaining, {"gpt": trained})
    assert f"(2, {trained.backbone.vocabulary_size})" in capsys.readouterr().out


# What the examples of techniques find: a model and data.
A_MODEL = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import make_gpt, random_batch
import tensorflow as tf, tfgptopt
gpt = make_gpt()
gpt.compile(optimizer="adam")
data = tf.data.Dataset.from_tensors(random_batch()).repeat(8)
"""


def test_the_example_of_pruning(tmp_path):
    code, penalized = blocks("docs/pruning.md")
    small = code.replace("begin_step=100, end_step=900, frequency=50", "begin_step=2, end_step=6")
    assert small != code
    small = small.replace("end_step=6", "end_step=6, frequency=1")
    printed = run(A_MODEL + small, tmp_path).stdout
    assert "50.0% zeros in pruned weights" in printed
    assert (tmp_path / "gpt.tflite").is_file()
    small = penalized.replace("begin_step=200, end_step=800, frequency=50", "begin_step=2")
    assert small != penalized
    run(A_MODEL + small + "\nprint(tfgptopt.pruning.report(gpt))", tmp_path)


def test_the_example_of_monitoring(tmp_path):
    (code,) = blocks("docs/monitoring.md")
    small = code.replace("port=9464", "port=0").replace("model.fit", "gpt.fit")
    assert small != code
    assert "'gradient_norm': " in run(A_MODEL + small, tmp_path).stdout
    assert len((tmp_path / "logs/metrics.jsonl").read_text().splitlines()) == 2


def test_the_examples_of_distillation_and_shrinking(tmp_path):
    live, recorded = blocks("docs/distillation.md")
    (shrinking,) = blocks("docs/shrinking.md")
    printed = run("\n".join((A_MODEL, live, recorded, shrinking)), tmp_path).stdout
    assert "1 layers, width 32, 2 heads of 16, 32 neurons" in printed
    assert (tmp_path / "student.tflite").is_file()
    assert (tmp_path / "teacher-says" / "recording.json").is_file()


def test_the_recipe_of_shrinking():
    page = (ROOT / "docs/shrinking.md").read_text("utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    recipe = tfgptopt.Recipe.from_config(yaml.safe_load(text))
    names = [type(technique).__name__ for technique in recipe.techniques]
    assert names == ["Shrink", "Distill", "Prune", "QuantizeAware"]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("STEPS", "40")
    notebook = nbformat.read(ROOT / "notebooks/quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(
        notebook,
        timeout=280,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


def test_what_contributing_shows_is_short_python():
    codes = blocks("CONTRIBUTING.md")
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
