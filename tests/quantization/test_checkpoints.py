"""A calibration that was stopped goes on, and ends with the bits of one that was not."""

from __future__ import annotations

import re
import warnings

import keras
import numpy as np
import pytest
from calibration.test_routing import DATA, make_mixture
from conftest import make_gpt, random_batch

import tfgptopt
from tfgptopt.calibration import journal
from tfgptopt.calibration.identity import checksum_of
from tfgptopt.file.locking import try_lock
from tfgptopt.quantization import BitAllocation, Int4, Int8, block_rounding, quantizers

VECTORS = np.random.default_rng(0).normal(0, 1, (96, 32)).astype(np.float32)


def make_dense(dtype="float32", seed=1):
    """A few products, one behind a norm, one behind another."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((32,)),
            keras.layers.LayerNormalization(dtype=dtype),
            keras.layers.Dense(32, dtype=dtype, name="first"),
            keras.layers.Dense(64, dtype=dtype, name="second"),
            keras.layers.Dense(8, activation="relu", dtype=dtype, name="third"),
        ],
        name="products",
    )


def make_pruned():
    model = make_dense("bfloat16")
    return tfgptopt.prune(model, 0.5)


def bits_of(model):
    """Every bit of weights and scales."""
    found = [weight.tobytes() for weight in model.get_weights()]
    for layer in model._flatten_layers():
        kept = [one.kept for one in quantizers.quantizers_of(layer)]
        found += [np.asarray(one.value).tobytes() for one in kept if one is not None]
    return found


def stopping(monkeypatch, *steps):
    """Lets writing certain steps end with Ctrl-C behind them."""
    real = journal.FolderJournal.write

    def write(self, stage, number, arrays):
        real(self, stage, number, arrays)
        if (stage, number) in steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.FolderJournal, "write", write)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a calibration that ran through, and what came out."""
    folder, model = tmp_path_factory.mktemp("finished"), make_dense()
    tfgptopt.quantize(model, Int4(), ("awq", "gptq"), VECTORS, checkpoints=folder)
    plain = make_dense()
    tfgptopt.quantize(plain, Int4(), ("awq", "gptq"), VECTORS)
    assert bits_of(model) == bits_of(plain)
    return folder, bits_of(model)


