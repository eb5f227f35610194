"""Samplers against the formulas of their papers, written plainly, and against frequencies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tfgptopt.generation import Greedy, MinP, Random, RepetitionPenalty, TopK, TopP
from tfgptopt.generation.samplers import choose, get

steps = st.integers(-480, 480).map(lambda i: i / 16)
logits_of_any_kind = arrays(np.float32, st.integers(2, 40), elements=steps, unique=True)
temperatures = st.floats(0.125, 8)


def softmax(x):
    weights = np.exp(np.asarray(x, np.float64) - np.max(x))
    return weights / weights.sum()


def kept(logits):
    return set(np.flatnonzero(logits > -np.inf).tolist())


@given(logits_of_any_kind, st.integers(1, 50), temperatures)
def test_top_k_keeps_the_k_most_likely(logits, k, temperature):
    result = TopK(k, temperature)(logits, [])
    best = np.argsort(-logits)[:k]
    assert kept(result) == set(best.tolist())
    np.testing.assert_allclose(result[best], logits[best] / temperature, rtol=1e-6)


@given(logits_of_any_kind, st.floats(0.01, 1), temperatures)
def test_top_p_keeps_the_fewest_that_sum_up_to_p(logits, p, temperature):
    result = TopP(p, temperature=temperature)(logits, [])
    probabilities = softmax(logits / np.float32(temperature))
    chosen = sorted(kept(result), key=lambda i: -probabilities[i])
    assert chosen[0] == logits.argmax()
    assert probabilities[chosen].sum() >= p - 1e-6
    assert probabilities[chosen[:-1]].sum() < p + 1e-6
    left_out = [x for i, x in enumerate(probabilities) if i not in chosen]
    assert max(left_out, default=0) <= probabilities[chosen].min()


@given(logits_of_any_kind, st.floats(0.01, 1), temperatures)
def test_min_p_keeps_what_is_near_the_most_likely(logits, p, temperature):
    result = MinP(p, temperature)(logits, [])
    ratios = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    assert kept(result) >= set(np.flatnonzero(ratios > p * 1.001).tolist()) | {logits.argmax()}
    assert kept(result) <= set(np.flatnonzero(ratios > p * 0.999).tolist())


@given(logits_of_any_kind, st.floats(0.5, 2), st.data())
def test_repetition_penalty_is_that_of_ctrl(logits, penalty, data):
    tokens = data.draw(st.lists(st.integers(0, logits.size - 1), max_size=6))
    expected = logits.astype(np.float64)
    for token in set(tokens):
        expected[token] *= penalty if expected[token] < 0 else 1 / penalty
    before = logits.copy()
    np.testing.assert_allclose(RepetitionPenalty(penalty)(logits, tokens), expected, rtol=1e-5)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    ("sampler", "weights"),
    [
        (Random(), [0.5, 0.25, 0.15, 0.1]),
        (Random(0.5), np.square([0.5, 0.25, 0.15, 0.1])),
        (TopK(2), [0.5, 0.25, 0, 0]),
        (TopP(0.7), [0.5, 0.25, 0, 0]),
        (TopP(0.9, k=2), [0.5, 0.25, 0, 0]),
        (MinP(0.25), [0.5, 0.25, 0.15, 0]),
        ([TopK(3), Random(0.5)], np.square([0.5, 0.25, 0.15, 0])),
        ([TopK(3), TopP(0.5)], [0.5, 0, 0, 0]),
        # A negative logit is doubled: the probability 0.25 of token 1 counts as 0.0625.
        ([RepetitionPenalty(2.0), TopK(2)], [0.5, 0, 0.15, 0]),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(sampler, weights):
    logits = np.log(np.asarray([0.5, 0.25, 0.15, 0.1], np.float32))
    expected = np.asarray(weights, np.float64)
    generator = np.random.default_rng(0)
    draws = [choose(logits, [1], get(sampler), generator) for _ in range(6000)]
    shares = np.bincount(draws, minlength=4) / len(draws)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.025)


def test_greedy_alone_and_behind_others():
    logits = np.asarray([1.0, 3.0, 2.9], np.float32)
    generator = np.random.default_rng(0)
    assert choose(logits, [], get("greedy"), generator) == 1
    assert choose(logits, [1], [RepetitionPenalty(1.5), Greedy()], generator) == 2
    assert choose(logits, [], [Greedy(), Random(100.0)], generator) == 1


def test_a_function_is_a_sampler():
    def odd(logits, tokens):
        return np.where(np.arange(logits.size) % 2, logits, -np.inf)

    logits, generator = np.zeros(6, np.float32), np.random.default_rng(0)
    assert {choose(logits, [], get([odd, "random"]), generator) for _ in range(60)} == {1, 3, 5}
    with pytest.raises(ValueError, match="left no token"):
        choose(logits, [], get(lambda logits, tokens: logits - np.inf), generator)


@pytest.mark.parametrize(
    ("sampler", "arguments"),
    [
        (TopK, {"k": 0}),
        (TopK, {"k": 2.0}),
        (TopK, {"k": True}),
        (TopK, {"temperature": 0.0}),
        (Random, {"temperature": float("nan")}),
        (Random, {"temperature": float("inf")}),
        (TopP, {"p": 0.0}),
        (TopP, {"p": 1.5}),
        (TopP, {"k": 0}),
        (MinP, {"p": -0.1}),
        (RepetitionPenalty, {"penalty": 0}),
    ],
)
def test_settings_out_of_range_are_named(sampler, arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must"):
        sampler(**arguments)


@pytest.mark.parametrize("wrong", ["beam", TopK, [], ["beam"], 3])
def test_what_is_no_sampler_is_refused(wrong):
    with pytest.raises(ValueError, match="`sampler` must be one of greedy, random, top_k"):
        get(wrong)
