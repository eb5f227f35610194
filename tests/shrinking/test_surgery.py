"""Models to which dead parts were added shrink back to what they were; what a family allows."""

import keras
import numpy as np
import pytest
from decoder.families import FAMILIES, VOCABULARY, make
from shrinking.growing import Grower

import tfgptopt
from tfgptopt.quantization import Int8
from tfgptopt.shrinking import search, shape_of
from tfgptopt.shrinking.families import family_of
from tfgptopt.shrinking.shapes import count_parameters
from tfgptopt.shrinking.shrinker import fill, prepare
from tfgptopt.shrinking.technique import Shrink

NAMES = ["GPT2", "OPT", "Llama", "Llama3", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma 2"]


def batch(rows=(24, 20, 9, 24), length=24, seed=0):
    """Returns inputs of rows that end in padding."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, (len(rows), length), np.int32)
    mask = (np.arange(length) < np.asarray(rows)[:, None]).astype(np.int32)
    return {"token_ids": tokens, "padding_mask": mask}


def larger(name):
    """Returns settings with more of everything that the family lets free."""
    family, settings = FAMILIES[name]
    found = {"num_layers": settings["num_layers"] + 2, "intermediate_dim": 80}
    if family in ("GPT2", "OPT"):
        return {**found, "hidden_dim": 48, "num_heads": 6}
    kv = settings["num_key_value_heads"]
    heads = (kv + 1) * settings["num_query_heads"] // kv
    found |= {"num_query_heads": heads, "num_key_value_heads": kv + 1}
    return {**found, "hidden_dim": 40 if "head_dim" in settings else heads * 8}


def agree(found, wanted, tolerance=1e-5):
    """Compares logits, to a share of the largest: float32 has seven digits."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert np.abs(found - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("name", NAMES)
def test_dead_parts_are_cut_away_exactly(name):
    model, inputs = make(name), batch()
    large = Grower(model, **larger(name)).grow()
    agree(large(inputs), model(inputs))  # What is grown is right.
    before, shape = large.get_weights(), shape_of(model)
    wanted = ["depth", "heads", "feedforward", "width"]
    wanted += ["kv_heads"] if family_of(model).kv_heads else []
    small = tfgptopt.shrink(
        large, calibration=inputs, **{axis: getattr(shape, axis) for axis in wanted}
    )
    assert type(small) is type(large) and shape_of(small) == shape
    agree(small(inputs), large(inputs))
    for a, b in zip(before, large.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dead_heads_inside_groups():
    """Every group loses a head; keys and values stay."""
    model, inputs = make("Qwen3", num_query_heads=2), batch()
    large = Grower(model, num_query_heads=4).grow()
    small = tfgptopt.shrink(large, heads=2, calibration=inputs)
    assert shape_of(small).kv_heads == 2
    agree(small(inputs), model(inputs))


@pytest.mark.parametrize("score", ["influence", "loss"])
def test_layers_that_do_nothing_go_first(score):
    model, inputs = make("Llama3"), batch()
    large = Grower(model, num_layers=5).grow()
    if score == "loss":  # A layer that misleads goes before one that does nothing.
        grown = tfgptopt.shrinking.importance(large, inputs, "loss")
        assert np.sort(np.abs(grown.depth))[:3].max() < 1e-6
        return
    agree(tfgptopt.shrink(large, depth=2, calibration=inputs)(inputs), model(inputs))


def test_gemma_2_loses_layers_in_pairs():
    model = make("Gemma 2", num_layers=4)
    with pytest.raises(ValueError, match="2 at a time"):
        tfgptopt.shrink(model, depth=3, calibration=batch())
    small = tfgptopt.shrink(model, depth=2, calibration=batch())
    kinds = [b.attention.use_sliding_window_attention for b in small.backbone.transformer_layers]
    assert kinds == [True, False]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_counted_before_they_are_made(name):
    model = make(name)
    small = tfgptopt.shrink(model, width=0.5, feedforward=0.5, calibration=batch())
    for each in (small, model):
        assert count_parameters(model, shape_of(each)) == each.backbone.count_params()


def test_shares_are_shares():
    model = make("GPT2", num_layers=4)
    small = tfgptopt.shrink(model, depth=0.5, feedforward=0.25, width=0.5, calibration=batch())
    shape = shape_of(small)
    assert (shape.depth, shape.feedforward, shape.width, shape.heads) == (2, 12, 16, 2)


def test_positions_are_cut_without_data():
    model, inputs = make("GPT2", num_layers=1), batch()
    small = tfgptopt.shrink(model, context=24)
    assert small.backbone.max_sequence_length == 24
    agree(small(inputs), model(inputs), 1e-6)


def test_a_tied_table_stays_tied():
    small = tfgptopt.shrink(make("Llama3"), depth=1, calibration=batch())
    assert small.backbone.token_embedding.tie_weights


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_a_budget_of_weights_is_met(share):
    model = make("Llama3", num_layers=6)
    small = tfgptopt.shrink(model, parameters=share, calibration=batch())
    found = small.backbone.count_params() / model.backbone.count_params()
    assert 0.85 * share < found <= share


def test_a_budget_of_time_is_met_by_what_is_measured(monkeypatch):
    """With a clock that runs with the number of weights, so that no test depends on time."""
    model, clock = make("GPT2", num_layers=4), []

    def measured(model, small, batches):
        clock.append(small.backbone.count_params() / model.backbone.count_params())
        return clock[-1]

    monkeypatch.setattr(search, "_relative_time", measured)
    small = tfgptopt.shrink(model, latency=0.6, calibration=batch())
    share = small.backbone.count_params() / model.backbone.count_params()
    assert share == max(time for time in clock if time <= 0.6) and share > 0.5
    monkeypatch.setattr(search, "_relative_time", lambda *_: 0.9)
    with pytest.raises(ValueError, match="fastest that was measured takes 90%"):
        tfgptopt.shrink(model, latency=0.6, calibration=batch())


def test_files_are_measured_side_by_side():
    model = make("GPT2")
    small = tfgptopt.shrink(model, depth=1, calibration=batch())
    assert 0.0 < search._relative_time(model, small, [batch()]) < float("inf")


def test_a_dressed_model_is_refused_and_a_finalized_one_shrinks():
    model = make("GPT2")
    tfgptopt.quantize_aware(model, Int8())
    with pytest.raises(ValueError, match="Shrink first"):
        tfgptopt.shrink(model, depth=1, calibration=batch())
    tfgptopt.finalize(model)
    assert shape_of(tfgptopt.shrink(model, depth=1, calibration=batch())).depth == 1


def test_adapters_are_refused(tmp_path):
    model = make("GPT2")
    model.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="has LoRA adapters"):
        tfgptopt.shrink(model, depth=1, calibration=batch())
    adapters = [weight for weight in model.weights if "lora" in weight.path]
    for weight in adapters:
        weight.assign(np.random.default_rng(0).normal(0, 1, weight.shape))
    model.save_weights(tmp_path / "merged.weights.h5")
    plain = make("GPT2")
    plain.load_weights(tmp_path / "merged.weights.h5")
    assert adapters
    np.testing.assert_allclose(plain(batch()), model(batch()), atol=1e-5)
    assert shape_of(tfgptopt.shrink(plain, depth=1, calibration=batch())).depth == 1


PADDING = {"token_ids": np.ones((2, 8), np.int32), "padding_mask": np.zeros((2, 8), np.int32)}
BAD = {
    "nothing": ({}, "Give what to shrink"),
    "both": ({"depth": 1, "parameters": 0.5}, "or one budget"),
    "two budgets": ({"latency": 0.5, "parameters": 0.5}, "or one budget"),
    "zero": ({"depth": 0}, "depth=2; it can be shrunk to 1 up to that"),
    "more": ({"feedforward": 49}, "feedforward=48"),
    "share": ({"depth": 1.5}, "share must be in"),
    "share of zero": ({"width": 0.0}, "share must be in"),
    "no number": ({"depth": "half"}, "must be a number"),
    "bool": ({"depth": True}, "must be a number"),
    "heads alone": ({"heads": 2}, "2 heads need width=16"),
    "odd width": ({"width": 20}, "has to be a multiple"),
    "kv heads": ({"kv_heads": 1}, "use `heads`"),
    "no data": ({"depth": 1, "calibration": None}, "`calibration` is needed"),
    "empty": ({"depth": 1, "calibration": []}, "empty"),
    "padding": ({"depth": 1, "calibration": PADDING}, "nothing but padding"),
    "floats": ({"depth": 1, "calibration": np.ones((2, 8))}, "token ids as ints"),
    "foreign ids": ({"depth": 1, "calibration": np.full((2, 8), 211)}, "and the model has 211"),
    "negative ids": ({"depth": 1, "calibration": np.full((2, 8), -1)}, "ids from -1 to -1"),
    "long": ({"depth": 1, "calibration": np.ones((2, 97), int)}, "of 97 tokens, .* reads 96"),
    "no tokenizer": ({"vocabulary": 0.5}, "needs a preprocessor"),
    "budget": ({"parameters": 1.5}, r"float in \(0, 1\)"),
    "small budget": ({"parameters": 0.01}, "No shape keeps 1%"),
    "score": ({"depth": 1, "depth_score": "size"}, "'influence' or 'loss'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        tfgptopt.shrink(make("GPT2"), **{"calibration": batch(), **settings})


def test_what_families_cannot_have():
    cases = [
        (keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), {"depth": 1}, "families"),
        (make("Llama"), {"context": 8}, "no table of positions"),
        (make("Mistral"), {"heads": 3, "kv_heads": 2}, "divisible"),
        (make("Qwen3"), {"heads": 4, "kv_heads": 1}, "serves 2 heads"),
        (make("Llama"), {"kv_heads": 1}, "2 heads need width=16"),
    ]
    for model, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            tfgptopt.shrink(model, calibration=batch(), **settings)
    model = make("GPT2")
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized by Keras"):
        tfgptopt.shrink(model, depth=1, calibration=batch())


def test_a_smaller_model_remembers_how_it_was_shrunk():
    model = make("GPT2")
    small = tfgptopt.shrink(model, feedforward=0.5, calibration=batch())
    smaller = tfgptopt.shrink(small, context=64)
    assert Shrink.found_on(model) == []
    assert Shrink.found_on(smaller) == [Shrink(feedforward=0.5), Shrink(context=64)]
    config = Shrink.found_on(small)[0].to_config()
    assert config == {"name": "shrink", "feedforward": 0.5, "depth_score": "influence"}


def test_a_prepared_model_is_filled_with_what_shrinking_gives():
    model, request = make("Llama"), Shrink(depth=1, feedforward=24)
    small = prepare(model, request)
    fill(model, small, request, batch())
    wanted = tfgptopt.shrink(model, depth=1, feedforward=24, calibration=batch())
    for ours, theirs in zip(small.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert Shrink.found_on(small) == Shrink.found_on(wanted) == [request]
