"""Bins of weights, against numpy on the model's own variables."""

import numpy as np
import pytest
from conftest import make_gpt

import tfgptopt
from tfgptopt.evaluation.distributions import distributions
from tfgptopt.quantization import Int4


def test_bins_are_those_of_numpy():
    before, after = make_gpt(), make_gpt()
    after.set_weights(before.get_weights())
    tfgptopt.prune(after, 0.5, targets="feedforward_intermediate_dense/kernel")
    tfgptopt.quantize(after, Int4())
    tfgptopt.finalize(after)
    found = distributions(before, after)
    place = "transformer_layer_*/feedforward_intermediate_dense/kernel"
    one = found[place]
    whole, rounded = (
        np.concatenate(
            [w.numpy().ravel() for w in model.weights
             if "feedforward_intermediate_dense/kernel" in w.path]
        )
        for model in (before, after)
    )  # fmt: skip
    bins = np.linspace(one.low, one.high, len(one.before) + 1)
    np.testing.assert_allclose(one.before, np.histogram(whole, bins)[0] / len(whole), atol=1e-6)
    kept = rounded[rounded != 0]
    np.testing.assert_allclose(one.after, np.histogram(kept, bins)[0] / len(rounded), atol=1e-6)
    assert one.zeros == pytest.approx((rounded == 0).mean()) and one.zeros >= 0.5
    assert sum(one.after) + one.zeros > 0.99 and sum(one.before) > 0.99
    assert one.after[len(one.after) // 2] == 0  # Small weights were pruned, or rounded to zero.
    assert len(found) > 5 and found["token_embedding/embeddings"].zeros < 0.5


def test_weights_that_are_all_zero():
    before, after = make_gpt(), make_gpt()
    after.set_weights([0 * w for w in before.get_weights()])
    one = distributions(before, after)["token_embedding/embeddings"]
    assert one.zeros == 1 and not any(one.after) and sum(one.before) > 0.99