def copied(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_gpt_goes_on_behind_a_block(monkeypatch, tmp_path):
    data, chosen = random_batch(8, 16)[0], "transformer_layer"
    whole = tfgptopt.quantize(make_gpt(), Int4(block_size=32), "gptq", data, chosen)
    keras.utils.set_random_seed(1)
    model = make_gpt()
    stopping(monkeypatch, ("gptq", 1))
    settings = Int4(block_size=32), "gptq", data, chosen, 0, tmp_path
    with pytest.raises(KeyboardInterrupt):
        tfgptopt.quantize(model, *settings)
    monkeypatch.undo()
    real, solved = block_rounding.gptq, []
    monkeypatch.setattr(block_rounding, "gptq", lambda *given: (solved.append(1), real(*given))[1])
    tfgptopt.quantize(model, *settings)
    assert len(solved) == 6  # Products of the second block alone.
    assert bits_of(model) == bits_of(whole)


def test_it_goes_on_behind_each_step(monkeypatch, tmp_path, capsys):
    settings = Int4(block_size=32), ("smoothquant", "awq", "gptq"), VECTORS, None, 2
    whole, model = make_dense(), make_dense()
    tfgptopt.quantize(whole, *settings)
    before, stops = bits_of(model), (("smoothquant", 1), ("awq", 1), ("gptq", 2))
    stopping(monkeypatch, *stops)
    for stage, number in stops:
        with pytest.raises(KeyboardInterrupt) as caught:
            tfgptopt.quantize(model, *settings, checkpoints=tmp_path)
        assert "the same call goes on from there" in caught.value.__notes__[0]
        assert bits_of(model) == before
        written = sorted(path.stem for path in tmp_path.glob(f"{stage}*"))
        assert written == [f"{stage}-{i + 1:05d}" for i in range(number)]
    tfgptopt.quantize(model, *settings, checkpoints=tmp_path)
    assert bits_of(model) == bits_of(whole)
    assert "GPTQ: " in capsys.readouterr().out


@pytest.mark.parametrize("make, data", [(make_pruned, VECTORS), (lambda: make_mixture(2), DATA)])
def test_masks_half_precision_and_experts_come_back(monkeypatch, tmp_path, make, data):
    keras.utils.set_random_seed(1)
    model = make()
    weights = model.get_weights()
    chosen = {
        f"products/{name}/kernel": spec for name, spec in (("first", Int8()), ("third", Int4()))
    }
    spec = Int8() if data is DATA else BitAllocation(chosen)
    method = ("gptq",) if data is DATA else ("smoothquant", "gptq")
    folder = tmp_path / "run"

    def quantized():
        again = make()
        again.set_weights(weights)
        with pytest.warns(UserWarning) as said:
            tfgptopt.quantize(again, spec, method, data, checkpoints=folder)
            warnings.warn("none", stacklevel=1)
        # Keras counts names up.
        return bits_of(again), {re.sub(r"_\d+/", "/", str(one.message)) for one in said}

    bits, said = quantized()
    # Nothing is computed again.
    monkeypatch.setattr("tfgptopt.quantization.block_rounding.gptq", None)
    monkeypatch.setattr("tfgptopt.quantization.balancing._best_factors", None)
    monkeypatch.setattr("tfgptopt.quantization.smoothing._Probe._results", None)
    assert quantized() == (bits, said)
    assert data is VECTORS or any("expert 2 of" in one for one in said)


def test_checksums_tell_values_shapes_and_types_apart():
    ones = np.ones(4, np.float32)
    different = [ones, ones.reshape(2, 2), ones.view(np.int32), -ones, 0 * ones, -0.0 * ones, "a"]
    different += [np.array([word], object) for word in "ab"]
    found = [checksum_of([one]) for one in different]
    assert len(set(found)) == len(different)
    assert found[0] == checksum_of([ones.copy()]) != checksum_of([ones[:2], ones[2:]])


def test_of_something_else_is_refused_before_anything_changes(finished, tmp_path):
    folder = copied(finished[0], tmp_path / "run")
    other = make_dense()
    other.layers[0].gamma.assign(other.layers[0].gamma * 1.5)
    cases = [
        (other, {}, "another model: Sequential of .* Received: Sequential of"),
        (make_dense(), {"spec": Int8()}, r"another spec: Int4\(\) for .* Received: Int8\(\) for"),
        (make_dense(), {"targets": "first|third"}, "another spec"),
        (make_dense(), {"method": "gptq"}, r"another method: awq \+ gptq\. Received: gptq"),
        (make_dense(), {"data": VECTORS[:90]}, "another data: 96 tokens .* Received: 90 tokens"),
        (make_dense(), {"data": VECTORS * 2}, "another data"),
    ]
    for model, changed, message in cases:
        before = bits_of(model)
        settings = {"spec": Int4(), "method": ("awq", "gptq"), "data": VECTORS, **changed}
        with pytest.raises(ValueError, match=message) as caught:
            tfgptopt.quantize(model, checkpoints=folder, **settings)
        assert "give another folder" in str(caught.value)
        assert bits_of(model) == before
    descriptor = try_lock(folder / ".lock")
    with pytest.raises(ValueError, match="Another calibration writes"):
        tfgptopt.quantize(make_dense(), Int4(), ("awq", "gptq"), VECTORS, checkpoints=folder)
    journal.os.close(descriptor)
    with pytest.raises(ValueError, match="Cannot write checkpoints"):
        file = folder / "calibration.json"
        tfgptopt.quantize(make_dense(), Int4(), "gptq", VECTORS, checkpoints=file)
    (folder / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged .* what it is of"):
        tfgptopt.quantize(make_dense(), Int4(), ("awq", "gptq"), VECTORS, checkpoints=folder)
    (folder / "calibration.json").unlink()
    with pytest.raises(ValueError, match=r"no calibration\.json"):
        tfgptopt.quantize(make_dense(), Int4(), ("awq", "gptq"), VECTORS, checkpoints=folder)


def flipped(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGES = [("gptq-00002", flipped), ("gptq-00001", lambda x: x[:-90]), ("awq-00001", lambda x: b"")]


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_a_damaged_step_is_named_and_made_again(finished, tmp_path, name, damage):
    folder = copied(finished[0], tmp_path / "run")
    path, model = folder / f"{name}.npz", make_dense()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    (folder / ".gptq-00001.npz.tfgptopt-half").mkdir()  # Of a process that was killed.
    with pytest.warns(UserWarning, match=f"{name}.npz' is damaged"):
        tfgptopt.quantize(model, Int4(), ("awq", "gptq"), VECTORS, checkpoints=folder)
    assert bits_of(model) == finished[1]
    assert not list(folder.glob(".gptq*"))
    with np.load(path) as found, np.load(finished[0] / path.name) as expected:
        assert all((found[one] == expected[one]).all() for one in expected)


def test_steps_of_another_calibration_are_not_taken(finished, tmp_path):
    folder, model = tmp_path / "run", make_dense()
    tfgptopt.quantize(model, Int4(), "gptq", VECTORS, checkpoints=folder)
    step = "gptq-00001.npz"
    (folder / step).write_bytes((finished[0] / step).read_bytes())
    again = make_dense()
    with pytest.warns(UserWarning, match="of another calibration"):
        tfgptopt.quantize(again, Int4(), "gptq", VECTORS, checkpoints=folder)
    assert bits_of(again) == bits_of(model)


def test_a_full_disk_is_said_early_or_costs_the_rest_only(finished, tmp_path, monkeypatch):
    usage = journal.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="Make room"):
        patch.setattr(journal.shutil, "disk_usage", lambda _: usage._replace(free=100))
        tfgptopt.quantize(make_dense(), Int4(), "gptq", VECTORS, checkpoints=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    real = journal._put

    def put(path, write):
        if path.name == "gptq-00001.npz":
            raise OSError("No space left on device")
        real(path, write)

    monkeypatch.setattr(journal, "_put", put)
    model = make_dense()
    with pytest.warns(UserWarning, match="No space left"):
        tfgptopt.quantize(model, Int4(), ("awq", "gptq"), VECTORS, checkpoints=tmp_path / "run")
    assert bits_of(model) == finished[1]
    assert not list((tmp_path / "run").glob("gptq*"))
    tfgptopt.quantize(make_dense(), Int4(), "mse", VECTORS, checkpoints=tmp_path / "none")
    assert not (tmp_path / "none").exists()  # There is nothing to keep.
