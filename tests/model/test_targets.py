import keras
import numpy as np
import pytest
from conftest import make_gpt

from tfgptopt.model.targets import Skipped, Target, select, target_of, walk


def test_finds_every_kernel_of_gpt2_at_any_depth(gpt):
    kernels = select(gpt)
    # query, key, value, output, and two of the feed-forward network, in each of two layers.
    assert len(kernels) == 12
    assert len(select(gpt, roles=("kernel", "embedding"))) == 13
    assert {type(t.layer).__name__ for t in kernels} == {"Dense", "EinsumDense"}


@pytest.mark.parametrize(
    ("equation", "shape", "output_shape", "inputs", "outputs", "rows"),
    [
        ("abc,cde->abde", (3, 5, 8), (None, 2, 4), (0,), (1, 2), (2,)),
        ("abcd,cde->abe", (3, 5, 2, 4), (None, 8), (0, 1), (2,), (2, 3)),
        ("...x,xy->...y", (3, 8), (4,), (0,), (1,), (-1,)),
    ],
)
def test_einsum_axes(equation, shape, output_shape, inputs, outputs, rows):
    layer = keras.layers.EinsumDense(equation, output_shape=output_shape)
    x = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    y = np.asarray(layer(x))
    target = target_of(layer)
    assert (target.input_axes, target.output_axes, target.row_axes) == (inputs, outputs, rows)
    # The axes are right if the product over them is what the layer computes.
    kernel = layer.kernel.numpy().transpose(inputs + outputs)
    size = int(np.prod(kernel.shape[: len(inputs)]))
    np.testing.assert_allclose(
        y.reshape(-1, kernel.size // size),
        x.reshape(-1, size) @ kernel.reshape(size, -1),
        atol=1e-5,
    )


def test_subclassed_nested_and_shared_layers_are_found_once():
    class Inner(keras.layers.Layer):
        def __init__(self, shared):
            super().__init__()
            self.own, self.shared = keras.layers.Dense(4), shared

        def call(self, x):
            return self.shared(self.own(x))

    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            shared = keras.layers.Dense(4)
            self.inner = [Inner(shared), Inner(shared)]

        def call(self, x):
            return self.inner[1](self.inner[0](x))

    model = Outer()
    model(np.zeros((1, 4), np.float32))
    assert len(select(model)) == 3


def test_frozen_and_lora_layers_are_skipped_with_the_reason():
    model = keras.Sequential([keras.Input((4,))] + [keras.layers.Dense(4) for _ in range(3)])
    model.layers[0].trainable = False
    model.layers[1].enable_lora(2)
    found = list(walk(model))
    reasons = [item.reason for item in found if isinstance(item, Skipped)]
    assert reasons == ["frozen", "has LoRA adapters; merge them first"]
    assert [type(item) for item in found].count(Target) == 1


def test_selectors(gpt):
    assert len(select(gpt, "feedforward")) == 4
    assert len(select(gpt, keras.layers.EinsumDense)) == 8
    assert len(select(gpt, lambda target: target.size == 32 * 64)) == 4


def test_bad_selection_says_what_is_there(gpt):
    with pytest.raises(ValueError, match=r"matches none of the 13 weights.*query"):
        select(gpt, "no_such_layer")
    with pytest.raises(ValueError, match="not a regular expression"):
        select(gpt, "(")
    with pytest.raises(ValueError, match="not built"):
        select(keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(ValueError, match="no weight to act on"):
        select(keras.Sequential([keras.Input((4,)), keras.layers.Flatten()]))
    with pytest.raises(ValueError, match="Keras 3 model"):
        select("gpt")


def test_keras_quantized_model_is_skipped():
    model = make_gpt()
    model.backbone.quantize("int8")
    with pytest.raises(ValueError, match="already quantized by Keras"):
        select(model)


def test_the_head_of_a_model_built_by_hand_is_left_out():
    tokens = keras.Input((8,), dtype="int32")
    x = keras.layers.Embedding(65, 64)(tokens) + keras.layers.Embedding(256, 64)(tokens)
    for _ in range(2):
        x = keras.layers.Dense(64)(keras.layers.Dense(256)(x))
    model = keras.Model(tokens, keras.layers.Dense(65, name="logits")(x))
    assert len(select(model)) == 4
    assert all("logits" not in target.path for target in select(model))
    assert any(t.role == "head" for t in select(model, "logits"))
