"""The products of experts in a mixture, as layers that techniques reach.

KerasHub holds the kernels of all experts as variables of three axes, and multiplies with them
itself. A bank of experts that is looked at gets a layer for each product, which has the kernel of
the bank for its own, and computes through it from then on: the same numbers, the same variables,
the same checkpoints.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

_IN, _OUT = "th,ehm->etm", "etm,emh->eth"


class ExpertProduct(keras.layers.EinsumDense):
    """A product with the matrix of each expert, whose kernel belongs to the bank of experts."""

    def enable_lora(self, *args: object, **kwargs: object) -> None:
        """Refuses adapters, which no checkpoint of the bank would hold.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.path} has the matrices of experts, which take no LoRA adapters: a checkpoint "
            "of the mixture would lose them. Train adapters of its attention."
        )

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


def _qwen3_5(bank: Any, x: Any) -> Any:
    both, down = bank.expert_products
    gate, up = ops.split(both(x), 2, axis=-1)
    return down(up * ops.cast(ops.silu(ops.cast(gate, "float32")), up.dtype))


def _gpt_oss(bank: Any, x: Any) -> Any:
    both, down = bank.expert_products
    found = both(x) + bank.gate_up_proj_bias[:, None, :]
    gate = ops.clip(found[..., ::2], -1e9, bank.limit)
    up = ops.clip(found[..., 1::2], -bank.limit, bank.limit)
    made = (up + 1) * gate * ops.sigmoid(gate * bank.alpha)
    return down(made) + bank.down_proj_bias[:, None, :]


def _bank(place: str, name: str) -> type:
    """Returns a class of KerasHub's own modules, or one without objects if a version has none."""
    with contextlib.suppress(ImportError, AttributeError):
        found: type = getattr(importlib.import_module(f"keras_hub.src.models.{place}"), name)
        return found
    return type(name, (), {})


@dataclass(frozen=True)
class _Bank:
    """How a class of banks computes.

    Attributes:
        kernels: Names of its variables, the last that of the way out.
        opened: A subclass that computes through layers.
    """

    kernels: tuple[str, ...]
    opened: type


def _known(plain: type, compute: Callable[[Any, Any], Any], *kernels: str) -> tuple[type, _Bank]:
    members = {"call": lambda self, hidden_states: compute(self, hidden_states)}
    return plain, _Bank(kernels, type(plain.__name__, (plain,), members))


_GATE, _UP, _DOWN = (
    f"_expert_feedforward_{name}_dense" for name in ("gate", "intermediate", "output")
)
_BANKS: dict[type, _Bank] = dict(
    (
        _known(_bank("gpt_oss.gpt_oss_decoder", "GptOssExperts"), _gpt_oss,
               "gate_up_proj", "down_proj"),
        _known(_bank("mixtral.mixtral_decoder", "MixtralMoeExperts"), _mixtral, _GATE, _UP, _DOWN),
        _known(_bank("qwen3_5_moe.qwen3_5_moe_decoder", "Qwen3_5MoeExperts"), _qwen3_5,
               _GATE, _DOWN),
        _known(_bank("qwen3_moe.qwen3_moe_decoder", "Qwen3MoeExperts"), _qwen, _GATE, _DOWN),
        _known(_bank("qwen_moe.qwen_moe_decoder", "QwenMoeExperts"), _qwen, _GATE, _DOWN),
    )
)  # fmt: skip
_OPENED = {bank.opened: bank for bank in _BANKS.values()}


def open_experts(layer: keras.Layer) -> set[int]:
    """Gives a bank of experts the layers that it computes through; other layers stay as they are.

    Returns:
        The ids of the variables that these layers have.
    """
    bank = _OPENED.get(type(layer)) or _BANKS.get(type(layer))
    if bank is None or not layer.built:
        return set()
    kernels = [getattr(layer, name) for name in bank.kernels]
    if type(layer) is not bank.opened:
        products = [_product(layer, kernel, kernel is kernels[-1]) for kernel in kernels]
        layer._tracker.unlock()
        layer.expert_products = products
        layer._tracker.lock()
        layer.__class__ = bank.opened
    return {id(kernel) for kernel in kernels}


def _product(bank: Any, kernel: keras.Variable, out: bool) -> ExpertProduct:
    experts, _, outputs = kernel.shape
    shape = (experts, None, outputs)
    product = ExpertProduct(_OUT if out else _IN, shape, dtype=bank.dtype_policy, name=kernel.name)
    product._kernel, product.bias = kernel, None
    product.built = True
    return product
