import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_pyproject_lists_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    found = {
        str(path.parent.relative_to(ROOT)).replace(os.sep, ".")
        for path in (ROOT / "tfgptopt").rglob("__init__.py")
    }
    assert set(settings["packages"]) == found | {"tfgptopt.callbacks"}
    assert settings["package-dir"]["tfgptopt.callbacks"] == "callbacks"


def test_import_is_cheap_silent_and_changes_nothing():
    code = """
import os, sys, time, logging
import keras_hub
before = dict(os.environ), logging.root.handlers[:], logging.root.level
start = time.perf_counter()
import tfgptopt
took = time.perf_counter() - start
assert (dict(os.environ), logging.root.handlers[:], logging.root.level) == before
assert took < 0.3, took
import tfgptopt.callbacks, tfgptopt.data, tfgptopt.exporting
assert dict(os.environ) == before[0]
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert run("import tfgptopt").stderr == ""


def test_the_runtime_needs_no_more_than_its_requirements(trained, tmp_path):
    import tfgptopt

    file = tfgptopt.export(trained, tmp_path / "gpt.tflite")
    alone = tmp_path / "packages"
    alone.mkdir()
    (alone / "tfgptopt").symlink_to(ROOT / "tfgptopt")
    lines = (ROOT / "requirements-runtime.txt").read_text("utf-8").splitlines()
    for requirement in (Requirement(line) for line in lines if not line.startswith("#")):
        for path in metadata.files(requirement.name):
            top = alone / path.parts[0]
            if path.parts[0] not in ("..", "__pycache__") and not top.exists():
                top.symlink_to(metadata.distribution(requirement.name).locate_file(path.parts[0]))
    code = f"""
import sys; sys.path[:] = [p for p in sys.path if "site-packages" not in p] + [{str(alone)!r}]
import tfgptopt
lm = tfgptopt.TFLiteCausalLM({str(file)!r})
print(lm.generate("import os\\n", max_length=24), end="")
assert lm.chat(template="chatml").messages == []
"""
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == tfgptopt.TFLiteCausalLM(file).generate("import os\n", max_length=24)


def test_doctor_says_what_is_missing(monkeypatch, capsys):
    from tfgptopt.cli.main import run_command
    from tfgptopt.job import doctor

    assert run_command(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "tensorflow" in shown and "All is well." in shown
    found = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "keras" else found(name))
    monkeypatch.setenv("TFGPTOPT_WEIGHT_CACHE", "/proc/nowhere")
    problems = {finding.name: finding.problem for finding in doctor.examine() if finding.problem}
    assert "pip install 'keras>=3.15'" in problems["keras"]
    assert "start Python" in problems["keras"]
    assert "set TFGPTOPT_WEIGHT_CACHE to another folder" in problems["cache of packed weights"]
    assert run_command(["doctor"]) == 1


def test_another_backend_is_named_with_what_to_do(tmp_path):
    warned = run("import tfgptopt", KERAS_BACKEND="jax")
    assert "its backend is 'jax'" in warned.stderr and "KERAS_BACKEND=tensorflow" in warned.stderr
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "torch"}), "utf-8")
    warned = run("import tfgptopt", KERAS_HOME=str(tmp_path), KERAS_BACKEND="")
    assert "its backend is 'torch'" in warned.stderr
    refused = run("from tfgptopt.backend import require_tensorflow as r; r()", KERAS_BACKEND="jax")
    assert "ImportError" in refused.stderr


def test_keras_nlp_models_are_kerashubs():
    code = (
        "import keras_nlp, keras_hub;"
        "assert keras_nlp.models.GPT2CausalLM is keras_hub.models.GPT2CausalLM"
    )
    assert run(code).returncode == 0


def test_public_names_resolve():
    import tfgptopt

    for name in tfgptopt.__all__:
        assert getattr(tfgptopt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tfgptopt.nothing


@pytest.mark.slow
def test_a_wheel_holds_everything_and_passes_twine(tmp_path):
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "tfgptopt/callbacks/pruning.py",
        "tfgptopt/job/report.html.jinja",
        "tfgptopt/py.typed",
    ):
        assert name in names
    files = [str(path) for path in tmp_path.iterdir()]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
