"""Chooses a recipe by measuring: what `tfgptopt tune` does, with a record that it goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras_hub
import tensorflow as tf
from rich.console import Console

from tfgptopt.data.corpus import Corpus, tokens_as_input
from tfgptopt.evaluation import evaluate
from tfgptopt.evaluation.loss import keras_loss, tflite_loss
from tfgptopt.evaluation.machine import measure_machine
from tfgptopt.evaluation.results import Run, from_plain, save_results
from tfgptopt.evaluation.size import gzip_size
from tfgptopt.evaluation.speed import compare_speed
from tfgptopt.exporting import export
from tfgptopt.file.replacing import replacing
from tfgptopt.generation import TFLiteCausalLM
from tfgptopt.job.candidates import carry_out, default_candidates
from tfgptopt.job.optimizing import check_fit
from tfgptopt.job.outcome import first_words
from tfgptopt.job.reporting import write_report
from tfgptopt.job.search import Candidate, Found, Limits, Trial, search
from tfgptopt.recipe import recipe_of
from tfgptopt.terminal.progress import showing, stage

RECORD, KEPT, TRYING = "trials.jsonl", "kept.json", "trying.tflite"
# Of held-out text, in windows, and of the greedy generation that is timed.
_BATCHES, _AT_ONCE, _PROMPT, _NEW, _RUNS = 16, 8, 16, 32, 3


@dataclass(frozen=True)
class Tuning:
    """How long to search, and with what.

    Attributes:
        seconds: All that trials may take together.
        steps: Steps of training, in rising order; see `search`.
        learning_rate: Peak of the schedule of each training.
    """

    seconds: float = 900.0
    steps: tuple[int, ...] = (60, 180, 540)
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or self.steps[0] < 1 or not rising:
            raise ValueError(f"`steps` must rise, from 1 at least. Received: {self.steps}")
        if not self.seconds > 0 or not self.learning_rate > 0:
            raise ValueError(
                f"`seconds` and `learning_rate` must be positive. Received: {self.seconds}, "
                f"{self.learning_rate}"
            )


def tune(
    model: keras_hub.models.CausalLM,
    corpus: Corpus,
    limits: Limits,
    out: str | Path,
    tuning: Tuning | None = None,
    candidates: Sequence[Candidate] | None = None,
    console: Console | None = None,
) -> Found:
    """Searches for a recipe that meets limits, each measured on the file that it makes.

    The folder gets `trials.jsonl`, a line before and behind each trial; `model.tflite` and
    `recipe.yaml` of the one to keep; `results.json` and `report.html`, which compare it with the
    float model. The same call goes on from the record: a trial in which the process ended counts as
    failed.

    Args:
        model: A causal LM with a preprocessor. It is left as it is.
        corpus: Text to calibrate and train on, and to measure with.
        limits: What the file has to meet.
        out: Folder.
        tuning: How long to search. Defaults to `None`: `Tuning()`, 15 minutes.
        candidates: What to try. Defaults to `None`: see `default_candidates`.
        console: Where to show progress. Defaults to `None`: standard output.

    Returns:
        `Found`.

    Raises:
        ValueError: If model and corpus do not fit, or the folder holds a search of another model
            or text.
    """
    console, tuning = console or Console(), tuning or Tuning()
    check_fit(model, corpus)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    bench = _Bench(model, corpus, folder, tuning, limits, console)
    with showing("auto", console):
        known = bench.resume()
        chosen = default_candidates() if candidates is None else list(candidates)
        found = search(chosen, bench.measure, limits, tuning.seconds, tuning.steps, known)
        if found.kept is not None:
            bench.keep(found.kept, chosen)
            if bench.changed or not (folder / "report.html").exists():
                _write_report(model, corpus, found, folder)
    return found


class _Bench:
    """Carries candidates out, measures them, and keeps the record and the best file."""

    def __init__(
        self,
        model: keras_hub.models.CausalLM,
        corpus: Corpus,
        folder: Path,
        tuning: Tuning,
        limits: Limits,
        console: Console,
    ) -> None:
        self.model, self.corpus, self.folder = model, corpus, folder
        self.tuning, self.limits, self.console = tuning, limits, console
        self.held_out = _in_memory(corpus.validation.take(_BATCHES))
        with tokens_as_input(model):
            self.loss = keras_loss(model, self.held_out)
        self.best: Trial | None = None
        self.changed = False

    def resume(self) -> list[Trial]:
        """Returns the trials of the record, which is begun where there is none.

        Raises:
            ValueError: If it is of another model or text.
        """
        record = self.folder / RECORD
        mine = {"model": self._fingerprint()}
        if not record.exists():
            self._note(mine)
            return []
        lines = [_line(text) for text in record.read_text("utf-8").splitlines()]
        if not lines or lines[0] != mine:
            raise ValueError(
                f"'{record}' is of another model or text. Choose another folder, or remove it."
            )
        ended = [line for line in lines[1:] if line and "begun" not in line]
        trials = [from_plain(Trial, line, str(record)) for line in ended]
        done = {(trial.name, trial.steps) for trial in trials}
        for line in lines[1:]:
            if line and "begun" in line and (line["begun"], line["steps"]) not in done:
                name, steps = line["begun"], line["steps"]
                trial = Trial(name, steps, error="the process ended while it was tried")
                trials.append(trial)
                done.add((name, steps))
                self._note(dataclasses.asdict(trial))
        self.best = self._in_place(trials)
        self.console.print(f"Going on behind {len(trials)} trials")
        return trials

    def _in_place(self, trials: Sequence[Trial]) -> Trial | None:
        """Returns the trial whose file is there."""
        note = self.folder / KEPT
        if not note.exists() or not (self.folder / "model.tflite").exists():
            return None
        kept = _line(note.read_text("utf-8"))
        return next((t for t in trials if kept == {"name": t.name, "steps": t.steps}), None)

    def keep(self, trial: Trial, candidates: Sequence[Candidate]) -> None:
        """Makes sure that the file that is there is that of a trial: with other limits than those
        of the search that went before, it may be another one's."""
        if self.best is None or (self.best.name, self.best.steps) != (trial.name, trial.steps):
            (candidate,) = (one for one in candidates if one.name == trial.name)
            student = self._carried_out(candidate, trial.steps)
            self._put_in_place(trial, student)

    def _carried_out(self, candidate: Candidate, steps: int) -> Any:
        path, rate = self.folder / TRYING, self.tuning.learning_rate
        return carry_out(candidate, self.model, self.corpus, steps, path, rate, self.console)

    def _put_in_place(self, trial: Trial, student: Any) -> None:
        """Makes the file that was made last the one that is kept."""
        self.best, self.changed = trial, True
        (self.folder / KEPT).unlink(missing_ok=True)
        (self.folder / TRYING).replace(self.folder / "model.tflite")
        recipe = recipe_of(student)
        if recipe is not None:
            recipe.save(self.folder / "recipe.yaml")
        with replacing(self.folder / KEPT) as temporary:
            temporary.write_text(json.dumps({"name": trial.name, "steps": trial.steps}), "utf-8")

    def measure(self, candidate: Candidate, steps: int) -> Trial:
        """Returns what a candidate is like, or why it failed."""
        self._note({"begun": candidate.name, "steps": steps})
        began = time.perf_counter()
        trial = Trial(candidate.name, steps)
        path, student = self.folder / TRYING, None
        try:
            student = self._carried_out(candidate, steps)
            trial = self._measured(trial, path)
        except Exception as error:  # A recipe that crashes is passed over.
            words = (str(error) or type(error).__name__).splitlines()[0]
            trial = dataclasses.replace(trial, error=words[:300])
        trial = dataclasses.replace(trial, seconds=round(time.perf_counter() - began, 2))
        if trial.error is None and (self.best is None or self._rank(trial) < self._rank(self.best)):
            self._put_in_place(trial, student)
        path.unlink(missing_ok=True)
        self._note(dataclasses.asdict(trial))
        self.console.print(describe(trial))
        return trial

    def _measured(self, trial: Trial, path: Path) -> Trial:
        with stage(f"Measuring {trial.name}"):
            lm = TFLiteCausalLM(path, weight_cache=False)
            inputs, _, _ = next(self.held_out.as_numpy_iterator())
            prompt = inputs["token_ids"][0, : min(_PROMPT, lm.context_length // 2)].tolist()
            new = min(_NEW, lm.context_length - len(prompt))
            speed = compare_speed({"file": lm}, prompt, new, _RUNS)["file"].tokens_per_second
            rise = math.exp(tflite_loss(lm, self.held_out) - self.loss) - 1
        if not math.isfinite(rise):
            raise ValueError(f"Its perplexity is {rise}.")
        size, download = path.stat().st_size, gzip_size(path)
        return dataclasses.replace(trial, size=size, download=download, speed=speed, rise=rise)

    def _rank(self, trial: Trial) -> tuple[float, float]:
        return (max(self.limits.excess(trial).values(), default=0.0), trial.rise)

    def _note(self, line: dict[str, Any]) -> None:
        with (self.folder / RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _fingerprint(self) -> str:
        """Returns what tells this model and text from others."""
        found = hashlib.sha256()
        for weight in self.model.weights:
            found.update(weight.path.encode() + repr(tuple(weight.shape)).encode())
        found.update(f"{self.loss:.4f} {self.corpus.training_tokens}".encode())
        return found.hexdigest()


def _in_memory(data: tf.data.Dataset) -> tf.data.Dataset:
    """Returns data that all trials read, read once."""
    parts = zip(*data.unbatch().batch(1 << 20).as_numpy_iterator(), strict=True)
    (inputs,), (labels,), (weights,) = parts
    return tf.data.Dataset.from_tensor_slices((inputs, labels, weights)).batch(_AT_ONCE)


def _line(text: str) -> dict[str, Any]:
    """Returns a line of the record; one that was cut off is empty."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def _write_report(model: Any, corpus: Corpus, found: Found, folder: Path) -> None:
    """Writes what the kept file is like beside the float model."""
    assert found.kept is not None
    export(model, folder / "dense.tflite", overwrite=True)
    rows = {"float32": folder / "dense.tflite", found.kept.name: folder / "model.tflite"}
    prompts = first_words(corpus, model)
    new = min(_NEW, (getattr(model.backbone, "max_sequence_length", None) or 1024) - _PROMPT)
    results = evaluate(rows, corpus.validation, new_tokens=new, prompts=prompts)
    about = {"held-out text": corpus.validation_words, "trials": len(found.trials)}
    run = Run(tuple(results), "float32", about, measure_machine())
    save_results(run, folder / "results.json")
    write_report([run], folder / "report.html", f"Chosen: {found.kept.name}")


def describe(trial: Trial) -> str:
    """Returns a trial in a line."""
    steps = f", {trial.steps} steps" if trial.steps else ""
    if trial.error is not None:
        return f"{trial.name}{steps}: passed over, {trial.error}"
    return (
        f"{trial.name}{steps}: {trial.size / 1e6:.2f} MB ({trial.download / 1e6:.2f} gzip), "
        f"{trial.speed:,.0f} tokens/s, {trial.rise:+.1%}, in {trial.seconds:.0f} s"
    )


def verdict(found: Found, limits: Limits) -> str:
    """Returns what to keep, or honestly that nothing meets the limits, in words."""
    if found.kept is None:
        return "Nothing could be measured: all candidates failed."
    if not found.misses:
        steps = f", trained for {found.kept.steps} steps" if found.kept.steps else ""
        return f"Keep '{found.kept.name}'{steps}: it meets all limits."
    missed = ", ".join(f"{name} by {share:.0%}" for name, share in found.misses.items())
    return (
        f"Nothing that was tried meets the limits. The nearest is '{found.kept.name}', which "
        f"misses {missed}. Loosen a limit, give more time, or begin with a smaller model."
    )
