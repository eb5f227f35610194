"""Estimates against models that are built."""

import keras_hub
import pytest
from conftest import make_gpt

import tfgptopt
from tfgptopt.evaluation.advising import (
    Shape,
    estimate_files,
    estimate_on_gpu,
    estimate_training,
    shape_of,
)
from tfgptopt.evaluation.gpus import GPUS, Gpu
from tfgptopt.evaluation.machine import Machine, measure_machine
from tfgptopt.quantization import Int8

MACHINE = Machine("a processor", 2, 8 << 30, 1e10, 1e11)


def test_shapes_are_read_and_counted():
    gpt = keras_hub.models.GPT2Backbone(500, 3, 4, 64, 256, max_sequence_length=32)
    shape = shape_of(gpt.get_config())
    assert shape == Shape(3, 64, 500, 256, 4, 1.0, False, True)
    assert shape.parameters == pytest.approx(gpt.count_params(), rel=0.03)
    llama = keras_hub.models.LlamaBackbone(500, 2, 4, 64, 160, 2)
    shape = shape_of(llama.get_config())
    assert shape.gated and shape.kv_share == 0.5
    matrices = sum(weight.shape.num_elements() for weight in llama.weights if len(weight.shape) > 1)
    assert shape.body + shape.table * 2 == matrices  # Its head is apart.
    with pytest.raises(ValueError, match="Expected the fields num_layers"):
        shape_of({"hidden_dim": 3})


def test_files_are_about_as_large_as_estimated(tmp_path):
    gpt, shape = make_gpt(2000), Shape(2, 32, 2000, 64, 2)
    floats, ints, *_ = estimate_files(shape, MACHINE)
    path = tfgptopt.export(gpt, tmp_path / "floats.tflite")
    assert path.stat().st_size == pytest.approx(floats.bytes, rel=0.5)
    tfgptopt.quantize(gpt, Int8())
    smaller = tfgptopt.export(gpt, tmp_path / "ints.tflite").stat().st_size
    saved = path.stat().st_size - smaller  # What a file has besides weights is the same.
    assert saved == pytest.approx(floats.bytes - ints.bytes, rel=0.2)


def test_floors_are_those_of_the_formulas():
    shape = Shape(12, 768, 50257, 3072, 12)
    int8 = estimate_files(shape, MACHINE, depth=100)[1]
    read = 12 * (4 * 768**2 + 8 * 768**2) + 50257 * 768 + 2 * 12 * 768 * 100 * 4
    assert int8.tokens_per_second == pytest.approx(1e10 / read)
    step = estimate_training(shape, MACHINE, 8, 128)
    assert step.seconds == pytest.approx(6 * shape.parameters * 1024 / 1e11)
    assert step.bytes > 16 * shape.parameters and step.fits
    assert not estimate_training(shape, MACHINE, 256, 1024).fits


def test_steps_on_gpus_are_those_of_the_formulas():
    shape = Shape(12, 768, 50257, 3072, 12)
    gpu = Gpu("one", 16 << 30, 1e14, 1e12)
    large = estimate_on_gpu(shape, gpu, 32, 512)  # Bound by its arithmetic.
    assert large.seconds == pytest.approx(6 * shape.parameters * 32 * 512 / 1e14)
    one = estimate_on_gpu(shape, gpu, 1, 1)  # By what is moved: both passes, gradients, AdamW.
    assert one.seconds == pytest.approx(40 * shape.parameters / 1e12, rel=0.02)
    assert one.bytes == pytest.approx(18 * shape.parameters, rel=0.01) and one.fits
    # By hand: of a token and layer 14 widths, 3 neurons and 3 rows of attention, 2 bytes each.
    kept = 12 * (14 * 768 + 3 * 3072 + 3 * 12 * 512) * 2 + 10 * 50257
    assert large.bytes == pytest.approx(18 * shape.parameters + 32 * 512 * kept)
    assert not large.fits and estimate_on_gpu(shape, GPUS[-1], 32, 512).fits
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


def test_a_machine_is_measured_in_about_a_second():
    machine = measure_machine()
    assert machine.cores >= 1 and machine.memory_bytes > 1 << 30
    assert 1e8 < machine.bandwidth < 2e12 and 1e8 < machine.flops < 1e15


def test_bad_shapes():
    for bad in ({"layers": 0}, {"kv_share": 2.0}, {"feedforward": 0}, {"width": 1.5}):
        with pytest.raises(ValueError, match="Received"):
            Shape(**{"layers": 2, "width": 32, "vocabulary": 9, **bad})
