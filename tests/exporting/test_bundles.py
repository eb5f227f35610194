"""Bundles for LiteRT-LM as files: what is in them, read back, damaged, and refused."""

import subprocess
import sys
import warnings

import keras_hub
import pytest
from conftest import make_gpt
from data.chatty import gemma_tokenizer
from decoder.families import of_own_class, prompt, randomize
from exporting.pairs import pairs, with_pairs
from litert_lm_builder import litertlm_peek

import tfgptopt
from tfgptopt.data import set_template
from tfgptopt.evaluation.size import tflite_size
from tfgptopt.exporting import LiteRTLM, TFLite
from tfgptopt.file.container import read_container
from tfgptopt.file.contents import parts_of
from tfgptopt.generation import ChatTemplate, TFLiteCausalLM
from tfgptopt.quantization import Int8

CONTEXT = 64


@pytest.fixture(scope="module")
def model():
    model = with_pairs("GPT2", CONTEXT, max_sequence_length=CONTEXT)
    tfgptopt.quantize_aware(model, Int8())
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    set_template(model, ChatTemplate(template, ("Aa",)))
    return model


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return [tfgptopt.export(model, folder / f"gpt.{kind}") for kind in ("tflite", "litertlm")]


def test_a_bundle_is_read_as_the_file_is(files, tmp_path):
    file, bundle = (TFLiteCausalLM(path) for path in files)
    text = pairs(prompt(20))
    assert bundle.generate(text) == file.generate(text) != text
    assert bundle.generate(text, sampler="top_k", seed=3) == file.generate(
        text, sampler="top_k", seed=3
    )
    assert (file.score(text) == bundle.score(text)).all()
    assert bundle.chat().generate(text, max_new_tokens=9) == file.chat().generate(
        text, max_new_tokens=9
    )
    assert bundle.metadata.weights == file.metadata.weights
    assert bundle.metadata.recipe["techniques"][0]["name"] == "quantize_aware"
    sizes = [tflite_size(path) for path in files]
    assert sizes[0].parameters == sizes[1].parameters
    assert sizes[1].file_bytes == files[1].stat().st_size
    begin = read_container(files[1]).model.begin
    assert parts_of(files[1], begin) == parts_of(files[0])


def test_a_sentencepiece_model_is_a_section(tmp_path):
    tokenizer = gemma_tokenizer()
    backbone = keras_hub.models.GemmaBackbone(tokenizer.vocabulary_size(), 1, 2, 1, 32, 64, 16)
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=CONTEXT)
    gemma = keras_hub.models.GemmaCausalLM(backbone, preprocessor)
    randomize(gemma)
    files = [tfgptopt.export(gemma, tmp_path / f"gpt.{kind}") for kind in ("tflite", "litertlm")]
    assert all(path.read_bytes().count(tokenizer.proto) == 1 for path in files)
    one, other = (TFLiteCausalLM(path) for path in files)
    assert one.metadata.sentencepiece == other.metadata.sentencepiece == tokenizer.proto
    assert one.generate("What is", max_length=20) == other.generate("What is", max_length=20)


def test_the_library_of_bundles_finds_the_sections(files, tmp_path):
    with (tmp_path / "log").open("w") as log:
        litertlm_peek.peek_litertlm_file(str(files[1]), str(tmp_path / "parts"), log)
    said = (tmp_path / "log").read_text("utf-8")
    for section in (
        "LlmMetadataProto",
        "ExecutorMetadataProto",
        "HF_Tokenizer_Zlib",
        "TFLiteModel",
    ):
        assert said.count(f"Data Type:    {section}") == 1, said
    assert f"max_num_tokens: {CONTEXT}" in said


def test_the_model_is_cut_out_once(files, tmp_path, monkeypatch):
    expected = TFLiteCausalLM(files[1]).generate([40, 41, 42], stop=None)
    for _ in range(2):
        lm = TFLiteCausalLM(files[1], weight_cache=tmp_path)
        assert lm.generate([40, 41, 42], stop=None) == expected
        (entry,) = tmp_path.glob("*.tfgptopt")
    model = read_container(files[1]).model
    assert entry.read_bytes() == files[1].read_bytes()[model.begin : model.end]
    entry.write_bytes(entry.read_bytes()[:-1])
    assert TFLiteCausalLM(files[1], weight_cache=tmp_path).generate([40, 41, 42], stop=None)
    (entry,) = tmp_path.glob("*.tfgptopt")
    assert entry.stat().st_size == model.end - model.begin


