import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tfgptopt
from tfgptopt.cli.main import run_command
from tfgptopt.exporting import LiteRTLM, TFLite
from tfgptopt.generation import MinP, Random, RepetitionPenalty, TopK, TopP


@dataclasses.dataclass
class Ended:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments) -> Ended:
    """Runs a command in this process, which has loaded TensorFlow already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command([str(argument) for argument in arguments])
    return Ended(code, out.getvalue(), err.getvalue())


def run_process(*arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tfgptopt.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def assert_refused(result, message: str) -> None:
    """One sentence, a non-zero exit, no traceback."""
    assert result.returncode == 1, result.stdout
    assert message in " ".join(result.stderr.split()), result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def preset(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preset") / "gpt"
    trained.save_to_preset(str(folder))
    return folder


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory) -> Path:
    return tfgptopt.export(trained, tmp_path_factory.mktemp("export") / "gpt.tflite")


def test_help_names_every_command():
    result = run_process("--help")
    assert result.returncode == 0
    for command in ("demo", "optimize", "quantize", "shrink", "export", "evaluate", "report",
                    "inspect", "generate", "chat", "serve", "monitoring", "bench", "advise",
                    "tune"):  # fmt: skip
        assert command in result.stdout


def test_a_process_says_no_more_than_a_sentence(tmp_path):
    result = run_process("evaluate", tmp_path / "none", "--text", "x")
    assert_refused(result, "There is no preset folder")
    assert len(result.stderr.strip().splitlines()) == 1 and result.stdout.strip() == ""


def test_advise_says_that_it_estimates(preset):
    for shape in (("--layers", 2, "--width", 64), ("--preset", preset)):
        result = run("advise", *shape)
        assert result.returncode == 0, result.stderr
        assert "Estimates, not measurements" in result.stdout and "int4:32" in result.stdout
    assert_refused(run("advise", "--layers", 2), "Give a shape: --layers and --width")
    assert_refused(run("advise", "--preset", "nowhere"), "has no config.json")


def test_a_wrong_option_is_exit_code_2():
    assert run("export", "--no-such-option").returncode == 2


@pytest.mark.slow
def test_optimize_does_the_whole_job_on_a_users_own_text(preset, text_files, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "techniques:\n"
        "- name: prune\n"
        "  schedule: {name: constant_sparsity, target_sparsity: 0.6, begin_step: 2, frequency: 2}\n"
        "- name: quantize_aware\n"
        "  spec: {name: int4}\n",
        "utf-8",
    )
    out = tmp_path / "out"
    command = ["optimize", text_files / "decoder.py", "--preset", preset, "--recipe", recipe]
    command += [
        "--dense-run",
        "--out",
        out,
        "--steps",
        12,
        "--sequence-length",
        16,
        "--batch-size",
        4,
        *("--optimizer", "adam", "--schedule", "wsd", "--accumulate", 2, "--find-learning-rate"),
    ]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    expected = {"model.tflite", "dense.tflite", "saved_model", "model", "recipe.yaml"}
    assert {path.name for path in out.iterdir()} == expected | {"report.html", "results.json"}
    found = json.loads((out / "results.json").read_text("utf-8"))
    assert [row["name"] for row in found["results"]] == [
        "dense Keras",
        "dense TFLite",
        "optimized Keras",
        "optimized TFLite",
    ]
    assert all(share >= 0.59 for share in found["training"]["sparsity"].values())
    assert len(found["training"]["noise"]) >= 13  # In dB, of each rounded weight.
    page = (out / "report.html").read_text("utf-8")
    # Front, curve and side by side, and how the weights of each place lie.
    assert page.count("<svg") == 3 + len(found["training"]["weights"]) > 3
    assert "The same prompts, continued" in page
    both = run("report", out / "results.json", out / "results.json", "--out", tmp_path / "two.html")
    assert both.returncode == 0, both.stderr
    assert "optimized TFLite (2)" in (tmp_path / "two.html").read_text("utf-8")
    assert "smaller" in both.stdout
    (tmp_path / "bad.json").write_text("{}")
    refused = run("report", tmp_path / "bad.json", "--out", tmp_path / "bad.html")
    assert_refused(refused, "schema None; this tfgptopt reads schema 2")
    assert not (tmp_path / "bad.html").exists()
    assert_refused(run(*command), "exists already")
    made = run("generate", out / "model.tflite", "import", "--max-length", 12)
    assert made.returncode == 0 and made.stdout.startswith("import")
    again = tmp_path / "again.tflite"
    result = run("export", out / "model", again, "--recipe", out / "recipe.yaml")
    assert result.returncode == 0, result.stderr
    first = tfgptopt.TFLiteCausalLM(out / "model.tflite").metadata.weights
    assert tfgptopt.TFLiteCausalLM(again).metadata.weights == first


@pytest.mark.slow
def test_demo_runs(tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--quick", "--bits", 4, "--out", out, "--strategy", "default")
    assert result.returncode == 0, result.stderr
    assert "Devices: default strategy, 1 replica" in result.stdout
    assert "bigram" in result.stdout and (out / "report.html").is_file()
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_generate_streams_and_repeats_with_a_seed(file):
    command = ["generate", file, "def ", "--sampler", "top_k", "--seed", 3, "--max-length", 20]
    first, second = run(*command), run(*command)
    assert first.returncode == 0 and first.stdout == second.stdout
    assert first.stdout.startswith("def ") and first.stderr == ""


def test_bench_compares_with_keras(file, preset):
    result = run("bench", file, "--preset", preset, "--runs", 1, "--new-tokens", 8)
    assert result.returncode == 0, result.stderr
    assert "tok/s" in result.stdout and "peak RSS" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_generate_combines_sampler_options_and_stops(file):
    command = ["generate", file, "def ", "--max-length", 20, "--seed", 3]
    options = ["--temperature", 0.7, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01]
    first = run(*command, *options, "--repetition-penalty", 1.3)
    assert first.returncode == 0 and first.stdout.startswith("def ")
    lm = tfgptopt.TFLiteCausalLM(file)
    chain = [RepetitionPenalty(1.3), Random(0.7), TopK(9), TopP(0.9), MinP(0.01)]
    assert first.stdout == lm.generate("def ", 20, chain, seed=3) + "\n"
    whole = lm.generate("def ", 20)
    stopped = run(*command, "--stop", whole[8:10])
    assert stopped.stdout == whole[:4] + whole[4:].split(whole[8:10])[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{tmp}/none.tflite", "x"], "There is no file"),
        (["generate", "{file}", "x", "--max-length", "999"], "`max_length` counts the prompt"),
        (["generate", "{file}", "x", "--sampler", "beam"], "must be one of greedy, random, top_k"),
        (["export", "{tmp}/no/preset", "{tmp}/x.tflite"], "There is no preset folder"),
        (["export", "{tmp}", "{tmp}/x.tflite"], "has no config.json"),
        (["export", "{preset}", "{file}"], "exists already"),
        (
            ["export", "{preset}", "{tmp}/x.tflite", "--context-length", "999"],
            "an int from 2 to 32",
        ),
        (["optimize", "{tmp}/none.txt", "--preset", "{preset}"], "is no text file"),
        (["optimize", "{file}", "--preset", "{preset}"], "is not text"),
        (["demo", "--strategy", "gpu", "--out", "{tmp}/d"], "must be one of auto"),
        (["optimize", "{file}", "--preset", "x", "--optimizer", "adamm"], "must be one of adamw"),
        (["optimize", "{file}", "--preset", "x", "--schedule", "wds"], "must be one of cosine"),
        (["demo", "--bits", "3", "--out", "{tmp}/d"], "--bits must be 4 or 8"),
        (["demo", "--sparsity", "1.0", "--out", "{tmp}/d"], "range [0,1)"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else value[:24],
)
def test_mistakes_are_one_sentence(arguments, message, file, preset, tmp_path):
    filled = [a.format(tmp=tmp_path, file=file, preset=preset) for a in arguments]
    assert_refused(run(*filled), message)
    assert list(tmp_path.iterdir()) == []


def test_a_preset_without_weights(preset, tmp_path):
    (tmp_path / "config.json").write_bytes((preset / "config.json").read_bytes())
    assert_refused(run("export", tmp_path, tmp_path / "x.tflite"), "has no weights")


def test_a_bundle_for_phones_is_exported_and_read(preset, tmp_path):
    path = tmp_path / "gpt.litertlm"
    result = run("export", preset, path, "--context-length", 24)
    assert result.returncode == 0, result.stderr
    result = run("inspect", path)
    assert "24 tokens" in result.stdout and "prefill_1, prefill_24" in result.stdout
    result = run("generate", path, "import", "--max-length", 12)
    assert result.returncode == 0 and result.stdout.startswith("import")
    refused = run("export", preset, tmp_path / "b.litertlm", "--sparse")
    assert_refused(refused, "stands for LiteRTLM, which has no setting `sparse`")


def test_export_offers_every_setting_of_the_formats(tmp_path):
    words = " ".join(run("export", "--help").stdout.split())
    for field in (*dataclasses.fields(TFLite), *dataclasses.fields(LiteRTLM)):
        assert f"--{field.name.replace('_', '-')}" in words
    result = run("export", "no/preset", tmp_path / "folder", "--cache-dtype", "int8")
    assert_refused(result, "stands for SavedModel, which has no setting `cache_dtype`, none.")
    result = run("export", "no/preset", tmp_path / "a.tflite", "--cache-dtype", "int4")
    assert_refused(result, "`cache_dtype` must be one of")


def test_settings_of_a_format_reach_the_file(preset, tmp_path):
    path = tmp_path / "gpt.tflite"
    (tmp_path / "turns.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    options = ("--context-length", 24, "--cache-dtype", "int8")
    result = run("export", preset, path, *options, "--chat-template", tmp_path / "turns.jinja")
    assert result.returncode == 0, result.stderr
    metadata = tfgptopt.TFLiteCausalLM(path).metadata
    assert metadata.chat.template.startswith("{% for m in messages")
    decoder = metadata.decoder
    assert (decoder.context_length, decoder.cache_dtype) == (24, "int8")


def test_generate_holds_to_a_form(file, tmp_path):
    made = run("generate", file, "x = ", "--regex", "[0-9]{3}")
    assert made.returncode == 0 and made.stdout[4:-1].isdigit() and len(made.stdout) == 8
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [1, 22]}')
    made = run("generate", file, "x = ", "--json-schema", schema, "--speculative", "auto")
    assert made.stdout.split()[-1] in ("1", "22")
    both = run("generate", file, "x", "--regex", "a", "--json-schema", schema)
    assert_refused(both, "not both")
    assert_refused(run("generate", file, "x", "--speculative", "fast"), "'auto', NGram")
