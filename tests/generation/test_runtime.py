import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from conftest import CONTEXT

import tfgptopt
from tfgptopt.generation import TFLiteCausalLM, TopK

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
    engine = lm._engine
    logits = engine.score(engine.new_cache(), tokens)
    cache = engine.new_cache()
    engine.read(cache, tokens[:-1])
    np.testing.assert_allclose(
        engine.decode(cache, tokens[-1]), logits[-1], atol=0.05 * logits.std()
    )
    assert cache.tokens == tokens
    assert lm.generate(tokens, stop=None)[:length] == tokens


def test_stops_at_a_token(lm):
    ids = [5, 6, 7]
    made = lm.generate(ids, max_length=20, stop=None)
    assert lm.generate(ids, max_length=20, stop=[made[5]]) == made[: made.index(made[5], 3)]


def test_stream_is_generate_piece_by_piece(lm):
    pieces = list(lm.stream(PROMPT, max_length=CONTEXT))
    assert len(pieces) > 3
    assert PROMPT + "".join(pieces) == lm.generate(PROMPT, max_length=CONTEXT)


def test_a_sampler_repeats_with_a_seed(lm):
    first = lm.generate(PROMPT, sampler="top_k", seed=7)
    assert first == lm.generate(PROMPT, sampler=TopK(5), seed=7)
    assert first == lm.generate(PROMPT, sampler=[TopK(5)], seed=7)
    assert len({lm.generate(PROMPT, sampler="random", seed=seed) for seed in range(5)}) > 1


def test_a_prompt_that_begins_like_the_last_one_is_read_from_where_they_differ(lm, monkeypatch):
    engine, shared, read = lm._engine, list(range(1, 20)), []
    run = engine._run

    def counted(signature, cache, tokens, position, *rest):
        read.append((position, len(tokens)))
        return run(signature, cache, tokens, position, *rest)

    prompts = [[*shared, 40, 41], [*shared, 50, 51]]
    lm.reset()
    fresh = []
    for prompt in prompts:
        lm.reset()
        fresh.append(lm.generate(prompt, max_length=30, stop=None))
    lm.reset()
    monkeypatch.setattr(engine, "_run", counted)
    assert lm.generate(prompts, max_length=30, stop=None) == fresh
    starts = [i for i, (position, length) in enumerate(read) if position < 20 and length > 1]
    assert read[0][0] == 0
    second = read[len(read) // 2 :]
    assert min(position for position, _ in second) >= 19 and len(starts) >= 1
    read.clear()
    lm.generate(prompts[1], max_length=22, stop=None)
    assert read == [(20, 1)]


def test_streams_of_one_model_may_be_read_in_turns(lm):
    prompts = [PROMPT, "import"]
    expected = [lm.generate(p, max_length=CONTEXT, strip_prompt=True) for p in prompts]
    streams = [lm.stream(prompt, max_length=CONTEXT) for prompt in prompts]
    texts = ["", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == expected


def test_threads_of_one_model_get_what_one_alone_gets(lm):
    prompts = [[i, i + 1, i + 2] for i in range(1, 9)]
    expected = [lm.generate(prompt, stop=None) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda prompt: lm.generate(prompt, stop=None), prompts))
    assert made == expected


def test_a_stream_that_is_broken_off_changes_nothing_for_the_next(lm):
    expected = lm.generate(PROMPT, max_length=CONTEXT)
    for _ in lm.stream(PROMPT, max_length=CONTEXT):
        break
    assert lm.generate(PROMPT, max_length=CONTEXT) == expected


def test_score_is_the_log_softmax_of_the_dressed_model(lm, trained):
    text = "import re\n"
    ids = [lm.metadata.generation.start_token_id, *lm.tokenize(text)]
    inputs = {"token_ids": np.asarray([ids]), "padding_mask": np.ones((1, len(ids)), np.int32)}
    logits = trained(inputs)[0]
    expected = tf.nn.log_softmax(logits).numpy()[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(lm.score(text), expected, atol=0.02)


def test_logits_of_the_end_of_a_text_cost_no_head_before_it(lm, monkeypatch):
    engine, ids, read = lm._engine, list(range(1, 26)), []
    whole, run = lm.logits(ids), engine._run

    def counted(signature, *args):
        logits = run(signature, *args)
        read.append((signature.length, len(logits) > 0))
        return logits

    monkeypatch.setattr(engine, "_run", counted)
    cache = engine.new_cache()
    found = np.concatenate(list(engine.score_parts(cache, ids, 18)))
    np.testing.assert_allclose(found, whole[18:], atol=1e-4)
    assert sum(length for length, head in read if head) <= 8 and cache.tokens == ids
    read.clear()
    parts = list(engine.score_parts(cache, [*ids[:20], 40, 41], 20))  # Its beginning is there.
    assert sum(map(len, parts)) == 2 and read == [(4, True)]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        (b"bytes", {}, "Received bytes"),
        ("half a pair \ud800", {}, "no valid Unicode"),
        ("x = 1\n" * 40, {}, "tokens, and the model's context has 32"),
        ([5, 300_000], {}, "token id 300000; ids of this model go from 0 to 299"),
        ([5, -1], {}, "token id -1"),
        ([5, 6, 7], {"max_length": 2}, "must lie between the prompt's 3"),
        ([5], {"max_length": 33}, "the context of 32"),
        ([5], {"sampler": "nucleus"}, "must be one of greedy, random, top_k"),
        ([5], {"stop": ""}, "'auto', None, or texts and token ids"),
        ([5], {"stop": [1.5]}, "'auto', None, or texts and token ids"),
        ([5], {"sampler": []}, "a list of samplers"),
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


def test_bad_threads(path):
    with pytest.raises(ValueError, match="num_threads"):
        TFLiteCausalLM(path, num_threads=0)


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


def test_loading_and_dropping_models_writes_nothing_to_standard_error(path, capfd):
    for _ in range(2):
        lm = TFLiteCausalLM(path)
        lm.generate([1, 2, 3], stop=None)
        session = lm.session()
        del lm, session
    assert capfd.readouterr().err == ""
