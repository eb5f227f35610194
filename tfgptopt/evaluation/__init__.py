"""Measures models and exported files: size, speed, and quality on held-out text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras_hub

from tfgptopt.data.corpus import tokens_as_input
from tfgptopt.evaluation.artifacts import Artifact, KerasArtifact, open_artifact
from tfgptopt.evaluation.energy import with_energy
from tfgptopt.evaluation.explain import Attribution, Method
from tfgptopt.evaluation.explain import explain as explain_prompt
from tfgptopt.evaluation.loss import perplexity
from tfgptopt.evaluation.processes import with_processes
from tfgptopt.evaluation.quality import Quality, compare_quality
from tfgptopt.evaluation.results import Result
from tfgptopt.evaluation.size import Size
from tfgptopt.evaluation.speed import Speed, compare_speed, with_latencies
from tfgptopt.evaluation.tasks import Task, continuation
from tfgptopt.evaluation.texts import Texts, Windowed, Windows, read_texts, windows_of
from tfgptopt.model.types import Data
from tfgptopt.terminal.progress import Verbose, showing, stage, track

__all__ = [
    "Quality",
    "Result",
    "Size",
    "Speed",
    "Texts",
    "Windows",
    "evaluate",
    "open_artifact",
    "perplexity",
    "read_texts",
]

_PROMPT = 16


def evaluate(
    models: Mapping[str, Any] | Sequence[str | Path],
    data: Data | Texts,
    prompt: Sequence[int] | None = None,
    new_tokens: int = 96,
    runs: int = 5,
    verbose: Verbose = "auto",
    reference: str | None = None,
    windows: Windows | None = None,
    tasks: Sequence[Task] = (),
    prompts: Sequence[str] = (),
    processes: bool = False,
    tokenizer: keras_hub.tokenizers.Tokenizer | None = None,
    explanation: Method | None = None,
    energy: bool = False,
) -> list[Result]:
    """Measures artifacts of any kind side by side, each as itself.

    An exported file is scored through its own signatures, not through the model it came from.

    Args:
        models: Names to causal LMs of KerasHub, dressed or not, or to paths of `.tflite`,
            `.litertlm` and `.gguf` files, SavedModels and presets; or a list of paths.
        data: Batches of `({"token_ids", "padding_mask"}, labels, sample_weight)`, such as
            `Corpus.validation`, for models of one tokenizer; or what `read_texts` gave: then each
            model reads it with its own tokenizer, and those of the reference's are compared with
            it token by token, the others by bits per byte.
        prompt: Token ids to generate from. Defaults to `None`: the first 16 of `data`.
        new_tokens: int. Tokens to generate for the speed. Defaults to `96`.
        runs: int. Generations whose median counts. Defaults to `5`.
        verbose: `"auto"`, 0, 1 or 2: silent, progress bars, or lines. Defaults to `"auto"`: bars in
            terminals and notebooks.
        reference: Name of the model that the others are compared with (KL, equal likeliest tokens,
            change of perplexity). Defaults to `None`: the first one, if there are several.
        windows: How texts are cut. Defaults to `None`: `Windows()`; only for texts.
        tasks: Tasks to be done by each, such as `MultipleChoice` and `References` of
            `tfgptopt.evaluation.tasks`. Defaults to none.
        prompts: Texts that each continues greedily, to be shown side by side. Defaults to none.
        processes: bool. Also load each artifact that lies on disk in a process of its own, for the
            time of loading and the peak memory. Defaults to `False`.
        tokenizer: Tokenizer for artifacts without one, such as SavedModels. Defaults to `None`.
        explanation: Method of `tfgptopt.evaluation.explain` that says which tokens of `prompts`
            the reference's next token hangs on, in each. Defaults to `None`: not asked.
        energy: bool. Also measure the joules of a token, where the processor counts them (RAPL;
            extra `energy`); elsewhere a warning says why there is no number. Defaults to `False`.

    Returns:
        List of `Result`, in the order of `models`.

    Raises:
        FileNotFoundError, ImportError: If an artifact is not there, or what reads it.
        ValueError: If there is no model, one is none of these, the reference is not among them, or
            the data are empty.

    Example:

    ```python
    results = tfgptopt.evaluate({"Keras": gpt, "TFLite": "gpt.tflite"}, corpus.validation)
    print([(r.name, r.perplexity, r.speed.tokens_per_second) for r in results])
    print(results[1].quality.kl, results[1].quality.intervals["change"])
    ```
    """
    if not models:
        raise ValueError("`models` is empty. Give names and models to measure.")
    named = models if isinstance(models, Mapping) else _names(models)
    if reference is not None and reference not in named:
        raise ValueError(f"`reference` must be one of {list(named)}. Received: {reference!r}")
    if reference is None and len(named) > 1:
        reference = next(iter(named))
    if windows is not None and not isinstance(data, Texts):
        raise ValueError("`windows` cut texts: give `read_texts(...)`, or batches without it.")
    artifacts = {name: _open(name, model, tokenizer) for name, model in named.items()}
    cut = {name: _windowed(name, one, data, windows) for name, one in artifacts.items()}
    with showing(verbose):
        begin = {name: list(prompt or _first(one)) for name, one in cut.items()}
        with stage("Measuring speed, in turns"):
            speeds = compare_speed(artifacts, begin, new_tokens, runs)
            speeds = with_latencies(speeds, artifacts)
        if energy:
            speeds = with_energy(speeds, artifacts, begin, new_tokens)
        if processes:
            speeds = with_processes(speeds, artifacts)
        with contextlib.ExitStack() as stack:
            for one in artifacts.values():
                if isinstance(one, KerasArtifact):
                    stack.enter_context(tokens_as_input(one.model))
            quality = _qualities(artifacts, cut, reference)
            scores = {n: {t.name: t.score(a) for t in tasks} for n, a in artifacts.items()}
            told = {name: _continued(one, prompts, new_tokens) for name, one in artifacts.items()}
            why = _explained(artifacts, reference, prompts, explanation)
    return [
        Result(name, one.size(), quality[name], speeds[name], scores[name], told[name], why[name])
        for name, one in artifacts.items()
    ]


def _names(paths: Sequence[str | Path]) -> dict[str, str | Path]:
    """Returns short names of paths, whole ones where two would be alike."""
    found: dict[str, str | Path] = {}
    for path in paths:
        short = Path(path).name or str(path)
        found[str(path) if short in found else short] = path
    return found


def _open(name: str, model: Any, tokenizer: Any) -> Artifact:
    try:
        return open_artifact(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from None


def _windowed(
    name: str, artifact: Artifact, data: Data | Texts, windows: Windows | None
) -> Windowed:
    """Returns the data as an artifact reads them.

    Raises:
        ValueError: If it has no tokenizer for texts, or too short a context.
    """
    if not isinstance(data, Texts):
        return Windowed(data)
    if artifact.tokenizer is None:
        raise ValueError(
            f"'{name}' has no tokenizer, so that it cannot read text. Give `tokenizer` (on the "
            "command line --tokenizer PRESET)."
        )
    windows = windows or Windows()
    if artifact.context_length is not None and artifact.context_length < windows.length:
        raise ValueError(
            f"'{name}' has a context of {artifact.context_length} tokens, and windows have "
            f"{windows.length}. Choose shorter windows (--sequence-length)."
        )
    return windows_of(data, artifact.tokenizer, artifact.start_token_id, windows)


def _first(windowed: Windowed) -> list[int]:
    """Returns the first tokens of data."""
    inputs, _, _ = next(windowed.batches.as_numpy_iterator())
    found: list[int] = inputs["token_ids"][0, :_PROMPT].tolist()
    return found


def _qualities(
    artifacts: Mapping[str, Artifact], cut: Mapping[str, Windowed], reference: str | None
) -> dict[str, Quality]:
    """Returns the qualities; those with the same tokens are measured together."""
    found: dict[str, Quality] = {}
    for group in _alike(artifacts, cut):
        windowed = cut[group[0]]
        known = reference if reference in group else None
        decode = _decoder([artifacts[name] for name in group])
        members = {name: artifacts[name] for name in group}
        found |= compare_quality(members, windowed, known, decode)
    return found


def _alike(artifacts: Mapping[str, Artifact], cut: Mapping[str, Windowed]) -> list[list[str]]:
    """Returns the names in groups that have the same windows."""
    groups: list[list[str]] = []
    for name in artifacts:
        for group in groups:
            if cut[group[0]].same_as(cut[name]):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _decoder(artifacts: Sequence[Artifact]) -> Callable[[list[int]], str] | None:
    """Returns what makes text of ids, from the first artifact that can."""
    return next((a.tokenizer.decode for a in artifacts if a.tokenizer is not None), None)


def _continued(artifact: Artifact, prompts: Sequence[str], new_tokens: int) -> dict[str, str]:
    """Returns what an artifact makes of prompts, if it can read them."""
    if artifact.tokenizer is None:
        return {}
    shown = track(prompts, "Continuing prompts")
    return {prompt: continuation(artifact, prompt, new_tokens) for prompt in shown}


def _explained(
    artifacts: Mapping[str, Artifact],
    reference: str | None,
    prompts: Sequence[str],
    method: Method | None,
) -> dict[str, dict[str, Attribution]]:
    """Returns attributions of prompts, all to the reference's next token."""
    found: dict[str, dict[str, Attribution]] = {name: {} for name in artifacts}
    first = reference or next(iter(artifacts))
    for prompt in prompts if method is not None else ():
        known = explain_prompt(artifacts[first], prompt, method or "occlusion")
        found[first][prompt] = known
        for name, artifact in artifacts.items():
            if name != first and artifact.tokenizer is not None:
                target = known.target_id
                one = explain_prompt(artifact, prompt, method or "occlusion", target)
                if one.tokens == known.tokens:  # Of other tokenizers, ids are other tokens.
                    found[name][prompt] = one
    return found
