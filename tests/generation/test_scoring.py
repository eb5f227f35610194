"""What logits say of tokens, by the formulas, token by token."""

import numpy as np
import pytest

from tfgptopt.generation import scoring
from tfgptopt.generation.scoring import score_tokens


@pytest.mark.parametrize("vocabulary", [7, 3000])
def test_scores_are_those_of_the_formulas(vocabulary, monkeypatch):
    monkeypatch.setattr(scoring, "_AT_ONCE", 9000)  # Parts that do not divide the rows evenly.
    monkeypatch.setattr(scoring, "_THREADED", 20_000)
    generator = np.random.default_rng(0)
    own, known = 30 * generator.normal(size=(2, 23, vocabulary)).astype(np.float32)
    own[4] = known[4]  # One row where both are alike.
    tokens = generator.integers(0, vocabulary, 23)
    tokens[:5] = own[:5].argmax(-1)
    found = score_tokens((own[:10], own[10:11], own[11:]), tokens, known)
    for row, token in enumerate(tokens):
        logs, others = (
            x - x.max() - np.log(np.exp(x - x.max()).sum())
            for x in (own[row].astype(np.float64), known[row].astype(np.float64))
        )
        assert found.losses[row] == pytest.approx(-logs[token], rel=1e-5, abs=1e-5)
        assert found.likelier[row] == (logs > logs[token]).sum()
        divergence = (np.exp(others) * (others - logs)).sum()
        assert found.divergences[row] == pytest.approx(divergence, rel=1e-4, abs=1e-5)
        assert found.alike[row] == (logs.argmax() == others.argmax())
    assert (found.likelier[:5] == 0).all() and found.alike[4]
    alone = score_tokens([own], tokens, known[:, :-1])  # Other vocabularies do not compare.
    assert np.isnan(alone.divergences).all() and (alone.losses == found.losses).all()
