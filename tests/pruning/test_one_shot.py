import keras
import numpy as np
import pytest
from conftest import make_gpt, random_batch

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import (
    NM,
    Allocation,
    Block,
    Magnitude,
    Movement,
    SparseGPT,
    Unstructured,
    Wanda,
    owl,
    report,
    sensitivity,
)
from tfgptopt.pruning.sensitivities import Sensitivity


def dense_model(inputs=16, outputs=6):
    layer = keras.layers.Dense(outputs)
    model = keras.Sequential([keras.Input((inputs,)), layer])
    x = np.random.default_rng(1).normal(0, 1, (64, inputs)) @ np.random.default_rng(2).normal(
        0, 1, (inputs, inputs)
    )
    return model, layer, x.astype(np.float32)


def test_wanda_is_weight_times_norm_of_its_input():
    model, layer, x = dense_model()
    weights = layer.kernel.numpy()
    scores = np.abs(weights) * np.linalg.norm(x, axis=0)[:, None]
    tfgptopt.prune(model, 0.5, Unstructured("output"), Wanda(x))
    np.testing.assert_array_equal(layer.kernel.numpy() != 0, scores >= np.sort(scores, axis=0)[8])
    kept = layer.kernel.numpy() != 0
    np.testing.assert_array_equal(layer.kernel.numpy()[kept], weights[kept])


def obs_by_definition(weights, gram, n, m):
    """Removes inputs one after the other, each time with the inverse of what is left."""
    weights, kept = weights.copy(), np.ones(weights.shape, bool)
    for i in range(len(weights)):
        if i % m == 0:
            group = slice(i, i + m)
            diagonal = np.array([np.linalg.inv(gram[j:, j:])[0, 0] for j in range(i, i + m)])
            cost = weights[group] ** 2 / diagonal[:, None]
            kept[group] = np.argsort(np.argsort(-cost, axis=0), axis=0) < n
        inverse = np.linalg.inv(gram[i:, i:])
        error = np.where(kept[i], 0, weights[i]) / inverse[0, 0]
        weights[i:] -= np.outer(inverse[:, 0], error)
    return np.where(kept, weights, 0), kept


