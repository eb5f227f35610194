"""How likely an artifact finds a continuation: what tasks of choices count with."""

from __future__ import annotations

import numpy as np

from tfgptopt.evaluation.artifacts import Artifact
from tfgptopt.evaluation.reading import logits_behind
from tfgptopt.generation.scoring import score_tokens


def encode_pair(artifact: Artifact, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns the ids of a context and of what follows it, as lm-evaluation-harness cuts them.

    Spaces at the end of the context belong to what follows; both are tokenized together.

    Args:
        artifact: With a tokenizer.
        context: Text, or `""`: then the start token, or the first token itself, is the context.
        continuation: Text.

    Raises:
        ValueError: If the artifact has no tokenizer, or there is nothing to predict.
    """
    if artifact.tokenizer is None:
        raise ValueError("The artifact has no tokenizer, so that it cannot read the task's text.")
    encode, start = artifact.tokenizer.encode, artifact.start_token_id
    begin = [] if start is None else [start]
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    whole = encode(context + continuation, False)
    length = len(encode(context, False)) if context else 0
    read, rest = [*begin, *whole[:length]], whole[length:]
    if not read:
        read, rest = rest[:1], rest[1:]
    if not rest:
        raise ValueError(
            f"There is no token to predict in {continuation!r} behind {context[-20:]!r}."
        )
    return read, rest


def log_likelihood(
    artifact: Artifact, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    """Returns how likely a continuation is.

    Args:
        artifact: What is asked.
        context: Ids before it, at least one; cut at their beginning where all does not fit.
        continuation: Ids.

    Returns:
        `(log_likelihood, greedy)`: the sum of the natural logarithms of the tokens' probabilities,
        and whether each is the likeliest.

    Raises:
        ValueError: If the continuation alone is longer than the artifact's context.
    """
    most = artifact.context_length
    ids = [*context, *continuation]
    if most is not None and len(continuation) > most:
        raise ValueError(
            f"A continuation has {len(continuation)} tokens, and the context only {most}."
        )
    read = ids[:-1] if most is None else ids[:-1][-most:]
    parts = logits_behind(artifact, read, len(read) - len(continuation))
    scores = score_tokens(parts, np.asarray(continuation, int))
    return -float(scores.losses.sum()), bool((scores.likelier == 0).all())
