"""Each expert of a mixture is calibrated with the tokens that its router sends to it."""

import warnings

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from decoder.families import prompt, randomize
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralMoeExperts

import tfgptopt
from tfgptopt.calibration.watching import observe_all
from tfgptopt.families.mixtures import experts_of
from tfgptopt.model.overriding import overriding
from tfgptopt.model.targets import select
from tfgptopt.pruning import SparseGPT, Unstructured, Wanda
from tfgptopt.quantization import Int4, Int8, outliers, report
from tfgptopt.quantization.gptq import gptq

EXPERTS, TOP_K, WIDTH = 4, 2, 32
TOKENS = np.asarray([prompt(16, seed) for seed in range(8)])
MASK = np.ones_like(TOKENS)
MASK[3:, 11:] = 0
DATA = {"token_ids": TOKENS, "padding_mask": MASK}


def make_mixture(idle=None):
    """Returns a mixture of one layer; no token reaches the expert `idle`."""
    backbone = keras_hub.models.MixtralBackbone(
        211, 1, 4, WIDTH, 64, 2, num_experts=EXPERTS, top_k=TOP_K
    )
    model = keras_hub.models.MixtralCausalLM(backbone, preprocessor=None)
    randomize(model)
    if idle is not None:
        # The first feature of each token is large, and speaks against it.
        for variable, row in (
            (backbone.token_embedding.embeddings, np.s_[:, 0]),
            (experts_of(model)[0].router.kernel, np.s_[0, idle]),
        ):
            values = variable.numpy()
            values[row] = 10.0 if variable.shape[0] == 211 else -100.0
            variable.assign(values)
    return model


def kernels_of(model):
    return [w for w in model.weights if "/experts/" in w.path]


def read_by_experts(model):
    """Returns in numpy what each expert's ways in, and its way out, read of real tokens."""
    (found,) = experts_of(model)
    rows, call = [], found.router.call

    def noted(inputs, *args, **kwargs):
        rows.append(keras.ops.convert_to_numpy(inputs).reshape(-1, WIDTH))
        return call(inputs, *args, **kwargs)

    with overriding([(found.router, "call", noted)]):
        model.backbone(DATA)
    x = rows[0][MASK.ravel() > 0].astype(np.float64)
    best = np.argsort(-(x @ found.router.kernel.numpy()), axis=1, kind="stable")[:, :TOP_K]
    gate, up, _ = (kernel.numpy().astype(np.float64) for kernel in kernels_of(model))
    inputs = [x[(best == i).any(axis=1)] for i in range(EXPERTS)]
    hidden = []
    for i, one in enumerate(inputs):
        gated = one @ gate[i]
        hidden.append(gated / (1 + np.exp(-gated)) * (one @ up[i]))
    return [inputs, inputs, hidden]


def test_an_expert_is_shown_the_rows_that_are_routed_to_it():
    model, seen = make_mixture(), {}
    observe_all(model, select(model), DATA, lambda t, rows: seen.setdefault(t, rows.numpy()))
    expected = read_by_experts(model)
    assert sum(len(rows) for rows in expected[0]) == TOP_K * MASK.sum()
    by_key = {target.key: rows for target, rows in seen.items()}
    for kernel, per_expert in zip(kernels_of(model), expected, strict=True):
        for i, rows in enumerate(per_expert):
            np.testing.assert_allclose(by_key[id(kernel), i], rows, atol=1e-4)


@pytest.mark.parametrize("block_size", [None, 32])
def test_gptq_of_an_expert_is_gptq_on_the_rows_routed_to_it(block_size):
    model, idle = make_mixture(idle=2), 2
    before, read = [kernel.numpy() for kernel in kernels_of(model)], read_by_experts(model)
    assert [len(rows) > 0 for rows in read[0]] == [i != idle for i in range(EXPERTS)]
    nearest = make_mixture(idle=2)
    tfgptopt.quantize(nearest, Int4(block_size=block_size), "mse", targets="/experts/")
    with pytest.warns(UserWarning, match=r"routed to expert 2 of .*gate.*: rounded to nearest"):
        tfgptopt.quantize(
            model, Int4(block_size=block_size), "gptq", DATA, targets="/experts/", verbose=0
        )
    for one in (model, nearest):
        tfgptopt.finalize(one)
    better = []
    kernels = zip(kernels_of(model), kernels_of(nearest), before, read, strict=True)
    for found, plain, old, rows in kernels:
        for i in range(EXPERTS):
            if i == idle:
                np.testing.assert_array_equal(found[i], plain[i])
                continue
            expected, scale = gptq(old[i], rows[i].T @ rows[i], 4, block_size)
            steps = np.abs(found[i] - expected) / scale.max()
            assert np.quantile(steps, 0.98) < 1e-3
            errors = [np.square(rows[i] @ (w[i].numpy() - old[i])).sum() for w in (found, plain)]
            better.append(errors[0] / errors[1])
    assert max(better) < 1.0 and np.median(better) < 0.8


