"""Formats as settings, and one from outside the package."""

import dataclasses
import warnings
from pathlib import Path
from typing import ClassVar

import keras
import numpy as np
import pytest

import tfgptopt
from tfgptopt.exporting import SavedModel, TFLite, formats, register_format


@dataclasses.dataclass(frozen=True)
class Weights:
    """A toy format: the weights of a model as `.npz`."""

    dtype: str = "float32"

    suffix: ClassVar[str] = ".npz"

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"`dtype` must be float16 or float32. Received: {self.dtype!r}")

    def write(self, model: keras.Model, target: Path) -> None:
        with target.open("wb") as file:
            np.savez(file, *[weight.astype(self.dtype) for weight in model.get_weights()])


@pytest.fixture
def registered():
    register_format(Weights)
    yield
    del formats._by_suffix[Weights.suffix]


@pytest.fixture(scope="module")
def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


def test_a_format_from_outside_is_chosen_by_suffix_and_by_object(registered, model, tmp_path):
    path = tfgptopt.export(model, tmp_path / "weights.npz")
    assert np.load(path)["arr_0"].dtype == np.float32
    tfgptopt.export(model, path, Weights("float16"), overwrite=True)
    assert np.load(path)["arr_0"].dtype == np.float16
    with pytest.raises(ValueError, match=r"Weights ends with '\.npz'"):
        tfgptopt.export(model, tmp_path / "weights.tflite", Weights())
    with pytest.raises(ValueError, match=r"a SavedModel is that of a folder\. .* Weights"):
        tfgptopt.export(model, path, SavedModel(), overwrite=True)
    with pytest.raises(ValueError, match="those of Weights"):
        register_format(type("Other", (Weights,), {}))
    assert [each.name for each in tmp_path.iterdir()] == ["weights.npz"]


def test_an_object_needs_no_registration(model, tmp_path):
    assert tfgptopt.export(model, tmp_path / "weights.npz", Weights()).is_file()


def test_the_name_chooses_a_format_of_the_package(model, tmp_path):
    assert formats.format_of(Path("a.tflite")) == TFLite()
    assert formats.format_of(Path("a.model")) == SavedModel() == formats.format_of(Path("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tfgptopt.export(model, tmp_path / "a.tflite", TFLite())


def test_what_is_no_format_is_refused(model, tmp_path):
    for wrong in (TFLite, "tflite", 64):
        with pytest.raises(ValueError, match="must be settings such as"):
            tfgptopt.export(model, tmp_path / "a.tflite", wrong)
    with pytest.raises(ValueError, match="is a class with a `suffix`"):
        register_format(int)
    with pytest.raises(ValueError, match="begins with a dot"):
        register_format(type("Bad", (Weights,), {"suffix": "npz"}))
    with pytest.raises(ValueError, match="float16 or float32"):
        Weights("int8")
    for settings in ({"sparse": 1}, {"cache_dtype": "float16"}, {"context_length": 1}):
        with pytest.raises(ValueError, match="Received"):
            TFLite(**settings)


def test_a_format_that_fails_leaves_nothing_behind(model, tmp_path):
    class Failing:
        suffix = ".npz"

        def write(self, model, target):
            target.write_text("half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        tfgptopt.export(model, tmp_path / "new" / "deep" / "a.npz", Failing())
    assert list(tmp_path.iterdir()) == []
