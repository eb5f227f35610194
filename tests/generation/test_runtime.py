import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import CONTEXT

import tfgptopt
from tfgptopt.generation import Greedy, TFLiteCausalLM, TopK


@pytest.fixture(scope="module")
def path(trained, tmp_path_factory):
    return tfgptopt.export(trained, tmp_path_factory.mktemp("export") / "gpt.tflite")


@pytest.fixture(scope="module")
def lm(path):
    return TFLiteCausalLM(path)


PROMPT = "def scan(\n"


def test_tokenizer_is_kerashubs(lm, trained):
    text = 'import re\nclass JSONDecodeError(ValueError):\n    """Søme ünïcode: 漢字 🙂"""\n'
    assert lm.tokenize(text) == list(trained.preprocessor.tokenizer(text))
    assert lm.detokenize(lm.tokenize(text)) == text


def test_text_in_text_out_as_kerashub_does(lm, trained):
    assert lm.generate(PROMPT, max_length=CONTEXT) == trained.generate(PROMPT, max_length=CONTEXT)
    stripped = lm.generate(PROMPT, max_length=CONTEXT, strip_prompt=True)
    assert PROMPT + stripped == lm.generate(PROMPT, max_length=CONTEXT)


def test_lists_give_lists_and_ids_give_ids(lm):
    prompts = [PROMPT, "import"]
    texts = lm.generate(prompts, max_length=CONTEXT)
    assert texts == [lm.generate(prompt, max_length=CONTEXT) for prompt in prompts]
    ids = [5, 6, 7]
    made = lm.generate(ids, max_length=10, stop=None)
    assert made[:3] == ids and len(made) == 10
    assert lm.generate([ids], max_length=10, stop=None) == [made]
    assert lm.generate(ids, max_length=10, stop=None, strip_prompt=True) == made[3:]
    assert lm.generate(np.asarray(ids), max_length=10, stop=None) == made


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32])
def test_prompts_of_any_length_up_to_the_context(lm, length):
    tokens = (list(range(1, 30)) * 2)[:length]
    logits = lm._engine.score(tokens)
    lm._engine.prefill(tokens[:-1])
    np.testing.assert_allclose(
        lm._engine.decode(tokens[-1], length - 1), logits[-1], atol=0.05 * logits.std()
    )
    assert lm.generate(tokens, stop=None)[:length] == tokens


def test_stops_at_a_token(lm):
    ids = [5, 6, 7]
    made = lm.generate(ids, max_length=20, stop=None)
    assert lm.generate(ids, max_length=20, stop=[made[5]]) == made[: made.index(made[5], 3)]


def test_stream_is_generate_piece_by_piece(lm):
    pieces = list(lm.stream(PROMPT, max_length=CONTEXT))
    assert len(pieces) > 3
    assert PROMPT + "".join(pieces) == lm.generate(PROMPT, max_length=CONTEXT)


def test_stream_never_yields_half_a_character(lm):
    tokens = iter(lm.tokenize("é漢🙂!"))
    assert list(lm._decode_stream(tokens)) == ["é", "漢", "🙂", "!"]


def test_top_k_draws_from_the_most_likely_and_repeats_with_a_seed(lm):
    logits = np.log(np.asarray([0.5, 0.25, 0.15, 0.1], np.float32))
    generator = np.random.default_rng(0)
    draws = [TopK(2)(logits, generator) for _ in range(4000)]
    assert set(draws) == {0, 1}
    assert np.mean(np.asarray(draws) == 0) == pytest.approx(2 / 3, abs=0.03)
    hot = [TopK(4, temperature=0.25)(logits, generator) for _ in range(4000)]
    weights = np.asarray([0.5, 0.25, 0.15, 0.1]) ** 4
    assert np.mean(np.asarray(hot) == 0) == pytest.approx(weights[0] / weights.sum(), abs=0.03)
    assert Greedy()(logits, generator) == 0
    first = lm.generate(PROMPT, sampler="top_k", seed=7)
    assert first == lm.generate(PROMPT, sampler=TopK(5), seed=7)


def test_score_is_the_log_softmax_of_the_dressed_model(lm, trained):
    text = "import re\n"
    ids = [lm.metadata["generation"]["start_token_id"], *lm.tokenize(text)]
    inputs = {"token_ids": np.asarray([ids]), "padding_mask": np.ones((1, len(ids)), np.int32)}
    logits = trained(inputs)[0]
    expected = tf.nn.log_softmax(logits).numpy()[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(lm.score(text), expected, atol=0.02)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ("", {}, "prompt is empty"),
        (b"bytes", {}, "Received bytes"),
        ("half a pair \ud800", {}, "no valid Unicode"),
        ("x = 1\n" * 40, {}, "tokens, and the model's context has 32"),
        ([5, 300_000], {}, "token id 300000; ids of this model go from 0 to 299"),
        ([5, -1], {}, "token id -1"),
        ([5, 6, 7], {"max_length": 2}, "must lie between the prompt's 3"),
        ([5], {"max_length": 33}, "the context of 32"),
        ([5], {"sampler": "nucleus"}, "must be one of greedy, top_k"),
        ([5], {"stop": "###"}, "'auto', None or token ids"),
    ],
)
def test_bad_prompts_say_what_to_do(lm, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(prompt, **options)


def test_a_model_without_tokenizer_works_with_ids(gpt, tmp_path):
    lm = TFLiteCausalLM(tfgptopt.export(gpt, tmp_path / "gpt.tflite"))
    assert len(lm.generate([1, 2], max_length=8)) == 8
    with pytest.raises(ValueError, match="has no tokenizer"):
        lm.generate("text")


def test_bad_samplers_and_threads(path):
    for arguments in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            TopK(**arguments)
    with pytest.raises(ValueError, match="num_threads"):
        TFLiteCausalLM(path, num_threads=0)


def test_bad_files(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        TFLiteCausalLM(tmp_path / "nothing.tflite")
    foreign = tmp_path / "foreign.tflite"
    foreign.write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="not a TFLite file"):
        TFLiteCausalLM(foreign)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        foreign.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match="damaged or was cut off"):
            TFLiteCausalLM(foreign)
    from tfgptopt.exporting.tflite.builder import Model

    other = Model("other")
    graph = other.graph("serve")
    graph.output("y", graph.input("x", (1,), np.float32))
    foreign.write_bytes(other.tobytes())
    with pytest.raises(ValueError, match="was not written by tfgptopt"):
        TFLiteCausalLM(foreign)


def test_needs_neither_tensorflow_nor_keras(path):
    code = (
        "import sys\n"
        "for name in ('tensorflow', 'keras', 'keras_hub', 'yaml', 'rich', 'typer', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from tfgptopt.generation import TFLiteCausalLM\n"
        f"print(TFLiteCausalLM({str(path)!r}).generate('import', max_length=12))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("import")
