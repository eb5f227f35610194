import numpy as np
import pytest
from decoder.families import CONTEXT, VOCABULARY, logits, make, prompt

import tfgptopt
from tfgptopt.data import load_preset, load_weights
from tfgptopt.exporting import TFLite
from tfgptopt.job.optimizing import check_not_learned
from tfgptopt.model import turning
from tfgptopt.model.orthogonal import orthogonal
from tfgptopt.model.turning import Turn, Turns, is_turned, turns_of
from tfgptopt.quantization import Int4, Int8, Rotate, learned_rotation, rotate
from tfgptopt.quantization.learned_rotation import cayley
from tfgptopt.recipe import Recipe, recipe_of

TEXT = prompt(40)
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, (4, 64), np.int32)
DATA = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
LEARNED = Rotate(seed=3, down=8, steps=3)


def test_steps_stay_orthogonal_and_go_down():
    generator = np.random.default_rng(0)
    wanted, _ = np.linalg.qr(generator.normal(size=(20, 20)))
    wanted[:, 0] *= np.sign(np.linalg.det(wanted))
    matrix = np.eye(20)
    distances = [np.linalg.norm(matrix - wanted)]
    for _ in range(200):
        # Of the squared distance.
        tangent = learned_rotation._tangent(2 * (matrix - wanted), matrix, False)
        matrix = cayley(matrix, tangent, 0.2)
        distances.append(np.linalg.norm(matrix - wanted))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(20), atol=1e-12)
    assert distances[-1] < 0.1 * distances[0] and distances[10] < distances[0]
    matrix = np.eye(20)
    for _ in range(20):
        gradient = generator.normal(size=(20, 20))
        matrix = cayley(matrix, learned_rotation._tangent(gradient, matrix, True), 1.0)
    np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    assert np.abs(matrix - np.eye(20)).max() > 0.1


