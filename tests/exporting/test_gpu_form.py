"""The form of a bundle for GPUs: a mask is given, and half precision holds the constants.

It runs here on a CPU, with the mask that LiteRT-LM gives in half precision.
"""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from decoder.families import make, prompt
from exporting.pairs import dressed, with_pairs
from exporting.test_mixtures import make as make_mixture

import tfgptopt
from tfgptopt.exporting import LiteRTLM
from tfgptopt.file.container import read_container
from tfgptopt.quantization import Int8

CONTEXT, REFUSED = 64, np.float32(-45824)
HALF = np.finfo(np.float16)


@pytest.fixture(scope="module", params=["Gemma 2", "Bloom"])
def bundle(request, tmp_path_factory):
    model = with_pairs(request.param, CONTEXT)
    tfgptopt.quantize_aware(model, Int8())
    path = tmp_path_factory.mktemp("gpu") / "gpt.litertlm"
    return tfgptopt.export(model, path, LiteRTLM(CONTEXT, accelerator="gpu"))


def tflite_of(path):
    model = read_container(path).model
    return path.read_bytes()[model.begin : model.end]


def decoded(runner, tokens, sees):
    """Returns the logits behind each token; `sees(position)` says which positions it sees."""
    inputs = runner.get_input_details()
    caches = {
        name: np.zeros(one["shape"], np.float32)
        for name, one in inputs.items()
        if name.startswith("kv_cache")
    }
    logits = []
    for position, token in enumerate(tokens):
        mask = np.full((1, 1, 1, CONTEXT), REFUSED)
        mask[..., sees(position)] = 0
        found = runner(
            tokens=np.asarray([token], np.int32),
            input_pos=np.asarray([position], np.int32),
            mask=mask,
            **caches,
        )
        caches = {name: found[name] for name in caches}
        logits.append(found["logits"].reshape(-1))
    return np.stack(logits)


def test_with_the_mask_given_tokens_are_the_same(bundle):
    lm, tokens = tfgptopt.TFLiteCausalLM(bundle), prompt(30)
    runner = Interpreter(model_content=tflite_of(bundle)).get_signature_runner("decode")
    found = decoded(runner, tokens, lambda position: slice(position + 1))
    expected = lm._engine.score(lm._engine.new_cache(), tokens)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    assert np.median(np.abs(found - expected)) < 1e-3
    # The graph sees what the mask says, and nothing else.
    apart = decoded(runner, tokens[:8], lambda position: slice(position, position + 1))
    assert np.abs(apart[1:] - expected[1:8]).max() > 0.1


def test_half_precision_holds_the_constants(bundle):
    file = schema.ModelT.InitFromPackedBuf(tflite_of(bundle), 0)
    masked = [one for one in file.signatureDefs if any(t.name == b"mask" for t in one.inputs)]
    names = {one.signatureKey.decode() for one in masked}
    assert {"decode", "prefill_1", f"prefill_{CONTEXT}"} <= names
    count = 0
    for one in masked:
        for tensor in file.subgraphs[one.subgraphIndex].tensors:
            data = file.buffers[tensor.buffer].data
            if tensor.type != schema.TensorType.FLOAT32 or data is None or not len(data):
                continue
            sizes = np.abs(np.asarray(data, np.uint8).view(np.float32))
            assert sizes.max() <= HALF.max and (sizes.max() == 0 or sizes.max() >= 1e-7)
            count += 1
    assert count > len(masked)


def test_what_a_gpu_cannot_hold_is_refused(tmp_path):
    for settings in ({"growing_cache": True}, {"cache_dtype": "int8"}):
        with pytest.raises(ValueError, match="goes with a float32 cache of the whole context"):
            LiteRTLM(accelerator="gpu", **settings)
    with pytest.raises(ValueError, match=r"'cpu' or 'gpu'\. Received: 'npu'"):
        LiteRTLM(accelerator="npu")
    path = tmp_path / "gpt.litertlm"
    with pytest.raises(ValueError, match="not for MixtralCausalLM"):
        mixture = dressed(make_mixture("Mixtral"), CONTEXT)
        tfgptopt.export(mixture, path, LiteRTLM(CONTEXT, accelerator="gpu"))
    with pytest.raises(ValueError, match=r"up to 2048\. Received: a context of 4096"):
        bloom = dressed(make("Bloom"), CONTEXT)
        tfgptopt.export(bloom, path, LiteRTLM(4096, accelerator="gpu"))
    assert list(tmp_path.iterdir()) == []
