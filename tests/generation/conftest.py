"""A file of the small trained GPT, with its tokenizer."""

import pytest

import tfgptopt
from tfgptopt.generation import TFLiteCausalLM


@pytest.fixture(scope="session")
def path(trained, tmp_path_factory):
    return tfgptopt.export(trained, tmp_path_factory.mktemp("export") / "gpt.tflite")


@pytest.fixture(scope="session")
def lm(path):
    return TFLiteCausalLM(path)