@pytest.mark.parametrize("name", ["Llama3", "GPT2"])
def test_what_is_learned_spreads_large_features(name, monkeypatch):
    # Begins with no turn at all, where there is most to learn.
    monkeypatch.setattr(turning, "orthogonal", lambda size, *_: np.eye(size, dtype=np.float32))
    monkeypatch.setattr(learned_rotation, "_RATE", 0.05)
    model = make(name)
    table = model.backbone.token_embedding.embeddings
    table.assign(table.numpy() * np.where(np.arange(table.shape[1]) % 16 == 3, 30.0, 1.0))
    weights, exact, errors = model.get_weights(), logits(model, TEXT), {}
    for method in (Rotate(), Rotate(steps=40)):
        model = make(name)
        model.set_weights(weights)
        tfgptopt.quantize(model, Int8(), method, DATA)
        errors[method.steps] = np.abs(logits(model, TEXT) - exact).mean()
    assert errors[40] < 0.85 * errors[0], errors


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A model with a learned rotation, what it was before, and where its matrix was kept."""
    folder, model = tmp_path_factory.mktemp("learned"), make("Llama3")
    weights, exact = model.get_weights(), logits(model, TEXT)
    tfgptopt.quantize(model, Int8(), (LEARNED, "gptq"), DATA, checkpoints=folder)
    return model, weights, exact, folder


def test_it_is_learned_once_floats_stay_and_it_ships(learned, monkeypatch, tmp_path):
    model, weights, exact, folder = learned
    (final,) = (x for x in model._flatten_layers() if is_turned(x) and turns_of(x).after)
    matrix = turns_of(final).after.matrix
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-5)
    first = Turn(len(matrix), LEARNED.seed).matrix
    assert 1e-3 < np.abs(matrix - first).max() < 0.5
    with np.load(folder / "rotation-00001.npz") as found:
        np.testing.assert_array_equal(found["matrix"], matrix)
    monkeypatch.setattr(learned_rotation, "learn_turn", None)
    again = make("Llama3")
    again.set_weights(weights)
    tfgptopt.quantize(again, Int8(), (LEARNED, "gptq"), DATA, checkpoints=folder)
    for one, other in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    again = make("Llama3")
    again.set_weights(weights)
    rotate(again, LEARNED, matrix)
    turned = logits(again, TEXT)
    assert np.abs(turned - exact).max() < 1e-4 * exact.std()
    path = tfgptopt.export(again, tmp_path / "gpt.tflite", TFLite(CONTEXT))
    lm = tfgptopt.TFLiteCausalLM(path)
    assert lm.metadata.recipe["techniques"][0]["steps"] == 3
    found = lm._engine.score(lm._engine.new_cache(), TEXT)
    np.testing.assert_allclose(found, turned, atol=1e-4, rtol=0)


def test_the_matrix_comes_back(learned, tmp_path):
    model, *_ = learned
    expected, recipe = logits(model, TEXT), recipe_of(model)
    assert recipe.techniques[0] == Rotate(seed=3, down=8, large=(), steps=3)
    model.save_weights(tmp_path / "model.weights.h5")
    again = make("Llama3")
    with pytest.raises(ValueError, match="does not have its matrix"):
        recipe.techniques[0].replay(again)
    load_weights(again, tmp_path / "model.weights.h5")
    for one, other in zip(again._flatten_layers(), model._flatten_layers(), strict=True):
        assert turns_of(one) == turns_of(other)
    Recipe.from_config(recipe.to_config()).replay(again)
    again.load_weights(tmp_path / "model.weights.h5")  # Scales, too.
    np.testing.assert_array_equal(logits(again, TEXT), expected)
    other = rotate(make("Llama3"), Rotate(seed=3, down=8))
    with pytest.raises(ValueError, match="turns its features, and the checkpoint is"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_presets_have_the_matrix(tmp_path):
    model = make("GPT2")
    rotate(model, LEARNED, orthogonal(model.backbone.hidden_dim, 77, keeps_mean=True))
    model.save_to_preset(str(tmp_path))
    again = load_preset(tmp_path)
    (turns,) = (turns_of(x) for x in again._flatten_layers() if turns_of(x).after)
    np.testing.assert_array_equal(turns.after.matrix, orthogonal(turns.after.size, 77, True))
    np.testing.assert_allclose(logits(again, TEXT), logits(model, TEXT), atol=1e-5)


def test_a_learned_matrix_is_written_once_beside_the_words():
    matrix = np.random.default_rng(0).normal(size=(24, 24)).astype(np.float32)
    turn = Turn(24, 5, learned=matrix.tobytes())
    turns = Turns(turn.inverse, turn, ((3, 2),))
    array = turns.to_array()
    assert Turns.from_array(array) == turns and matrix.nbytes < len(array) < matrix.nbytes + 400
    np.testing.assert_array_equal(Turns.from_array(array).before.matrix, matrix.T)
    plain = Turns(Turn(24, 5))
    assert Turns.from_array(plain.to_array()) == plain and b"learned" not in bytes(plain.to_array())
    assert turn != Turn(24, 5) and "learned" not in repr(turn)


def test_what_cannot_be_learned_is_refused_before_anything_changes(tmp_path):
    model = make("Llama3")
    before = model.get_weights()
    bad = [
        (model, {}, "needs calibration data"),
        (model, {"spec": Int8(activations=None), "data": DATA}, "rounds what it reads"),
        (model, {"targets": "down|output", "data": DATA}, "rounds what it reads"),
        (make("Gemma 2"), {"data": DATA}, "norms behind its branches"),
        (model.backbone, {"data": DATA}, "predicts"),
    ]
    for one, settings, message in bad:
        with pytest.raises(ValueError, match=message):
            tfgptopt.quantize(
                one,
                **{"spec": Int4(), "method": LEARNED, "checkpoints": tmp_path / "x", **settings},
            )
        assert not any(map(is_turned, one._flatten_layers()))
    for call in (lambda: rotate(model, LEARNED), lambda: check_not_learned(LEARNED)):
        with pytest.raises(ValueError, match="is learned on text"):
            call()
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="`steps` must be"):
        Rotate(steps=-1)
