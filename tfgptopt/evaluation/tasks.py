"""Tasks: multiple choice by log-likelihood, and answers compared with references."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tfgptopt.evaluation.artifacts import Artifact
from tfgptopt.evaluation.likelihoods import encode_pair, log_likelihood
from tfgptopt.evaluation.meteor import has_wordnet, meteor_scores
from tfgptopt.terminal.progress import track

_SAMPLES = 1000
_ALIKE = 32
Items = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Score:
    """What an artifact reached in a task.

    Attributes:
        items: How many questions or prompts there were.
        numbers: Names to numbers.
        intervals: Of them, where questions drawn anew would put 95 % (bootstrap), as far as a
            number is a mean over questions.
    """

    items: int
    numbers: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Task(Protocol):
    """Something to be done by an artifact, and scored.

    Attributes:
        name: What it is called in tables.
    """

    @property
    def name(self) -> str:
        """What it is called in tables."""

    def score(self, artifact: Artifact) -> Score:
        """Returns what an artifact reaches."""


@dataclass(frozen=True)
class MultipleChoice:
    """Questions whose answer is the likeliest of several, as lm-evaluation-harness defines it.

    A choice stands behind the question and a space. `accuracy` takes the choice of the largest
    log-likelihood, `accuracy_norm` that of the largest one divided by the number of characters of
    the choice (`acc` and `acc_norm` there).

    Args:
        name: What it is called in tables.
        items: Each with `question`, `choices` (texts) and `answer` (the number of the right one,
            from 0, or its text).
        delimiter: Between question and choice. Defaults to `" "`.

    Raises:
        ValueError: If there are no items, or one lacks a field or has an answer that is none of
            its choices.

    Example:

    ```python
    from tfgptopt.evaluation.artifacts import open_artifact
    from tfgptopt.evaluation.tasks import MultipleChoice

    item = {"question": "import", "choices": ["os", "banana"], "answer": "os"}
    print(MultipleChoice("modules", [item]).score(open_artifact("gpt.tflite")).numbers)
    ```

    Reference: Gao et al., 2024, "The Language Model Evaluation Harness".
    """

    name: str
    items: Items
    delimiter: str = " "

    def __post_init__(self) -> None:
        checked = [_choice(item, f"{self.name}, item {i}") for i, item in enumerate(self.items, 1)]
        if not checked:
            raise ValueError(f"'{self.name}' has no questions.")
        object.__setattr__(self, "items", tuple(checked))

    def score(self, artifact: Artifact) -> Score:
        """Returns the accuracies of an artifact."""
        right = []
        for item in track(self.items, f"Asking {self.name}"):
            logs = []
            for choice in item["choices"]:
                pair = encode_pair(artifact, item["question"], self.delimiter + choice)
                logs.append(log_likelihood(artifact, *pair)[0])
            lengths = np.asarray([len(choice) for choice in item["choices"]])
            found = (int(np.argmax(logs)), int(np.argmax(np.asarray(logs) / lengths)))
            right.append([choice == item["answer"] for choice in found])
        return _mean_score({"accuracy": 0, "accuracy_norm": 1}, np.asarray(right, float))


@dataclass(frozen=True)
class References:
    """Greedy continuations of prompts, compared with references.

    `bleu`, `chrf` and `ter` are sacrebleu's of the whole, `rouge1`, `rouge2` and `rougeL` mean
    F-measures of rouge-score, `meteor` nltk's mean, the best of a prompt's references each. There
    is no `meteor` unless nltk's data of WordNet are installed: `python -m nltk.downloader wordnet`.

    Args:
        name: What it is called in tables.
        items: Each with `prompt` and `references` (texts).
        max_new_tokens: int. Most tokens of an answer. Defaults to `64`.

    Raises:
        ValueError: If there are no items, one lacks a field, or they do not have the same number of
            references.

    Reference: Post, 2018, "A Call for Clarity in Reporting BLEU Scores"; Lin, 2004, "ROUGE".
    """

    name: str
    items: Items
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        checked = [_answer(item, f"{self.name}, item {i}") for i, item in enumerate(self.items, 1)]
        if not checked:
            raise ValueError(f"'{self.name}' has no prompts.")
        counts = sorted({len(item["references"]) for item in checked})
        if len(counts) > 1:
            raise ValueError(
                f"'{self.name}' has prompts of {counts[0]} and of {counts[-1]} references: BLEU "
                "wants as many of each."
            )
        object.__setattr__(self, "items", tuple(checked))

    def score(self, artifact: Artifact) -> Score:
        """Returns how close an artifact's answers are to the references.

        Raises:
            ImportError: If sacrebleu or rouge-score is not installed.
        """
        answers = [
            continuation(artifact, item["prompt"], self.max_new_tokens)
            for item in track(self.items, f"Answering {self.name}")
        ]
        return compare_texts(answers, [item["references"] for item in self.items])


def compare_texts(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Returns how close texts are to references.

    Args:
        answers: Texts.
        references: References of each, as many of each.

    Raises:
        ImportError: If sacrebleu or rouge-score is not installed.
        ValueError: If there are not as many references as texts.
    """
    if len(answers) != len(references):
        raise ValueError(
            f"References do not match: {len(answers)} texts, {len(references)} with references."
        )
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF, TER
    except ImportError:
        raise ImportError(
            "Comparing with references needs sacrebleu and rouge-score: "
            "pip install 'tfgptopt[evaluation]'."
        ) from None
    streams = [list(stream) for stream in zip(*references, strict=True)]
    metrics = {"bleu": BLEU(), "chrf": CHRF(), "ter": TER()}
    numbers = {n: float(m.corpus_score(list(answers), streams).score) for n, m in metrics.items()}
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds)
    meteor = meteor_scores(answers, references) if has_wordnet() else []
    rows = []
    for answer, known in zip(answers, references, strict=True):
        best = scorer.score_multi(list(known), answer)
        rows.append([best[kind].fmeasure for kind in kinds])
    if meteor:
        kinds, rows = [*kinds, "meteor"], [[*r, m] for r, m in zip(rows, meteor, strict=True)]
    means = _mean_score({kind: i for i, kind in enumerate(kinds)}, np.asarray(rows))
    return Score(len(answers), {**numbers, **means.numbers}, means.intervals)