def refused(path, data, words):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        TFLiteCausalLM(path)


def test_damage_is_found(files, tmp_path):
    whole = files[1].read_bytes()
    path = tmp_path / "a.litertlm"
    for end in (9, 100, 20_000, len(whole) // 2, len(whole) - 16, len(whole) - 1):
        refused(path, whole[:end], "damaged or was cut off|not a TFLite file")
    for spot in (9, 60, 16_390, len(whole) // 2, len(whole) - 3):
        data = bytearray(whole)
        data[spot] ^= 4
        refused(path, bytes(data), "is damaged")


def test_a_bundle_of_others_runs_elsewhere(files, tmp_path):
    whole = files[1].read_bytes()
    for name in (b"tfgptopt", b"tf_lite_prefill_decode"):
        data = whole[:-16].replace(name, bytes(len(name)))
        assert data != whole[:-16]
        refused(tmp_path / "a.litertlm", data, "not written by tfgptopt.* LiteRT-LM runs it")


def test_what_does_not_fit_is_refused_with_the_reason(model, tmp_path):
    target = tmp_path / "gpt.litertlm"

    def export(one, words, settings=None):
        with pytest.raises(ValueError, match=words), warnings.catch_warnings(action="ignore"):
            tfgptopt.export(one, target, settings)
        assert list(tmp_path.iterdir()) == []

    export(make_gpt(), "has a tokenizer, and the model has none")
    endless = with_pairs("GPT2", CONTEXT)
    endless.preprocessor.tokenizer.end_token_id = None
    export(endless, "needs a token that ends an answer")
    export(
        of_own_class(with_pairs("GPT2", CONTEXT)),
        "needs a reader for OwnCausalLM: it has a layer of its own.*Export a TFLite file",
    )
    export(model, "an int from 2 to 64", LiteRTLM(context_length=65))
    with_inputs = with_pairs("Gemma 4", CONTEXT)
    export(with_inputs, "`growing_cache` is not for Gemma4CausalLM", LiteRTLM(growing_cache=True))
    export(model, r"LiteRTLM which|TFLite ends with '\.tflite'", TFLite())
    with pytest.raises(ValueError, match="must be an int >= 2"):
        LiteRTLM(context_length=1)
    with pytest.raises(ValueError, match="`cache_dtype` must be one of"):
        LiteRTLM(cache_dtype="int4")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for m in messages %}{% break %}{% endfor %}", r"does not know: break \(line 1\)"),
        ("\n{{ messages[0].content.upper() }}", r"\.upper\(\) \(line 2\)"),
        ("{{ messages | tojson(indent=2) }}", "tojson with arguments"),
        ("{{ messages[0].content | wordcount }}", "the filter wordcount"),
        ("a{{ bos_token }}", "elsewhere than at its beginning"),
    ],
)
def test_a_template_that_the_engine_cannot_render_is_refused(source, words, tmp_path):
    model = with_pairs("GPT2", CONTEXT)
    set_template(model, ChatTemplate(source, bos_token="Ab"))
    with pytest.raises(ValueError, match=words):
        tfgptopt.export(model, tmp_path / "gpt.litertlm")
    assert list(tmp_path.iterdir()) == []


def test_control_tokens_that_nobody_can_write_are_refused(tmp_path):
    tokenizer = gemma_tokenizer()
    backbone = keras_hub.models.GemmaBackbone(tokenizer.vocabulary_size(), 1, 2, 1, 32, 64, 16)
    model = keras_hub.models.GemmaCausalLM(
        backbone, keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=CONTEXT)
    )
    source = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    set_template(model, ChatTemplate(source, ("<eos>",)))
    with pytest.raises(ValueError, match=r"gives other tokens: .* Control tokens"):
        tfgptopt.export(model, tmp_path / "gpt.litertlm")


def test_without_the_library_the_sentence_says_what_to_install(files):
    code = (
        "import sys; sys.modules['litert_lm_builder'] = None\n"
        "from tfgptopt.generation import TFLiteCausalLM\n"
        f"TFLiteCausalLM({str(files[0])!r})\n"
        f"TFLiteCausalLM({str(files[1])!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: Bundles for LiteRT-LM" in result.stderr
    assert "pip install 'tfgptopt[litertlm]'" in result.stderr