@pytest.mark.parametrize("block_size", [4, 8, 128])
def test_sparsegpt_is_optimal_brain_surgery(block_size):
    model, layer, x = dense_model()
    gram = x.T.astype(np.float64) @ x
    gram += 0.01 * np.diag(gram).mean() * np.eye(16)
    expected, kept = obs_by_definition(layer.kernel.numpy().astype(np.float64), gram, 2, 4)
    tfgptopt.prune(model, pattern=NM(2, 4), score=SparseGPT(x, block_size=block_size))
    np.testing.assert_array_equal(layer.kernel.numpy() != 0, kept)
    np.testing.assert_allclose(layer.kernel.numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(layer.kernel.constraint.mask.numpy(), kept)


def obs_along_outputs(weights, gram, n, m):
    """The same, the best `n` of each `m` outputs kept when their input's turn has come."""
    weights, kept = weights.copy(), np.ones(weights.shape, bool)
    for i in range(len(weights)):
        inverse = np.linalg.inv(gram[i:, i:])
        for begin in range(0, weights.shape[1], m):
            group = weights[i, begin : begin + m] ** 2
            kept[i, begin : begin + m] = np.argsort(np.argsort(-group)) < n
        error = np.where(kept[i], 0, weights[i]) / inverse[0, 0]
        weights[i:] -= np.outer(inverse[:, 0], error)
    return np.where(kept, weights, 0), kept


@pytest.mark.parametrize("block_size", [3, 128])
def test_sparsegpt_prunes_groups_of_outputs(block_size):
    model, layer, x = dense_model(outputs=8)
    gram = x.T.astype(np.float64) @ x
    gram += 0.01 * np.diag(gram).mean() * np.eye(16)
    expected, kept = obs_along_outputs(layer.kernel.numpy().astype(np.float64), gram, 2, 4)
    pattern = NM(2, 4, axis="output")
    tfgptopt.prune(model, pattern=pattern, score=SparseGPT(x, block_size=block_size))
    np.testing.assert_array_equal(layer.kernel.numpy() != 0, kept)
    np.testing.assert_allclose(layer.kernel.numpy(), expected, atol=1e-5)
    assert report(model).holds


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_outputs_change_least_with_sparsegpt_and_most_with_magnitude(pattern):
    errors = []
    for score in (Magnitude, Wanda, SparseGPT):
        model, _, x = dense_model(64, 32)
        before = model(x).numpy()
        scope = Unstructured("output") if score is Wanda and pattern == Unstructured() else pattern
        data = () if score is Magnitude else (x,)
        tfgptopt.prune(model, 0.5, scope, score(*data))
        errors.append(np.square(model(x).numpy() - before).mean())
    assert errors[0] > errors[1] > errors[2]


def test_sparsegpt_on_a_gpt_reaches_the_sparsity_of_each_weight():
    model = make_gpt()
    data = [random_batch(rows=4, seed=i)[0] for i in range(3)]
    allocation = owl(model, data, 0.5)
    tfgptopt.prune(model, 0.5, score=SparseGPT(data), allocation=allocation)
    rows = report(model).rows
    assert len(rows) == 12
    for row in rows:
        assert row.target == pytest.approx(allocation.sparsities[row.path])
        assert row.sparsity == pytest.approx(row.target, abs=0.01)
    model.compile(optimizer="adam")
    zeros = [t.variable.numpy() == 0 for t in select(model)]
    model.fit(*random_batch(), verbose=0)
    for target, zero in zip(select(model), zeros, strict=True):
        assert not target.variable.numpy()[zero].any()


def test_sparsegpt_does_not_see_what_padding_holds():
    kernels = []
    for padding in (0, 7):
        keras.utils.set_random_seed(1)
        model = make_gpt()
        batch, _ = random_batch(rows=4)
        batch["padding_mask"][:, 10:] = 0
        batch["token_ids"][:, 10:] = padding
        tfgptopt.prune(model, 0.5, score=SparseGPT([batch]))
        kernels.append([t.variable.numpy() for t in select(model)])
    for one, other in zip(*kernels, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was():
    model = make_gpt()
    before = model.get_weights()

    class Failing:
        calls = 0

        def __iter__(self):
            yield random_batch(rows=2)[0]
            yield {"token_ids": np.zeros((2, 999)), "padding_mask": np.ones((2, 999))}

    for score in (SparseGPT(Failing()), Wanda(Failing())):
        with pytest.raises(ValueError, match="cannot read the calibration data"):
            tfgptopt.prune(model, 0.5, score=score)
    original = SparseGPT._prune_matrix

    class Broken(SparseGPT):
        done = 0

        def _prune_matrix(self, *args):
            Broken.done += 1
            if Broken.done == 9:
                raise RuntimeError("out of memory")
            return original(self, *args)

    with pytest.raises(RuntimeError, match="out of memory"):
        tfgptopt.prune(model, 0.5, score=Broken([random_batch(rows=2)[0]]))
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert all(t.variable.constraint is None for t in select(model))


def test_owl_spares_the_block_with_outliers_and_keeps_the_mean():
    model = make_gpt()
    block = model.backbone.transformer_layers[1]
    kernel = block._feedforward_intermediate_dense.kernel
    spikes = kernel.numpy()
    spikes[::8, ::8] *= 100
    kernel.assign(spikes)
    data = [random_batch(rows=4)[0]]
    allocation = owl(model, data, 0.6)
    targets = select(model)
    shares = {t.path: allocation.sparsities[t.path] for t in targets}
    first, second = (
        {s for path, s in shares.items() if f"transformer_layer_{i}/" in path} for i in (0, 1)
    )
    assert len(first) == len(second) == 1
    assert first.pop() - second.pop() == pytest.approx(2 * 0.08)
    sizes = [t.size for t in targets]
    assert np.average([shares[t.path] for t in targets], weights=sizes) == pytest.approx(0.6)
    assert np.average(allocation.at(0.3, targets), weights=sizes) == pytest.approx(0.3)


def test_sensitivity_measures_each_weight_alone_and_leaves_the_model(tmp_path):
    model = make_gpt()
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = model.get_weights()
    data = random_batch()
    batches = [data]
    scan = sensitivity(model, keras_data(batches), sparsities=(0.5, 0.9), targets="feedforward")
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert scan.losses.shape == (4, 2)
    target = select(model, "feedforward")[2]
    kernel = target.variable.numpy()
    target.variable.assign(np.where(abs(kernel) < np.quantile(abs(kernel), 0.9), 0, kernel))
    expected = model.evaluate(*data, verbose=0, batch_size=8, return_dict=True)["loss"]
    assert scan.losses[2, 1] == pytest.approx(expected, abs=1e-5)
    assert "90%" in str(scan)
    scan.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def keras_data(batches):
    import tensorflow as tf

    return tf.data.Dataset.from_tensors(batches[0])


def test_allocation_of_a_scan_is_the_cheapest_there_is():
    generator = np.random.default_rng(0)
    shares = (0.25, 0.5, 0.75)
    rises = np.cumsum(np.sort(generator.uniform(0, 1, (4, 3)), axis=1), axis=1)  # Convex.
    scan = Sensitivity(("a", "b", "c", "d"), (100, 100, 100, 100), shares, 1 + rises, 1.0)
    allocation = scan.allocate(0.5)
    found = [allocation.sparsities[name] for name in "abcd"]
    assert np.mean(found) == pytest.approx(0.5)
    table = np.c_[np.zeros(4), rises]
    steps = [0, 1, 2, 3]
    cheapest = min(
        sum(table[i, c] for i, c in enumerate(choice))
        for choice in np.ndindex(4, 4, 4, 4)
        if sum(steps[c] for c in choice) == 8
    )
    cost = sum(np.interp(share, (0, *shares), table[i]) for i, share in enumerate(found))
    assert cost == pytest.approx(cheapest)
    with pytest.raises(ValueError, match="the largest that was tried"):
        scan.allocate(0.8)


def test_the_report_reads_zeros_not_masks():
    model = make_gpt()
    with pytest.raises(ValueError, match="has no pruned weights"):
        report(model)
    tfgptopt.prune(model, pattern=NM(2, 4), targets="feedforward")
    tfgptopt.prune(model, 0.5, Block(4, 1), targets="attention")
    found = report(model)
    assert found.holds
    assert found.sparsity == pytest.approx(0.5)
    assert "NM(n=2, m=4)" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80
    target = select(model, "feedforward")[0]
    target.variable.assign(target.variable + 1.0)
    broken = {row.path: row.holds for row in report(model).rows}
    assert broken.pop(target.path) is False
    assert all(broken.values())


def test_refused_before_anything_changes():
    model, layer, x = dense_model()
    before = layer.kernel.numpy()
    cases = {
        "`sparsity` must be": {"sparsity": None},
        "gathers in training": {"sparsity": 0.5, "score": Movement()},
        r"SparseGPT prunes with": {"sparsity": 0.5, "pattern": Block(4, 1), "score": SparseGPT(x)},
        "is complete at sparsity": {"sparsity": 0.7, "pattern": NM(2, 4), "score": SparseGPT(x)},
        "no sparsity for": {"sparsity": 0.5, "allocation": Allocation({"a": 0.5})},
        "is empty": {"sparsity": 0.5, "score": Wanda(x[:0])},
        "lone": {
            "sparsity": 0.5,
            "pattern": Unstructured("model"),
            "allocation": Allocation({"lone": 0.5}),
        },
    }
    for message, arguments in cases.items():
        if message == "lone":
            message = "spreads sparsity by itself"
        with pytest.raises(ValueError, match=message):
            tfgptopt.prune(model, **arguments)
        np.testing.assert_array_equal(layer.kernel, before)
        assert layer.kernel.constraint is None
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        Allocation({"a": 1.0})
