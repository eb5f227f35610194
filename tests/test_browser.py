"""The page of examples/browser in headless Chromium; skipped where it or Node.js is absent."""

import os
import shutil
import subprocess
from pathlib import Path

import keras
import keras_hub
import pytest
from conftest import make_gpt

import tfgptopt
from tfgptopt.exporting import TFLite
from tfgptopt.quantization import Int8

EXAMPLE = Path(__file__).parent.parent / "examples" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A copy of the example with what it needs from npm."""
    folder = tmp_path_factory.mktemp("browser") / "page"
    shutil.copytree(EXAMPLE, folder)
    if not (folder / "node_modules").is_dir():
        npm = shutil.which("npm") or "npm"
        command = [npm, "install", "--fetch-retries=0", "--no-audit", "--no-fund"]
        try:
            subprocess.run(command, cwd=folder, timeout=60, check=True, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"npm cannot install what the page needs: {error}")
    return folder


def opened(page, prompt, length):
    """Returns what a browser shows of the page, as a process that has ended."""
    return subprocess.run(
        ["node", "test.js", prompt, str(length)],
        cwd=page,
        env={**os.environ, "CHROMIUM": CHROMIUM},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed.")
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed.")
def test_a_page_generates_what_the_runtime_does(page, corpus):
    keras.utils.set_random_seed(3)
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(corpus.tokenizer, sequence_length=48)
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor, context=48)
    model.backbone.token_embedding.embeddings.assign(
        keras.random.normal(model.backbone.token_embedding.embeddings.shape, stddev=0.5)
    )
    tfgptopt.quantize(model, Int8(), verbose=0)
    path = tfgptopt.export(model, page / "gpt.tflite", overwrite=True, verbose=0)
    lm = tfgptopt.TFLiteCausalLM(path)
    prompt = "def näme(\n"
    expected = lm.generate(prompt, max_length=len(lm.tokenize(prompt)) + 32)
    result = opened(page, prompt, len(lm.tokenize(prompt)) + 32)
    assert result.returncode == 0, result.stderr
    assert len(set(expected)) > 5
    assert result.stdout.rstrip("\ufffd") == expected.rstrip("\ufffd")
    int8 = TFLite(cache_dtype="int8")
    tfgptopt.export(model, page / "gpt.tflite", int8, overwrite=True, verbose=0)
    assert "gpt.tflite has int8 caches" in opened(page, prompt, 8).stderr
