import keras
import numpy as np
import pytest
from conftest import make_gpt, random_batch

import tfgptopt
from tfgptopt.quantization import Int8, outliers, report


def test_spread_is_the_formula(tmp_path):
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    rows = np.random.default_rng(0).normal(0, 1, (64, 40)).astype(np.float32)
    rows[:48, 7] += 20
    rows[48:, 3] -= 30
    found = outliers(model, rows)
    spread = found.spreads[model.layers[0].kernel.path]
    span = np.maximum(rows.max(1), 0) - np.minimum(rows.min(1), 0)
    ordered = np.sort(rows, 1)
    deviations = (ordered[:, 30] - ordered[:, 10]) / 1.349
    assert spread.range == pytest.approx((span / deviations).mean(), rel=1e-4)
    centered = rows - rows.mean(1, keepdims=True)
    kurtosis = (centered**4).mean(1) / (centered**2).mean(1) ** 2
    assert spread.kurtosis == pytest.approx(kurtosis.mean(), rel=1e-4)
    assert (spread.channels, spread.share) == ((7, 3), 1.0)
    assert "7, 3 (100%)" in str(found)
    found.plot(tmp_path / "rows.png", before=found)
    assert (tmp_path / "rows.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no product"):
        outliers(keras.Sequential([keras.Input((4,)), keras.layers.ReLU()]), rows)


def test_rotation_takes_channels_away_and_the_report_shows_it():
    model, inputs = make_gpt(), random_batch()[0]
    for block in model.backbone.transformer_layers:
        gain = block._self_attention_layer_norm.gamma
        gain.assign(np.where(np.arange(32) == 5, 100.0, gain.numpy()))
    path = model.backbone.transformer_layers[1]._self_attention_layer._query_dense.kernel.path
    before = outliers(model, inputs).spreads[path]
    assert before.channels[0] == 5 and before.share > 0.9 and before.kurtosis > 10
    tfgptopt.quantize(model, Int8(), "rotation")
    found = report(model, inputs)
    after = found.outliers.spreads[path]
    assert after.range < 0.5 * before.range and after.kurtosis < 5
    assert "rows" in str(found)
    assert report(model).outliers.spreads == {}
