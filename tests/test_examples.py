"""Runs the examples of docstrings, each on a tiny model and a tiny text."""

from __future__ import annotations

import ast
import dataclasses
import re
import shutil
import textwrap
import warnings
from typing import ClassVar

import keras
import keras_hub
import numpy
import pytest
from ai_edge_litert import schema_py_generated as schema
from shown import names_of, small_gpt
from test_house import MODULES

import tfgptopt
from tfgptopt import families
from tfgptopt.exporting import formats
from tfgptopt.file import number_types
from tfgptopt.quantization import specs

_BLOCK = re.compile(r"```python\n(.*?)```", re.S)
# What examples use as if it had been imported.
_ROOMS = (
    "exporting",
    "file.number_types",
    "callbacks",
    "pruning",
    "quantization",
    "distillation",
    "model.changing",
    "recipe",
)
# Large numbers of examples, for which a tiny model has no room.
_SMALLER = {
    "context_length=512": "context_length=64",
    "context_length=256": "context_length=64",
    "vocabulary_size=2048": "vocabulary_size=300",
    "max_length=64": "max_length=48",
    "depth=6": "depth=1",
}


# What examples register is forgotten behind them.
REGISTRIES = [
    (specs, "_by_name"),
    (formats, "_by_suffix"),
    (number_types, "_by_bits"),
    (families, "_LAYOUTS"),
]


def examples() -> dict[str, str]:
    """Returns the examples by the names of what they are examples of."""
    found = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for i, code in enumerate(_BLOCK.findall(ast.get_docstring(node) or "")):
                    found[f"{module}.{node.name}" + f"-{i}" * bool(i)] = textwrap.dedent(code)
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def lm(shown_folder):
    return tfgptopt.TFLiteCausalLM(shown_folder / "gpt.tflite")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, few_windows, shown_folder, lm, tmp_path, monkeypatch):
    shutil.copytree(shown_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for module, registry in REGISTRIES:
        monkeypatch.setattr(module, registry, dict(getattr(module, registry)))
    code = EXAMPLES[name]
    for large, small in _SMALLER.items():
        code = code.replace(large, small)
    if "export(" in code:
        (tmp_path / "gpt.tflite").unlink()
    lm.reset()
    gpt = None
    if re.search(r"\b(gpt|model|layer)\b", code):
        gpt = small_gpt(few_windows, 2 if "shrink" in name else 1)
    names = names_of(gpt, few_windows, lm) | {
        "ClassVar": ClassVar,
        "dataclasses": dataclasses,
        "numpy": numpy,
        "schema": schema,
        "layer": gpt and gpt.layers[-1],
        "MyBackbone": type("MyBackbone", (keras.Model,), {}),
        "MyAttention": type("MyAttention", (keras.layers.Layer,), {}),
    }
    for room in (*_ROOMS, name.rpartition(".")[0].removeprefix("tfgptopt.")):
        exec(f"from tfgptopt.{room} import *", names)
    if gpt is not None and ".generate(" in code and "export(" in code:
        gpt.preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(few_windows.tokenizer)
    if "student" in code:
        names |= {"student": small_gpt(few_windows), "teacher": small_gpt(few_windows, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, name, "exec"), names)
