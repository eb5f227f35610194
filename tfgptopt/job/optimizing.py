"""The whole job: train or load, optimize in `fit`, export, measure, report."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import keras_hub
from rich.console import Console

from tfgptopt.callbacks import from_recipe
from tfgptopt.data.corpus import Corpus
from tfgptopt.data.presets import save_preset
from tfgptopt.decoder import check_readable
from tfgptopt.distillation import Distiller
from tfgptopt.distillation.technique import Distill
from tfgptopt.evaluation import evaluate
from tfgptopt.evaluation.bigram import bigram_loss
from tfgptopt.evaluation.distributions import distributions
from tfgptopt.evaluation.machine import measure_machine
from tfgptopt.exporting import TFLite, export
from tfgptopt.file.replacing import check_target, replacing
from tfgptopt.job.outcome import Curve, Outcome, first_words, rounding_noise, write_results
from tfgptopt.job.reporting import write_report
from tfgptopt.job.stages import checkpoints_beside, train
from tfgptopt.model.changing import build_optimizer, strategy_scope
from tfgptopt.model.cloning import clone
from tfgptopt.model.current import has_adapters
from tfgptopt.model.history import history_of, record
from tfgptopt.model.targets import Target, candidates
from tfgptopt.pruning.pruner import zero_share
from tfgptopt.quantization.rotatable import check_rotatable, rotatable
from tfgptopt.quantization.rotation import Rotate, check_not_learned, rotate
from tfgptopt.recipe import Recipe
from tfgptopt.recipe.finalizing import finalize
from tfgptopt.shrinking.shrinker import fill, prepare, shrink
from tfgptopt.shrinking.technique import Shrink
from tfgptopt.terminal.progress import showing
from tfgptopt.training.planning import Training, compile_model

# Of training windows, for scores that read data.
_CALIBRATION_BATCHES = 16


def check_causal_lm(model: keras.Model) -> None:
    """Raises early if a model cannot be exported with a KV cache.

    Raises:
        ValueError: If it has no reader and is no causal LM, which the converter could take.
    """
    if not isinstance(model, keras_hub.models.CausalLM):
        check_readable(model)


def add_adapters(model: keras.Model, training: Training) -> None:
    """Freezes a causal LM and gives its attention LoRA adapters, which train in its place.

    Raises:
        ValueError: If its backbone has no layer that takes them.
    """
    with strategy_scope(model):
        model.backbone.enable_lora(training.lora)
        if not any(has_adapters(layer) for layer in model._flatten_layers()):
            raise ValueError(
                f"{type(model).__name__} has no layer that takes LoRA adapters: leave out `lora`."
            )
        compile_model(model, training)


def _check_adapters(recipe: Recipe, training: Training) -> None:
    """Raises where a recipe and LoRA adapters do not go together.

    Raises:
        ValueError: If the recipe shrinks or rotates.
    """
    first = next((one for one in recipe.techniques if isinstance(one, Shrink | Rotate)), None)
    if training.lora is not None and first is not None:
        raise ValueError(
            f"A recipe with `{first.name}` cannot train LoRA adapters alone: all weights of the "
            f"model change. Leave out `lora`, or {first.name} in a job of its own."
        )


def _files_for(model: keras.Model, corpus: Corpus, context_length: int | None) -> TFLite:
    """Returns the format of the files that a job writes.

    Raises:
        ValueError: If the model has fewer positions, or the windows do not fit into them.
    """
    most = getattr(model.backbone, "max_sequence_length", None) or math.inf
    if context_length is not None and not corpus.sequence_length <= context_length <= most:
        raise ValueError(
            f"`context_length` must be at least {corpus.sequence_length}, the windows that measure "
            f"the files, and at most {most}, the model's positions. Received: {context_length}"
        )
    return TFLite(context_length)


def check_fit(model: keras.Model, corpus: Corpus) -> None:
    """Raises early if a model cannot be trained on a corpus and exported.

    Raises:
        ValueError: If the family cannot be exported, or the vocabulary or the number of positions
            is too small.
    """
    check_causal_lm(model)
    tokens, known = corpus.tokenizer.vocabulary_size(), model.backbone.vocabulary_size
    if tokens > known:
        raise ValueError(
            f"The tokenizer has {tokens} tokens, and the model's vocabulary only {known}."
        )
    positions = getattr(model.backbone, "max_sequence_length", None)
    if positions is not None and corpus.sequence_length > positions:
        raise ValueError(
            f"A window has {corpus.sequence_length} tokens, and the model only {positions} "
            "positions. Choose shorter windows."
        )


def check_recipe(model: keras.Model, corpus: Corpus, recipe: Recipe) -> Any:
    """Raises early if a recipe cannot be applied, before anything is trained.

    What comes behind a budget is checked on the model as it is: its shape is found on data.

    Returns:
        A smaller model with random weights if the recipe shrinks by numbers, else the model itself.

    Raises:
        ValueError: If it is empty, or a stage does not fit the model that the stages before make.
    """
    check_fit(model, corpus)
    if not recipe.techniques:
        raise ValueError("The recipe has no technique, so there is nothing to optimize.")
    student = model
    for stage in recipe.techniques:
        if isinstance(stage, Shrink):
            if stage.vocabulary is not None:
                raise ValueError(
                    "A job cannot shrink the vocabulary: perplexities of different tokens do not "
                    "compare. Use `tfgptopt.shrink(model, vocabulary=...)` before. Received: "
                    f"{stage!r}"
                )
            student = student if stage.budget else prepare(student, stage)
            check_fit(student, corpus)
        if isinstance(stage, Rotate):
            check_not_learned(stage)
            check_rotatable(rotatable(student))
        if isinstance(stage, Distill):
            if stage.steps is None:
                raise ValueError(f"A job needs `steps` of distill. Received: {stage!r}")
            Distiller(student, "self" if student is model else model, stage.losses)
    for callback in from_recipe(recipe.in_fit, corpus.train.take(_CALIBRATION_BATCHES)):
        callback.set_model(student)  # Raises if its targets are not in the model.
    return student


def _variables(model: keras.Model) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


def _snapshot(model: keras.Model) -> list[Any]:
    build_optimizer(model)
    return [keras.ops.convert_to_numpy(variable) for variable in _variables(model)]


def _restore(model: keras.Model, snapshot: Sequence[Any]) -> None:
    for variable, value in zip(_variables(model), snapshot, strict=True):
        variable.assign(value)


def _copy(model: keras.Model) -> Any:
    """Returns a plain copy of a causal LM."""
    copy = clone(model)
    record(copy, *history_of(model))
    copy.compile(sampler="greedy")
    return copy


@dataclass(eq=False)
class _Job:
    """What a job works on, and what it has so far.

    Attributes:
        model: The model as it is now: a stage may put another one in its place.
        corpus, training, console: What the job was given.
        prepared: The smaller model, to be filled when it is time; `None` if its shape is searched.
        curves: See `Outcome`.
        stages: Names to copies of the model after each stage before the last, with float weights.
        checkpoints: Folder of the checkpoints of each training.
    """

    model: keras.Model
    corpus: Corpus
    training: Training
    console: Console
    prepared: Any = None
    curves: dict[str, Curve] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    checkpoints: Path | None = None

    def train(
        self, name: str, model: keras.Model, steps: int, callbacks: Sequence[Any] = ()
    ) -> None:
        """Trains a model, and keeps the curve."""
        data, folder = self.corpus.train, self.checkpoints
        curve = train(model, data, steps, name, self.console, callbacks, folder)
        self.curves[name] = curve

    def keep(self, name: str) -> None:
        """Keeps a copy of the model, to be measured as a stage."""
        self.stages[name] = _copy(self.model)

    def shrink(self, stage: Shrink) -> None:
        """Puts a smaller model in the place of the model."""
        calibration = self.corpus.train.take(_CALIBRATION_BATCHES)
        if self.prepared is None:
            self.model = shrink(self.model, calibration=calibration, **stage.settings())
        else:
            fill(self.model, self.prepared, stage, calibration)
            self.model = self.prepared
        check_fit(self.model, self.corpus)
        self.keep("shrunk")

    def distiller(self, teacher: keras.Model, stage: Distill, steps: int) -> Distiller:
        """Returns a distiller of the model, compiled for so many steps."""
        with strategy_scope(self.model):
            distiller = Distiller(self.model, teacher, stage.losses)
            compile_model(distiller, replace(self.training, shared_steps=0, steps=steps))
        return distiller

    def run_stages(self, recipe: Recipe, teacher: keras.Model) -> Any:
        """Shrinks, rotates and distills, and returns what is trained from then on."""
        trained, steps = None, self.training.steps
        for stage in recipe.techniques:
            if isinstance(stage, Shrink):
                self.shrink(stage)
                with strategy_scope(self.model):
                    compile_model(self.model, replace(self.training, shared_steps=0))
            if isinstance(stage, Rotate):
                rotate(self.model, stage)
                with strategy_scope(self.model):
                    # What the optimizer knew of weights was of those before.
                    compile_model(self.model, replace(self.training, shared_steps=0))
            if isinstance(stage, Distill):
                name = "distilled"
                record(self.model, stage)
                first = stage.steps or 0  # Never none: `check_recipe` has looked.
                if first:
                    self.train(name, self.distiller(teacher, stage, first), first)
                    self.keep(name)
                trained = self.distiller(teacher, stage, steps)
        return trained or self.model


def optimize(
    model: keras.Model,
    corpus: Corpus,
    recipe: Recipe,
    training: Training,
    out: str | Path,
    strategy: str = "default strategy",
    overwrite: bool = False,
    console: Console | None = None,
    context_length: int | None = None,
    resume: bool = False,
) -> Outcome:
    """Optimizes a causal LM in `fit`, exports it, measures it and writes a report.

    A recipe may shrink the model and distill into it first: the dense model is then the teacher,
    in the stage `distill` and while the student is pruned and rounded. Steps of the recipe count
    from the beginning of its last stage there.

    The folder gets: `model.tflite` (optimized), `dense.tflite` (float32, for comparison), one
    `.tflite` for each stage before (`shrunk`, `distilled`; float32), `saved_model`, `model` (a
    KerasHub preset, finalized), `recipe.yaml`, `results.json` and `report.html`. It appears when
    all is done. Until then, a folder beside it, whose name ends with `.checkpoints`, holds what the
    same call with `resume=True` goes on from.

    Args:
        model: A `keras_hub.models.GPT2CausalLM` with a preprocessor, compiled.
        corpus: Text to train on and to measure with.
        recipe: The techniques, their schedules in steps of the optimizer.
        training: How long to train.
        out: The folder to write.
        strategy: The strategy in use, in words.
        overwrite: bool. Replace an existing folder. Defaults to `False`.
        console: Where to show progress. Defaults to `None`: standard output.
        context_length: int. Positions of the KV cache of the files. Defaults to `None`: all that
            the model has.
        resume: bool. Go on where the same job was stopped; there may be nothing yet. Defaults to
            `False`.

    Returns:
        `Outcome`.

    Raises:
        FileExistsError: If `out` exists and `overwrite` is false, or checkpoints of a job that was
            stopped are there, and neither `resume` nor `overwrite` is true.
        ValueError: If model, corpus and recipe do not fit together.
    """
    console = console or Console()
    target = check_target(out, overwrite)
    _check_adapters(recipe, training)
    in_fit, calibration = recipe.in_fit, corpus.train.take(_CALIBRATION_BATCHES)
    student = check_recipe(model, corpus, recipe)
    files = _files_for(student, corpus, context_length)
    checkpoints = checkpoints_beside(target, overwrite, resume)
    prepared = None if student is model else student
    job = _Job(model, corpus, training, console, prepared, checkpoints=checkpoints)
    if training.shared_steps:
        job.train("dense, shared part", model, training.shared_steps)
    shared = _snapshot(model)
    if training.dense_run:
        job.train("dense", model, training.steps)
    dense = _copy(model)
    _restore(model, shared)
    if training.lora is not None:
        add_adapters(model, training)
    with showing("auto", console):
        trained = job.run_stages(recipe, dense)
        if in_fit.techniques:
            callbacks = from_recipe(in_fit, calibration)
            job.train("optimized", trained, training.steps, callbacks)
        with replacing(target) as folder:
            folder.mkdir()
            outcome = _measure_and_write(job, dense, recipe, strategy, folder, files)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return outcome


def _measure_and_write(
    job: _Job, dense: Any, recipe: Recipe, strategy: str, folder: Path, files: TFLite
) -> Outcome:
    model, corpus = job.model, job.corpus
    found = [item for item in candidates(model) if isinstance(item, Target)]
    kernels = {t.path: zero_share(t) for t in found if t.role == "kernel"}
    noise = rounding_noise(model)
    small = export(model, folder / "model.tflite", files)
    large = export(dense, folder / "dense.tflite", files)
    if recipe.in_fit.techniques or job.training.lora is not None:
        finalize(model)
    rows: dict[str, Any] = {"dense Keras": dense, "dense TFLite": large}
    # The last stage is the optimized model where nothing is pruned or rounded behind it.
    before = list(job.stages)[: None if recipe.in_fit.techniques else -1]
    for name in before:
        rows[f"{name} TFLite"] = export(job.stages[name], folder / f"{name}.tflite", files)
    rows |= {"optimized Keras": model, "optimized TFLite": small}
    positions = files.context_length
    if positions is None:
        positions = getattr(model.backbone, "max_sequence_length", 1024)
    prompts = first_words(corpus, dense)
    results = evaluate(rows, corpus.validation, new_tokens=min(96, positions - 16), prompts=prompts)
    export(model, folder / "saved_model")
    save_preset(model, folder / "model")
    recipe.save(folder / "recipe.yaml")
    outcome = Outcome(
        results=results,
        curves=job.curves,
        sparsity=kernels,
        bigram_loss=bigram_loss(corpus.train, corpus.validation, model.backbone.vocabulary_size),
        recipe=recipe,
        strategy=strategy,
        corpus=corpus,
        noise=noise,
        weights=distributions(dense, model),
        machine=measure_machine(),
    )
    write_results(outcome, folder / "results.json")
    write_report([outcome.as_run()], folder / "report.html")
    return outcome


def small_gpt(corpus: Corpus, **shape: int) -> keras_hub.models.GPT2CausalLM:
    """Returns a small GPT-2 for a corpus, with random weights.

    Args:
        corpus: Gives the tokenizer and the length of the windows.
        **shape: `num_layers`, `num_heads`, `hidden_dim`, `intermediate_dim`, and
            `max_sequence_length`.
    """
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=corpus.tokenizer.vocabulary_size(), dropout=0.0, **shape
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        corpus.tokenizer, sequence_length=shape["max_sequence_length"]
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=preprocessor)
