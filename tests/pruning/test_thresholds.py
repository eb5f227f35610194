"""Pruning by magnitudes instead of shares, by norms of groups, and at random."""

import keras
import numpy as np
import pytest
from tfgptopt.callbacks import Checkpoint, Pruning

import tfgptopt
from tfgptopt.model.targets import select
from tfgptopt.pruning import (
    NM,
    Block,
    Columns,
    ConstantSparsity,
    Movement,
    Random,
    Rows,
    Threshold,
    Unstructured,
    report,
)
from tfgptopt.recipe import Prune, Recipe


def make_model():
    keras.utils.set_random_seed(7)
    layers = [keras.layers.Dense(24), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((16,)), *layers])
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mse")
    return model


def fit(model, callbacks, epochs=3):
    x = np.random.default_rng(0).normal(0, 1, (32, 16)).astype(np.float32)
    return model.fit(
        x, x[:, :10], batch_size=4, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks
    ).history


SCALES = {None: lambda w: 1.0, "mean": lambda w: np.abs(w).mean(),
          "rms": lambda w: np.sqrt((w**2).mean())}  # fmt: skip


@pytest.mark.parametrize(("relative_to", "value"), [(None, 0.1), ("mean", 0.8), ("rms", 0.6)])
def test_what_lies_below_goes_at_once(relative_to, value):
    model = make_model()
    before = [target.variable.numpy() for target in select(model)]
    threshold = Threshold(value, relative_to)
    tfgptopt.prune(model, threshold=value if relative_to is None else threshold)
    for target, w in zip(select(model), before, strict=True):
        expected = np.where(np.abs(w) >= value * SCALES[relative_to](w), w, 0)
        np.testing.assert_array_equal(target.variable, expected)
        assert 0.2 < (expected == 0).mean() < 0.8
    found = report(model)
    assert [row.target for row in found.rows] == [None, None] and found.holds


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("pattern", [Block, Rows, Columns])
def test_groups_go_by_their_norm(pattern, norm):
    model = make_model()
    made = pattern(4, 2, norm=norm) if pattern is Block else pattern(norm=norm)
    before = [target.variable.numpy() for target in select(model)]
    tfgptopt.prune(model, pattern=made, threshold=Threshold(0.95, "rms", at_most=0.9))
    shares = []
    for target, w in zip(select(model), before, strict=True):
        rows, columns = made.size_in(w.shape)
        blocks = w.reshape(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
        mean = np.abs(blocks).mean((1, 3)) if norm == "l1" else np.sqrt((blocks**2).mean((1, 3)))
        kept = mean >= 0.95 * np.sqrt((w**2).mean())
        kept = kept.repeat(rows, 0).repeat(columns, 1)
        if kept.mean() > 0.1:
            np.testing.assert_array_equal(target.variable, np.where(kept, w, 0))
            shares.append(kept.mean())
        else:
            assert (target.variable.numpy() != 0).mean() >= 0.1
    assert norm == "l1" or shares


def test_a_share_of_norms_is_the_smallest_ones():
    model = make_model()
    w = select(model)[0].variable.numpy()
    w[:, 3] = 0.01
    w[0, 3] = 3.0  # The largest root mean square of all columns, and a middling mean.
    select(model)[0].variable.assign(w)
    for norm in ("l1", "l2"):
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        tfgptopt.prune(copy, 0.5, Columns(norm=norm))
        order = 1 if norm == "l1" else 2
        kept = np.argsort(np.linalg.norm(w, order, axis=0))[12:]
        pruned = select(copy)[0].variable.numpy()
        np.testing.assert_array_equal(np.flatnonzero(pruned.any(axis=0)), np.sort(kept))


def test_a_threshold_is_bounded_and_rises_in_fit():
    model = make_model()
    rising = Threshold(5.0, "rms", 0.6, begin_step=2, end_step=20, frequency=3, power=1.0)
    shares = fit(model, [Pruning(rising)])["sparsity"]
    assert 0.0 < shares[0] < shares[1] <= shares[2] == pytest.approx(0.6, abs=2e-3)
    assert all((t.variable.numpy() == 0).mean() <= 0.6 for t in select(model))
    values = [float(rising(step)[1]) for step in (2, 11, 20)]
    assert values == pytest.approx([0.0, 2.5, 5.0])
    fires = [step for step in range(30) if bool(rising(step)[0])]
    assert fires == [2, 5, 8, 11, 14, 17, 20]
    once = Threshold(0.1, begin_step=4, frequency=7)
    assert [step for step in range(20) if bool(once(step)[0])] == [4, 11, 18]


class Killed(Exception):
    pass


class KillAt(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.at = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.at:
            raise Killed


def test_it_is_resumed_with_the_same_bits(tmp_path):
    def pruning():
        return Pruning(Threshold(0.7, "mean", begin_step=2, end_step=20, frequency=3))

    whole, resumed = make_model(), make_model()
    fit(whole, [pruning()])
    checkpoint = Checkpoint(tmp_path, save_freq=5)
    with pytest.raises(Killed):
        fit(make_model(), [pruning(), checkpoint, KillAt(13)])
    checkpoint.folder.close()
    fit(resumed, [pruning(), Checkpoint(tmp_path, save_freq=5)])
    for one, other in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_recipes_hold_thresholds_norms_and_seeds():
    recipe = Recipe(
        (
            Prune(Threshold(0.5, "rms", 0.8, 10, 90, frequency=20), Rows("l2"), targets="a"),
            Prune(ConstantSparsity(0.5, 0), score=Random(3), targets="b"),
        )
    )
    again = Recipe.from_config(recipe.to_config())
    assert again.to_config() == recipe.to_config()
    assert again.techniques[0].schedule.get_config() == recipe.techniques[0].schedule.get_config()
    assert again.techniques[0].pattern == Rows("l2")
    assert again.techniques[1].score == Random(3)


def test_random_is_the_same_each_time_and_tells_nothing_of_the_weights():
    masks = []
    for seed in (0, 0, 1):
        model = make_model()
        w = select(model)[0].variable.numpy()
        tfgptopt.prune(model, 0.5, score=Random(seed))
        masks.append(select(model)[0].variable.numpy() != 0)
        assert masks[-1].mean() == 0.5
    np.testing.assert_array_equal(masks[0], masks[1])
    assert 0.3 < (masks[0] == masks[2]).mean() < 0.7
    assert abs(np.corrcoef(masks[0].ravel(), np.abs(w).ravel())[0, 1]) < 0.2
    assert not (
        masks[0] == (select(model)[1].variable.numpy() != 0).repeat(3)[:384].reshape(16, 24)
    ).all()


def test_what_does_not_go_together_is_refused_before_anything_changes():
    model = make_model()
    before = model.get_weights()
    for arguments, match in (
        ({"sparsity": 0.5, "threshold": 0.1}, "Give `sparsity` or `threshold`"),
        ({"threshold": -0.1}, "`threshold` must be"),
        ({"threshold": float("nan")}, "`threshold` must be"),
        ({"threshold": 0.1, "pattern": NM(2, 4)}, "A Threshold compares magnitudes"),
        ({"threshold": 0.1, "pattern": Unstructured("output")}, "A Threshold compares"),
        ({"threshold": 0.1, "score": Random()}, "A Threshold compares magnitudes"),
    ):
        with pytest.raises(ValueError, match=match):
            tfgptopt.prune(model, **arguments)
    for settings, match in (
        ({"relative_to": "max"}, "`relative_to`"),
        ({"at_most": 1.0}, "`at_most`"),
        ({"begin_step": 5, "end_step": 5}, "`end_step` behind"),
    ):
        with pytest.raises(ValueError, match=match):
            Threshold(0.1, **settings)
    with pytest.raises(ValueError, match="`norm` must be 'l1' or 'l2'"):
        Rows(norm="l3")
    with pytest.raises(ValueError, match="cannot prune with"):
        fit(model, [Pruning(ConstantSparsity(0.5, 2), Rows("l2"), Movement())])
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
