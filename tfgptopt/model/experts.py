"""The products of experts in a mixture, as layers that techniques reach.

KerasHub holds the kernels of all experts as variables of three axes, and multiplies with them
itself. A bank of experts that is looked at gets a layer for each product, which has the kernel of
the bank for its own, and computes through it from then on: the same numbers, the same variables,
the same checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops
from keras_hub.src.models.gpt_oss.gpt_oss_decoder import GptOssExperts
from keras_hub.src.models.mixtral.mixtral_decoder import MixtralMoeExperts
from keras_hub.src.models.qwen3_moe.qwen3_moe_decoder import Qwen3MoeExperts
from keras_hub.src.models.qwen_moe.qwen_moe_decoder import QwenMoeExperts

_IN, _OUT = "th,ehm->etm", "etm,emh->eth"


class ExpertProduct(keras.layers.EinsumDense):
    """A product with the matrix of each expert, whose kernel belongs to the bank of experts."""

    def save_own_variables(self, store: Any) -> None:
        """Writes nothing: the bank writes the kernel."""

    def load_own_variables(self, store: Any) -> None:
        """Reads nothing."""


def _mixtral(bank: Any, x: Any) -> Any:
    gate, up, down = bank.expert_products
    gated = bank.activation(ops.cast(gate(x), "float32"))
    return down(up(x) * ops.cast(gated, bank.compute_dtype))


def _qwen(bank: Any, x: Any) -> Any:
    both, down = bank.expert_products
    gate, up = ops.split(both(x), 2, axis=-1)
    return down(up * bank.activation(gate))


def _gpt_oss(bank: Any, x: Any) -> Any:
    both, down = bank.expert_products
    found = both(x) + bank.gate_up_proj_bias[:, None, :]
    gate = ops.clip(found[..., ::2], -1e9, bank.limit)
    up = ops.clip(found[..., 1::2], -bank.limit, bank.limit)
    made = (up + 1) * gate * ops.sigmoid(gate * bank.alpha)
    return down(made) + bank.down_proj_bias[:, None, :]


_QWEN = ("_expert_feedforward_gate_dense", "_expert_feedforward_output_dense")
# The kernels of each class of banks, the last that of the way out.
_KERNELS: dict[type, tuple[str, ...]] = {
    GptOssExperts: ("gate_up_proj", "down_proj"),
    MixtralMoeExperts: (_QWEN[0], "_expert_feedforward_intermediate_dense", _QWEN[1]),
    Qwen3MoeExperts: _QWEN,
    QwenMoeExperts: _QWEN,
}


def open_experts(layer: keras.Layer) -> set[int]:
    """Gives a bank of experts the layers that it computes through; other layers stay as they are.

    Returns:
        The ids of the variables that these layers have.
    """
    names = _KERNELS.get(type(layer))
    if names is None or not layer.built:
        return set()
    kernels = [getattr(layer, name) for name in names]
    if not hasattr(layer, "expert_products"):
        layer._tracker.unlock()
        layer.expert_products = [
            _product(layer, kernel, kernel is kernels[-1]) for kernel in kernels
        ]
        layer._tracker.lock()
    return {id(kernel) for kernel in kernels}


def _product(bank: Any, kernel: keras.Variable, out: bool) -> ExpertProduct:
    experts, _, outputs = kernel.shape
    shape = (experts, None, outputs)
    product = ExpertProduct(_OUT if out else _IN, shape, dtype=bank.dtype_policy, name=kernel.name)
    product._kernel, product.bias = kernel, None
    product.built = True
    return product


def _through_layers(plain: Callable[..., Any], made: Callable[[Any, Any], Any]) -> Any:
    @functools.wraps(plain)
    def call(self: Any, hidden_states: Any) -> Any:
        opened = hasattr(self, "expert_products")
        return made(self, hidden_states) if opened else plain(self, hidden_states)

    return call


for _bank, _made in (
    (GptOssExperts, _gpt_oss),
    (MixtralMoeExperts, _mixtral),
    (Qwen3MoeExperts, _qwen),
    (QwenMoeExperts, _qwen),
):
    _bank.call = _through_layers(_bank.call, _made)
