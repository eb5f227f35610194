"""The numbers of lm-evaluation-harness itself, on a small local task."""

import json

import keras_hub
import pytest
from conftest import make_gpt
from evaluation.test_tasks import ITEMS

from tfgptopt.evaluation import open_artifact
from tfgptopt.evaluation.tasks import read_task

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed (extra `harness`)"
)

TASK = """
task: local_code
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
- metric: acc
- metric: acc_norm
"""


def test_accuracies_are_those_of_the_harness(corpus, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    from tfgptopt.evaluation.harness import HarnessLM

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        corpus.tokenizer, sequence_length=32, add_start_token=False
    )
    artifact = open_artifact(make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor))
    words = ["os", "return", "x = 1, 2", "def f(self):", "class", "import sys"]
    items = [item for item in ITEMS if item["question"] and isinstance(item["answer"], int)]
    items += [
        {"question": f"{a} {b}", "choices": [c, a, b], "answer": i % 3}
        for i, (a, b, c) in enumerate(zip(words, words[1:], words[2:], strict=False))
    ]
    path = tmp_path / "local.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "task.yaml").write_text(TASK.format(path=path))
    found = lm_eval.simple_evaluate(
        HarnessLM(artifact),
        tasks=["local_code"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["local_code"]
    own = read_task(path).score(artifact).numbers
    assert own["accuracy"] == pytest.approx(found["acc,none"])
    assert own["accuracy_norm"] == pytest.approx(found["acc_norm,none"])
