"""Bundles in LiteRT-LM itself: its greedy text is that of `TFLiteCausalLM`."""

import re
from pathlib import Path

import keras_hub
import pytest
from data.chatty import gemma_tokenizer
from decoder.families import CONTEXT, FAMILIES, make, prompt, randomize
from exporting.pairs import PAIRS, dressed, pairs, with_pairs
from exporting.test_mixtures import MIXTURES
from exporting.test_mixtures import make as make_mixture

import tfgptopt
from tfgptopt.data import set_template, template_of
from tfgptopt.exporting import LiteRTLM
from tfgptopt.generation import ChatTemplate, TFLiteCausalLM
from tfgptopt.generation.templates import KNOWN
from tfgptopt.quantization import Int4, Int8

litert_lm = pytest.importorskip("litert_lm")
litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
NEW = 60


def engine_of(path):
    return litert_lm.Engine(str(path), cache_dir=":nocache")


def continued(engine, text, new=NEW):
    """Returns what the engine writes behind a text."""
    session = engine.create_session(apply_prompt_template=False, max_output_tokens=new)
    session.run_prefill([text])
    return session.run_decode().texts[0]


def exported(path, name, spec=None, settings=None, **changes):
    model = with_pairs(name, CONTEXT, **changes)
    if spec is not None:
        tfgptopt.quantize_aware(model, spec)
    return tfgptopt.export(model, path / "gpt.litertlm", settings or LiteRTLM(CONTEXT))


def check_the_same(path):
    """Compares both engines for prompts within a chunk, and of several."""
    lm, engine, written = TFLiteCausalLM(path), engine_of(path), ""
    for length in (3, 34):
        text = pairs(prompt(length))
        assert len(lm.tokenize(text)) == length
        ours = lm.generate(text, max_length=length + NEW, strip_prompt=True)
        assert continued(engine, text) == ours
        written += ours
    assert len(written) > NEW and len(set(written)) > 2


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_ours(name, tmp_path):
    check_the_same(exported(tmp_path, name))


@pytest.mark.parametrize("name", ["GPT2", "Llama3"])
@pytest.mark.parametrize(
    "spec",
    [
        Int8(activation_blocks=4),
        Int4(),
        Int4(block_size=32, embedding_bits=4, embedding_block_size=32),
        Int4(embedding_bits=4),
    ],
    ids=str,
)
def test_greedy_text_of_integers_is_ours(name, spec, tmp_path):
    check_the_same(exported(tmp_path, name, spec, intermediate_dim=64))


@pytest.mark.parametrize("name", MIXTURES)
def test_greedy_text_of_mixtures_is_ours(name, tmp_path):
    model = dressed(make_mixture(name), CONTEXT)
    tfgptopt.quantize_aware(model, Int8())
    check_the_same(tfgptopt.export(model, tmp_path / "gpt.litertlm", LiteRTLM(CONTEXT)))


def test_greedy_text_with_int8_caches_is_ours(tmp_path):
    settings = LiteRTLM(CONTEXT, cache_dtype="int8")
    check_the_same(exported(tmp_path, "GPT2", Int8(), settings))


@pytest.mark.parametrize("name", ["GPT2", "Falcon", "Llama3", "Gemma 2"])
def test_greedy_text_with_growing_caches_is_ours(name, tmp_path):
    spec = Int8() if name == "Llama3" else None
    check_the_same(exported(tmp_path, name, spec, LiteRTLM(CONTEXT, growing_cache=True)))


@pytest.mark.parametrize("name", ["Bloom", "Gemma 2"])
def test_greedy_text_with_the_mask_of_the_engine_is_ours(name, tmp_path):
    check_the_same(exported(tmp_path, name, Int8(), LiteRTLM(CONTEXT, accelerator="gpu")))


def test_int8_caches_grow_too(tmp_path):
    settings = LiteRTLM(CONTEXT, cache_dtype="int8", growing_cache=True)
    check_the_same(exported(tmp_path, "GPT2", Int8(), settings))


def test_a_start_token_is_put_before_the_text(tmp_path):
    path = exported(tmp_path, "GPT2", start_token_id=150)
    lm, text = TFLiteCausalLM(path), pairs(prompt(9))
    ours = lm.generate(text, max_length=40, strip_prompt=True)
    assert ours != lm.generate(lm.tokenize(text), max_length=39, strip_prompt=True)
    assert continued(engine_of(path), text, 30) == ours


@pytest.mark.parametrize("growing", [False, True])
def test_prompts_of_every_length(growing, tmp_path):
    context = 150  # Behind a chunk of 128 there is no room for one of 32.
    model = with_pairs("Llama", context, num_layers=1)
    path = tfgptopt.export(model, tmp_path / "gpt.litertlm", LiteRTLM(growing_cache=growing))
    lm, engine = TFLiteCausalLM(path), engine_of(path)
    for length in range(1, context):
        text = pairs(prompt(length))
        ours = lm.generate(text, max_length=min(length + 6, context), strip_prompt=True)
        assert continued(engine, text, min(6, context - length)) == ours, length


TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}BaBb{{ message['content'] }}{{ eos_token }}"
    "{% else %}BcBd{{ message['content'] }}{{ 'STOP\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}BcBd{% endif %}\n"
)


@pytest.mark.parametrize("growing", [False, True])
def test_a_chat_of_two_turns(growing, tmp_path):
    model = with_pairs("Qwen3", CONTEXT, start_token_id=150)
    questions = [pairs(prompt(7, seed)) for seed in (2, 3)]

    def chat_ending_with(stop):
        source = TURNS.replace("STOP", stop)
        template = ChatTemplate(source, (stop,), PAIRS[150 - 34], "Bf")
        path, settings = tmp_path / "gpt.litertlm", LiteRTLM(growing_cache=growing)
        tfgptopt.export(model, path, settings, overwrite=True, chat_template=template)
        assert template_of(model) != template
        return TFLiteCausalLM(path).chat(), engine_of(path)

    chat, _ = chat_ending_with("Be")
    chat.generate(questions[0], max_new_tokens=20)
    said = chat.tokens[-19:]  # The last was not read.
    pair = next(token for token in said[3:] if token > 33 and token not in said[:3])
    stop = PAIRS[pair - 34]  # So that the model ends its turn.
    chat, engine = chat_ending_with(stop)
    conversation = engine.create_conversation()
    for question in questions:
        ours = chat.generate(question, max_new_tokens=20)
        theirs = str(conversation.send_message(question, max_output_tokens=20))
        for name in (stop, "Bf", PAIRS[150 - 34]):  # It prints special tokens.
            theirs = theirs.replace(name, "")
        assert theirs == ours
    assert len(chat.messages) == 4 and all(message["content"] for message in chat.messages)


def test_a_stop_token_that_is_written_out(tmp_path):
    model, question = with_pairs("Qwen3", CONTEXT), pairs(prompt(7, 2))
    source = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    set_template(model, ChatTemplate(source))
    path = tfgptopt.export(model, tmp_path / "gpt.litertlm")
    whole = TFLiteCausalLM(path).chat().generate(question, max_new_tokens=20)
    stop = whole[6:10]  # Two tokens, or more.
    set_template(model, ChatTemplate(source, (stop,)))
    tfgptopt.export(model, path, overwrite=True)
    ours = TFLiteCausalLM(path).chat().generate(question, max_new_tokens=20)
    with engine_of(path) as engine, engine.create_conversation() as conversation:
        assert str(conversation.send_message(question, max_output_tokens=20)) == ours
    assert ours == whole.partition(stop)[0]


def test_a_chat_with_a_sentencepiece_model(tmp_path):
    tokenizer = gemma_tokenizer()
    model = make("Gemma 3", vocabulary_size=tokenizer.vocabulary_size())
    randomize(model, seed=4)
    model.preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(
        tokenizer, sequence_length=CONTEXT
    )
    path = tfgptopt.export(model, tmp_path / "gpt.litertlm")
    lm, engine, answers = TFLiteCausalLM(path), engine_of(path), []
    for question in ("What is 3 plus 3?", "Sure?"):
        answers.append(lm.chat().generate(question, max_new_tokens=16))
        with engine.create_conversation(max_output_tokens=16) as conversation:
            assert str(conversation.send_message(question)) == answers[-1]
    assert len(set(answers)) == 2 and len(set("".join(answers))) > 3


def test_the_example_of_the_page(tmp_path, monkeypatch, capfd):
    page = (Path(__file__).parents[2] / "docs/litertlm.md").read_text("utf-8")
    code, for_gpus = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    names = {"gpt": with_pairs("GPT2", CONTEXT)}
    exec(code.replace("Hello", "AaBbAcBd"), names)
    theirs, ours = capfd.readouterr().out.splitlines()[-2:]
    assert ours.startswith("AaBbAcBd" + theirs) and len(theirs) > 8
    Path("gpt.litertlm").unlink()
    exec(for_gpus.replace("1024", "64"), names)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return engine_of(exported(tmp_path_factory.mktemp("lm"), "GPT2"))


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates_are_rendered_as_here(name, engine):
    from tfgptopt.exporting.litertlm.templates import engine_template

    template = KNOWN[name]
    found = engine_template(template)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Why,\nand <what>?"},
    ]
    conversation = engine.create_conversation(
        chat_template=found.source, system_message=messages[0]["content"]
    )
    expected = template.render(messages, add_generation_prompt=True)
    start = template.bos_token if found.starts else ""
    assert start + conversation.render_message_to_string(messages[1]["content"]) == expected