def test_scales_of_neurons_are_moved_expert_by_expert():
    model, plain = make_mixture(idle=2), make_mixture(idle=2)
    for one in (model, plain):  # A neuron of each expert stands out.
        kernel = kernels_of(one)[1]
        kernel.assign(kernel.numpy() * np.where(np.arange(64) == 5, 40.0, 1.0))
    before = [kernel.numpy() for kernel in kernels_of(plain)]
    with pytest.warns(UserWarning) as said:
        tfgptopt.quantize(model, Int8(), "smoothquant", DATA, verbose=0)
    messages = [str(one.message) for one in said if one.category is UserWarning]
    assert any("smoothquant move no scales of what 2 weights of experts" in m for m in messages)
    assert any("expert 2 of" in m and "SmoothQuant leaves its scales" in m for m in messages)
    factors = kernels_of(model)[2].numpy() / before[2]
    np.testing.assert_allclose(factors, factors[..., :1] + 0 * factors, rtol=1e-3)
    assert (factors[2] == 1).all() and all(factors[i, 5, 0] > 2 * factors[i, 0, 0] for i in (0, 1))
    np.testing.assert_allclose(
        kernels_of(model)[1].numpy() * factors[:, :, 0][:, None], before[1], rtol=1e-3
    )
    tfgptopt.quantize(plain, Int8(), verbose=0)
    found, nearest = (
        {row.path: row.output_sqnr for row in report(one, DATA).rows}[kernels_of(one)[2].path]
        for one in (model, plain)
    )
    assert found > nearest + 3, (found, nearest)


def test_reports_cover_experts():
    model = make_mixture()
    tfgptopt.quantize(model, Int8(), verbose=0)
    rows = {row.path: row for row in report(model, DATA).rows}
    for kernel in kernels_of(model):
        assert 20 < rows[kernel.path].output_sqnr < 60
    assert {kernel.path for kernel in kernels_of(model)} <= set(outliers(model, DATA).spreads)


def test_wanda_weighs_each_expert_by_its_own_rows():
    model = make_mixture(idle=2)
    before, read = [kernel.numpy() for kernel in kernels_of(model)], read_by_experts(model)
    with pytest.warns(UserWarning, match=r"expert 2 of .* pruned by magnitude"):
        tfgptopt.prune(
            model, 0.5, Unstructured("output"), Wanda(DATA), targets="/experts/", verbose=0
        )
    for kernel, old, rows in zip(kernels_of(model), before, read, strict=True):
        for i in range(EXPERTS):
            norms = np.linalg.norm(rows[i], axis=0) if len(rows[i]) else np.ones(old.shape[1])
            scores = np.abs(old[i]) * norms[:, None]
            kept = scores >= np.sort(scores, axis=0)[len(scores) // 2]
            np.testing.assert_array_equal(kernel[i].numpy() != 0, kept)


def test_sparsegpt_corrects_each_expert_for_its_own_rows():
    model, by_size = make_mixture(idle=2), make_mixture(idle=2)
    before, read = [kernel.numpy() for kernel in kernels_of(model)], read_by_experts(model)
    with pytest.warns(UserWarning, match=r"expert 2 of .* pruned by magnitude"):
        tfgptopt.prune(model, 0.5, score=SparseGPT(DATA), targets="/experts/", verbose=0)
    tfgptopt.prune(by_size, 0.5, targets="/experts/", verbose=0)
    kernels = zip(kernels_of(model), kernels_of(by_size), before, read, strict=True)
    for found, plain, old, rows in kernels:
        for i, own in enumerate(rows):
            assert (found[i].numpy() == 0).mean() == pytest.approx(0.5, abs=0.01)
            if i == 2:
                stays = found[i].numpy() != 0
                np.testing.assert_array_equal(found[i].numpy()[stays], old[i][stays])
                continue
            errors = [np.square(own @ (w[i].numpy() - old[i])).sum() for w in (found, plain)]
            assert errors[0] < 0.9 * errors[1]


def test_experts_without_a_known_router_are_refused_or_rounded_without_data():
    bank = MixtralMoeExperts(num_experts=2, hidden_dim=8, intermediate_dim=16)
    inputs = keras.Input((8,))
    dense = keras.layers.Dense(8)
    model = keras.Model(inputs, dense(keras.ops.sum(bank(inputs), axis=0)))
    data = np.random.default_rng(0).normal(size=(96, 8)).astype(np.float32)
    with pytest.raises(ValueError, match=r"no router of a known family chooses them"):
        tfgptopt.prune(model, 0.5, score=Wanda(data))
    with pytest.warns(UserWarning, match="3 weights of experts are rounded without data"):
        tfgptopt.quantize(model, Int8(), "gptq", data, verbose=0)


def test_a_mixture_without_idle_experts_says_nothing():
    model = make_mixture()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tfgptopt.quantize(model, Int8(), "gptq", DATA, verbose=0)
    assert np.isfinite(tf.convert_to_tensor(model(DATA))).all()