def continuation(artifact: Artifact, prompt: str, new_tokens: int) -> str:
    """Returns the greedy continuation of a text, cut where the context ends.

    Raises:
        ValueError: If the artifact has no tokenizer, or the prompt has no token.
    """
    if artifact.tokenizer is None:
        raise ValueError("The artifact has no tokenizer, so that it cannot read a prompt.")
    begin = [] if artifact.start_token_id is None else [artifact.start_token_id]
    ids = [*begin, *artifact.tokenizer.encode(prompt, False)]
    most = artifact.context_length
    if most is not None:
        new_tokens = min(new_tokens, most // 2)
        ids = ids[-(most - new_tokens) :]
    if not ids:
        raise ValueError(f"The prompt {prompt!r} is empty to the tokenizer: it has no ids.")
    room = -(len(ids) + new_tokens) % _ALIKE  # Keras compiles each length anew.
    made = artifact.generation(
        ids, new_tokens + (room if most is None or len(ids) + new_tokens + room <= most else 0)
    )()
    return artifact.tokenizer.decode(made[:new_tokens])


def read_task(path: str | Path) -> MultipleChoice | References:
    """Reads a task from JSON Lines: `question`, `choices`, `answer`, or `prompt`, `references`.

    Args:
        path: The file, whose name is that of the task.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no JSON, or items lack fields.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    items = list(_lines(path))
    kind: Callable[..., MultipleChoice | References]
    kind = References if items and "references" in items[0] else MultipleChoice
    return kind(path.stem, items)


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.strip():
            try:
                item = json.loads(line)
            except ValueError as error:
                raise ValueError(f"'{path}', line {number}, is no JSON: {error}") from None
            if not isinstance(item, dict):
                raise ValueError(f"'{path}', line {number}: expected an object. Received: {item!r}")
            yield item


def _choice(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a question with the number of its answer.

    Raises:
        ValueError: If it is none.
    """
    choices: Any = item.get("choices")
    answer = item.get("answer")
    if not isinstance(item.get("question"), str) or not _are_texts(choices):
        raise ValueError(f"{where}: expected `question`, `choices` and `answer`. Received: {item}")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(
            f"{where}: `answer` must be one of the choices, or its number from 0 to "
            f"{len(choices) - 1}. Received: {answer!r}"
        )
    return {"question": item["question"], "choices": list(choices), "answer": answer}


def _answer(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a prompt with its references.

    Raises:
        ValueError: If it is none.
    """
    known: Any = item.get("references")
    known = [known] if isinstance(known, str) else known
    if not isinstance(item.get("prompt"), str) or not _are_texts(known):
        raise ValueError(f"{where}: expected `prompt` and `references`. Received: {item}")
    return {"prompt": item["prompt"], "references": list(known)}


def _are_texts(values: Any) -> bool:
    return bool(isinstance(values, list | tuple) and values) and all(
        isinstance(value, str) and value for value in values
    )


def _mean_score(columns: Mapping[str, int], rows: np.ndarray) -> Score:
    """Returns the means of columns, with intervals."""
    drawn = np.random.default_rng(0).integers(0, len(rows), (_SAMPLES, len(rows)))
    numbers, intervals = {}, {}
    for name, column in columns.items():
        numbers[name] = float(rows[:, column].mean())
        low, high = np.percentile(rows[drawn, column].mean(1), (2.5, 97.5))
        intervals[name] = (float(low), float(high))
    return Score(len(rows), numbers, intervals)
