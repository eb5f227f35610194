"""Tasks, against their formulas and the libraries called by hand."""

import json
import math
import shutil
import sys

import keras_hub
import numpy as np
import pytest
from conftest import make_gpt
from evaluation.test_artifacts import logs_of

import tfgptopt
from tfgptopt.evaluation import open_artifact
from tfgptopt.evaluation.meteor import meteor_scores
from tfgptopt.evaluation.tasks import MultipleChoice, References, compare_texts, read_task

ITEMS = [
    {"question": "import", "choices": ["os", "sys, re", "x"], "answer": 1},
    {"question": "def f", "choices": ["(a):", "return"], "answer": "return"},
    {"question": "class A: ", "choices": ["pass", "def g(self): return 1"], "answer": 0},
    {"question": "", "choices": ["if x", "else"], "answer": 0},
]


@pytest.fixture(scope="module")
def gpt(corpus):
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        corpus.tokenizer, sequence_length=32, add_start_token=False
    )
    return make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)


def test_choices_are_those_of_the_formula(gpt, tmp_path):
    encode = open_artifact(gpt).tokenizer.encode
    right = []
    for item in ITEMS:
        logs, norms = [], []
        for choice in item["choices"]:
            context = encode(item["question"].rstrip(), False) if item["question"] else []
            spaces = item["question"][len(item["question"].rstrip()) :]
            whole = encode(item["question"].rstrip() + spaces + " " + choice, False)
            first = max(len(context), 1)
            found = logs_of(gpt, whole)
            logs.append(sum(found[i - 1, whole[i]] for i in range(first, len(whole))))
            norms.append(logs[-1] / len(choice))
        answer = item["answer"]
        answer = item["choices"].index(answer) if isinstance(answer, str) else answer
        right.append((np.argmax(logs) == answer, np.argmax(norms) == answer))
    expected = np.mean(right, 0)
    path = tmp_path / "code.jsonl"
    path.write_text("\n".join(map(json.dumps, ITEMS)) + "\n")
    task = read_task(path)
    file = tfgptopt.export(gpt, tmp_path / "gpt.tflite")
    for model in (gpt, file):
        score = task.score(open_artifact(model))
        assert task.name == "code" and score.items == 4
        assert [score.numbers["accuracy"], score.numbers["accuracy_norm"]] == expected.tolist()
        low, high = score.intervals["accuracy"]
        assert 0 <= low <= score.numbers["accuracy"] <= high <= 1


def test_long_contexts_are_cut_at_their_beginning(gpt):
    from tfgptopt.evaluation.likelihoods import log_likelihood

    ids = np.random.default_rng(0).integers(0, 300, 50).tolist()
    found, greedy = log_likelihood(open_artifact(gpt), ids[:40], ids[40:])
    logs = logs_of(gpt, ids[50 - 33 : -1])
    expected = sum(logs[-10 + i, token] for i, token in enumerate(ids[40:]))
    assert found == pytest.approx(expected, rel=1e-5) and greedy is False


def test_references_are_compared_as_the_papers_say():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat today", "a dog"]
    known = [["the cat sat on the red mat today"], ["a big dog"]]
    score = compare_texts(answers, known)
    streams = [["the cat sat on the red mat today", "a big dog"]]
    assert score.numbers["bleu"] == sacrebleu.corpus_bleu(answers, streams).score
    # TER by hand: a word is missing from each of the two, of eleven.
    assert score.numbers["ter"] == pytest.approx(100 * 2 / 11)
    # ROUGE-1 by hand: 7 of 7 and 8 words; 2 of 2 and 3.
    f_measures = [2 * 7 / (7 + 8), 2 * 2 / (2 + 3)]
    assert score.numbers["rouge1"] == pytest.approx(np.mean(f_measures))
    assert score.numbers["chrf"] > 50 and math.isfinite(score.numbers["rougeL"])
    with pytest.raises(ValueError, match="References do not match: 1 texts, 2 with"):
        compare_texts(answers[:1], known)


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """A WordNet of one meaning, `big` and `great`, in the place of nltk's."""
    corpus = pytest.importorskip("nltk.corpus")
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for name in WordNetCorpusReader._FILES:
        (folder / name).touch()
    (folder / "data.adj").write_text("00000000 00 a 02 big 0 great 0 000 | not small  \n")
    (folder / "index.adj").write_text(
        "".join(f"{w} a 1 0 1 0 00000000  \n" for w in ("big", "large"))
    )
    (folder / "lexnames").write_text("00\tadj.all\t3\n")
    lazy = LazyCorpusLoader("wordnet", WordNetCorpusReader, None)
    monkeypatch.setattr(corpus, "wordnet", lazy)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    return folder


