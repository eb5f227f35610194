"""Fixtures: small models and a small text. Two logical CPUs stand in for two GPUs."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Two workers share two cores: threads that wait for work would only take time from each other.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TFGPTOPT_WEIGHT_CACHE"] = "off"  # Tests leave the user's folders alone.

import json.scanner
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.util import tf_stack

from tfgptopt.model.changing import build_optimizer

# Traced graphs are many objects, and most of them stay: `forget_what_stays` does the rest.
gc.set_threshold(20_000, 10, 10)
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

# TensorFlow writes down for each operation of a graph where it was made. Below pytest that is far.
_here = tf_stack.extract_stack()
tf_stack.extract_stack = lambda stacklevel=1: _here

_fit = keras.Model.fit


def _fit_traced_once(model: keras.Model, *args, **kwargs):
    """A step whose optimizer has no variables yet is traced twice, which takes half of a test."""
    build_optimizer(model)
    return _fit(model, *args, **kwargs)


keras.Model.fit = _fit_traced_once

# Files that take longest begin, so that no worker is left alone with one of them at the end.
_LONGEST = ("test_documents", "test_notebooks", "training/test_workers", "test_examples",
            "test_cli", "test_own_model", "test_optimizing", "callbacks", "test_number_type_plugin",
            "test_converting")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first."""
    items.sort(key=lambda item: not any(name in item.path.as_posix() for name in _LONGEST))


@pytest.fixture(autouse=True, scope="module")
def forget_what_stays():
    """Traced graphs of former files are looked at no more: a full collection takes seconds."""
    yield
    gc.collect()
    gc.freeze()


VOCABULARY = 300
CONTEXT = 32


def make_gpt(
    vocabulary_size: int = VOCABULARY, preprocessor=None, context: int = CONTEXT, layers: int = 2
):
    """Returns a small GPT-2 with random weights, biases included.

    A test with a `fit` takes as long as TensorFlow traces its layers: one of them often does.
    """
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=vocabulary_size,
        num_layers=layers,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        dropout=0.0,
        max_sequence_length=context,
    )
    generator = np.random.default_rng(0)
    for weight in backbone.weights:
        if weight.path.endswith(("bias", "beta")):
            weight.assign(generator.normal(0, 0.1, weight.shape))
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=preprocessor)


def random_batch(rows: int = 8, length: int = 16, seed: int = 0):
    """Returns inputs and labels of random tokens."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length + 1), np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((rows, length), np.int32)}
    return inputs, tokens[:, 1:]


def two_replicas():
    """Returns a strategy of two replicas that needs no collective operations.

    Those of two strategies in one process can be taken for each other.
    """
    reduce = tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=reduce)


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(1)


@pytest.fixture
def gpt():
    """A built, uncompiled GPT-2 without preprocessor."""
    return make_gpt()


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """A folder with three files of Python source."""
    folder = tmp_path_factory.mktemp("text")
    for module in (json.decoder, json.encoder, json.scanner):
        source = Path(module.__file__)
        (folder / source.name).write_text(source.read_text("utf-8"), "utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(text_files):
    """Windows of 16 tokens of three files of Python source."""
    from tfgptopt.data import load_corpus

    return load_corpus(
        text_files,
        vocabulary_size=VOCABULARY,
        sequence_length=16,
        batch_size=8,
        validation_share=0.2,
    )


@pytest.fixture(scope="session")
def trained(corpus):
    """A GPT-2 with tokenizer, pruned and quantized to int8 in one short `fit`, still dressed."""
    from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

    from tfgptopt.data import tokens_as_input
    from tfgptopt.pruning import PolynomialDecay
    from tfgptopt.quantization import Int8

    keras.utils.set_random_seed(1)
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        corpus.tokenizer, sequence_length=CONTEXT
    )
    model = make_gpt(corpus.tokenizer.vocabulary_size(), preprocessor)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), sampler="greedy")
    callbacks = [
        Pruning(PolynomialDecay(0.0, 0.5, 5, 45, frequency=10)),
        QuantizationAwareTraining(Int8()),
    ]
    with tokens_as_input(model):
        model.fit(corpus.train.repeat(), steps_per_epoch=60, verbose=0, callbacks=callbacks)
    return model


@pytest.fixture(scope="session")
def few_windows(text_files):
    """A corpus of one short file, for examples."""
    from tfgptopt.data import load_corpus

    source = text_files / "scanner.py"
    return load_corpus(source, vocabulary_size=300, sequence_length=32, batch_size=4)


@pytest.fixture(scope="session")
def shown_folder(few_windows, text_files, tmp_path_factory):
    """A folder with what examples read."""
    from shown import fill_folder

    folder = tmp_path_factory.mktemp("shown")
    fill_folder(folder, few_windows, text_files)
    return folder
