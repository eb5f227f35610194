"""A server in a process of its own, asked by OpenAI's client."""

import concurrent.futures
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import keras
import keras_hub
import openai
import pytest
from data.chatty import gemma_tokenizer

import tfgptopt
from tfgptopt.cli.main import run_command
from tfgptopt.data import set_template
from tfgptopt.exporting import TFLite
from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.serving import Limits, create_app

QUESTION = [{"role": "user", "content": "What is 2 plus 2?"}]
KEY = "secret"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    keras.utils.set_random_seed(2)
    tokenizer = keras_hub.models.Gemma3Tokenizer(gemma_tokenizer().proto, has_vision_tokens=False)
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        image_size=16,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=32,
        intermediate_dim=64,
        head_dim=16,
        sliding_window_size=64,
    )
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(tokenizer, sequence_length=256)
    model = keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor)
    set_template(model, "gemma")
    file = tmp_path_factory.mktemp("server") / "gemma.tflite"
    return tfgptopt.export(model, file, TFLite(batch_sizes=(4,)))


@pytest.fixture(scope="module")
def lm(path):
    return TFLiteCausalLM(path)


def start(path, *options):
    """Starts a server; returns its process and address."""
    program = Path(sys.executable).with_name("tfgptopt")
    command = [program, "serve", str(path), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + process.stderr.read()
    return process, found.group().removesuffix(",").removesuffix("/v1")


def ask(address, route="/health", data=None, **headers):
    """Returns status and body of a plain request."""
    request = urllib.request.Request(address + route, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def address(path):
    process, address = start(path, "--api-key", KEY, "--queue", "24")
    for _ in range(100):
        try:
            ask(address)
            break
        except urllib.error.URLError:
            time.sleep(0.1)
    yield address
    process.terminate()
    assert process.wait(20) in (0, -15)


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60)


def test_greedy_answers_are_those_of_the_runtime(client, lm):
    expected = lm.chat().generate(QUESTION, max_new_tokens=20)
    settings = {"model": "gemma", "temperature": 0, "max_tokens": 20}
    answer = client.chat.completions.create(messages=QUESTION, **settings)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20
    stream = client.chat.completions.create(
        messages=QUESTION, stream=True, stream_options={"include_usage": True}, **settings
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == expected and len(pieces) > 10
    assert chunks[-1].usage == answer.usage
    text = client.completions.create(prompt="What is", **settings).choices[0].text
    ids = lm.texts.prompts.prepare("What is", None, False)[0]
    assert text == lm.generate("What is", max_length=len(ids) + 20, strip_prompt=True)


def test_the_example_of_the_page(address, lm, capsys):
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    code = code.replace("http://127.0.0.1:8000", address).replace('"none"', repr(KEY))
    code = code.replace("stream=True", "stream=True, temperature=0, max_tokens=12")
    exec(code, {})
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    assert capsys.readouterr().out == lm.chat().generate(question, max_new_tokens=12)


def test_seeds_stops_several_choices_and_token_ids(client, lm):
    settings = {"model": "gemma", "max_tokens": 24, "seed": 5, "temperature": 0.9, "top_p": 0.9}
    first, second = (
        client.completions.create(prompt=["one", "two"], n=2, **settings) for _ in range(2)
    )
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices] and len(set(texts)) > 2
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    stop = texts[0][6:8]
    stopped = client.completions.create(prompt="one", stop=stop, **settings).choices[0]
    assert stopped.text == texts[0][: texts[0].index(stop)] and stopped.finish_reason == "stop"
    ids = lm.tokenize("one")
    by_ids = client.completions.create(prompt=[lm.texts.prompts.prepare("one", None, False)[0]],
                                       **settings)  # fmt: skip
    assert ids and by_ids.choices[0].text == texts[0]


def test_log_probabilities_are_those_of_the_model(client, lm):
    answer = client.chat.completions.create(
        model="gemma", messages=QUESTION, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs.content
    text = lm.texts.from_messages(QUESTION, 6, "greedy", "auto", None, None)
    feeder = lm.feeder()
    feeder.waiting.append(text)
    while feeder.busy:
        feeder.step(tfgptopt.generation.Statistics())
    expected = lm.score(text.tokens)[-6:]
    for one, value in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(value, abs=1e-3)
        assert one.top_logprobs[0].logprob == pytest.approx(value, abs=1e-3)  # Greedy.
        assert len(one.top_logprobs) == 3
    completion = client.completions.create(
        model="gemma", prompt="What", max_tokens=4, temperature=0, logprobs=2
    )
    assert len(completion.choices[0].logprobs.token_logprobs) == 4


def test_what_prompts_have_in_common_is_read_once(lm, monkeypatch):
    """Two conversations by turns: each turn reads what is new."""
    read, run = [], lm._engine._run

    def watched(signature, cache, tokens, position, *rest):
        read.append(signature.length)
        return run(signature, cache, tokens, position, *rest)

    monkeypatch.setattr(lm._engine, "_run", watched)
    feeder, chats, counts = lm.feeder(), {}, []
    for turn in range(3):
        for name in ("Ann", "Bob"):
            messages = chats.setdefault(name, [{"role": "user", "content": f"I am {name}. " * 12}])
            text = lm.texts.from_messages(messages, 4, "greedy", None, 0, None)
            read.clear()
            feeder.waiting.append(text)
            while feeder.busy:
                feeder.step(tfgptopt.generation.Statistics())
            counts.append((turn, sum(read), len(text.prompt)))
            messages += [{"role": "assistant", "content": text.continuation.text or "?"},
                         {"role": "user", "content": "And?"}]  # fmt: skip
    for turn, tokens, prompt in counts:
        assert tokens >= prompt - 1 if turn == 0 else tokens < 0.75 * prompt, counts


def test_answers_of_a_form(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = client.chat.completions.create(
        model="gemma", messages=QUESTION, max_tokens=120, seed=1, response_format=form
    )
    if answer.choices[0].finish_reason == "stop":
        assert set(json.loads(answer.choices[0].message.content)) == {"n"}
    assert answer.choices[0].message.content.lstrip().startswith("{")


def test_many_clients_get_their_own_answers_or_are_told_to_come_again(client, address):
    def one(number):
        try:
            return client.completions.create(
                model="gemma", prompt=f"{number} plus", max_tokens=12, temperature=0
            ).choices[0].text  # fmt: skip
        except openai.RateLimitError:
            return None

    expected = [one(number) for number in range(8)]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda i: one(i % 8), range(64)))
    served = [(i, text) for i, text in enumerate(found) if text is not None]
    assert len(served) >= 24 and all(text == expected[i % 8] for i, text in served)
    status, metrics = ask(address, "/metrics")
    assert status == 200
    pattern = r'^tfgptopt_requests_total\{route="completions",status="(\d+)"\} (\S+)'
    counts = dict(re.findall(pattern, metrics, re.MULTILINE))
    assert float(counts.get("429", 0)) == found.count(None)
    assert "tfgptopt_waiting_texts 0.0" in metrics and "tfgptopt_running_texts 0.0" in metrics
    assert re.search(r"tfgptopt_inter_token_seconds_count [1-9]", metrics)


def test_a_client_that_goes_frees_its_place(client, address):
    stream = client.completions.create(model="gemma", prompt="x", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    body = json.dumps({"prompt": "y", "max_tokens": 200}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    for _ in range(100):
        metrics = ask(address, "/metrics")[1]
        if "tfgptopt_running_texts 0.0" in metrics and "tfgptopt_waiting_texts 0.0" in metrics:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("The texts of clients that went are still being continued.")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ""}, 200, ""),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": [1, "x"]}, 400, "prompt"),
        ({"prompt": [10**6]}, 400, "token id"),
        ({"prompt": "x" * 5000}, 400, "context"),
        ({"prompt": "x", "model": "gpt-5"}, 404, "This server has the model 'gemma'"),
        ({"prompt": "x", "presence_penalty": 1}, 400, "presence_penalty"),
        ({"prompt": "x", "stop": [""]}, 400, "stop"),
        ({"prompt": "x", "n": 100}, 400, "`n`"),
        ({"prompt": "x", "response_format": {"type": "xml"}}, 400, "response_format"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "poet", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
        (b'{"prompt": ', 400, "no JSON"),
        (b"[" * 100_000, 400, ""),
        (b"[]", 400, "object"),
        (b"x" * (10 << 20), 413, "bytes"),
    ],
    ids=str,
)
def test_bad_requests(address, body, status, message):
    chat = isinstance(body, dict) and "messages" in body
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    route = "/v1/chat/completions" if chat else "/v1/completions"
    found, answer = ask(address, route, data, Authorization=f"Bearer {KEY}")
    assert found == status, answer
    if status != 200:
        assert message in json.loads(answer)["error"]["message"]


def test_keys_models_and_health(address, client):
    assert ask(address) == (200, '{"status":"ok"}')
    assert ask(address, "/v1/models")[0] == 401
    assert ask(address, "/v1/completions", b"{}", Authorization="Bearer other")[0] == 401
    assert [model.id for model in client.models.list()] == ["gemma"]


def test_a_port_in_use_and_what_cannot_be_served(address, path, capsys, tmp_path, lm):
    port = address.rpartition(":")[2]
    assert run_command(["serve", str(path), "--port", port]) == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert run_command(["serve", str(tmp_path / "no.tflite"), "--port", "0"]) == 1
    with pytest.raises(ValueError, match="queue"):
        Limits(queue=0)
    assert create_app(lm).routes