def test_meteor_is_the_formula_of_words_stems_and_synonyms(wordnet):
    pairs = (["the big dog runs fast"], [["the great dog running fast"]])
    # By hand: all five words match, in one chunk: 1 - 0.5 * (1 / 5) ** 3.
    assert meteor_scores(*pairs) == [pytest.approx(1 - 0.5 * (1 / 5) ** 3)]
    # Without synonyms, four of five in two chunks: F = 0.8.
    expected = 0.8 * (1 - 0.5 * (2 / 4) ** 3)
    assert meteor_scores(*pairs, wordnet=False) == [pytest.approx(expected)]
    pytest.importorskip("sacrebleu")
    score = compare_texts(*pairs)
    assert score.numbers["meteor"] == pytest.approx(0.996) and "meteor" in score.intervals


def test_meteor_says_what_it_lacks(wordnet, monkeypatch):
    shutil.rmtree(wordnet)
    with pytest.raises(FileNotFoundError, match=r"python -m nltk\.downloader wordnet"):
        meteor_scores(["a"], [["a"]])
    pytest.importorskip("sacrebleu")
    assert "meteor" not in compare_texts(["a"], [["a"]]).numbers
    monkeypatch.setitem(sys.modules, "nltk.translate.meteor_score", None)
    with pytest.raises(ImportError, match=r"tfgptopt\[evaluation\]"):
        meteor_scores(["a"], [["a"]])


def test_an_artifact_answers_prompts(gpt):
    pytest.importorskip("sacrebleu")
    artifact = open_artifact(gpt)
    made = artifact.generation(artifact.tokenizer.encode("import", False), 8)()
    task = References("r", [{"prompt": "import", "references": artifact.tokenizer.decode(made)}], 8)
    assert task.score(artifact).numbers["rougeL"] in (0, pytest.approx(1))
    assert task.score(artifact).numbers["chrf"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"question": "a", "choices": ["b"], "answer": 1}, "from 0 to 0. Received: 1"),
        ({"question": "a", "choices": ["b"], "answer": "c"}, "one of the choices"),
        ({"question": "a", "choices": [], "answer": 0}, "expected `question`, `choices`"),
        ({"choices": ["b"], "answer": 0}, "expected `question`, `choices`"),
        ({"prompt": 3, "references": ["b"]}, "expected `prompt` and `references`"),
    ],
)
def test_bad_items(item, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(item))
    with pytest.raises(ValueError, match=f"t, item 1: .*{message}"):
        read_task(tmp_path / "t.jsonl")


def test_bad_tasks(gpt, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\nnope\n')
    with pytest.raises(ValueError, match="line 2, is no JSON"):
        read_task(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match="of 1 and of 2 references"):
        References("r", [{"prompt": "a", "references": ["b"]},
                         {"prompt": "a", "references": ["b", "c"]}])  # fmt: skip
    with pytest.raises(ValueError, match="no questions"):
        MultipleChoice("m", [])
    with pytest.raises(ValueError, match="no tokenizer"):
        MultipleChoice("m", ITEMS[:1]).score(open_artifact(make_gpt()))
