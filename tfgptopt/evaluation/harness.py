"""Artifacts in lm-evaluation-harness (extra `harness`), for its hundreds of tasks."""

from __future__ import annotations

from typing import Any

from tfgptopt.evaluation.artifacts import Artifact
from tfgptopt.evaluation.likelihoods import encode_pair, log_likelihood
from tfgptopt.evaluation.tasks import continuation

try:
    from lm_eval.api.model import LM
except ImportError:
    raise ImportError(
        "Tasks of lm-evaluation-harness need it: pip install 'tfgptopt[harness]'."
    ) from None


class HarnessLM(LM):  # type: ignore[misc]
    """An artifact, as lm-evaluation-harness asks models.

    Args:
        artifact: What `open_artifact` gave, with a tokenizer.
        max_new_tokens: int. Most tokens of an answer, where a task does not say. Defaults to
            `256`.

    Raises:
        ValueError: If it has no tokenizer.
    """

    def __init__(self, artifact: Artifact, max_new_tokens: int = 256) -> None:
        super().__init__()
        if artifact.tokenizer is None:
            raise ValueError("The artifact has no tokenizer, so that it cannot read tasks.")
        self._artifact, self._most = artifact, max_new_tokens

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns how likely continuations of contexts are, and whether each is greedy."""
        pairs = (encode_pair(self._artifact, *request.args) for request in requests)
        return [log_likelihood(self._artifact, *pair) for pair in pairs]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns how likely whole texts are, in windows of the context."""
        found = []
        for request in requests:
            context, ids = encode_pair(self._artifact, "", request.args[0])
            step = (self._artifact.context_length or len(ids)) - 1
            total = 0.0
            for first in range(0, len(ids), step):
                before = context if first == 0 else ids[first - 1 : first]
                total += log_likelihood(self._artifact, before, ids[first : first + step])[0]
            found.append(total)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Returns greedy answers, cut where a stop text begins."""
        answers = []
        for request in requests:
            prompt, settings = request.args
            most = settings.get("max_gen_toks", self._most)
            text = continuation(self._artifact, prompt, most)
            stops = settings.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.partition(stop)[0]
            answers.append(text)
        return answers
