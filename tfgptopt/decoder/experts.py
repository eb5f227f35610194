"""Reads mixtures of experts, and what these families compute beyond their layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras_hub
import numpy as np

from tfgptopt.decoder.mixtures import Mixture
from tfgptopt.decoder.reader import Arithmetic
from tfgptopt.decoder.reading import read_activation, read_matrix
from tfgptopt.decoder.spec import FeedForward, Matrix
from tfgptopt.decoder.windows import mistral_window, qwen3_window, qwen_window
from tfgptopt.model.experts import open_experts


def _network(mlp: Any) -> FeedForward:
    return FeedForward(
        up=read_matrix(mlp._feedforward_intermediate_dense),
        down=read_matrix(mlp._feedforward_output_dense),
        gate=read_matrix(mlp._feedforward_gate_dense),
        activation=read_activation(mlp.activation),
    )


def _parts(matrix: Matrix, experts: int, parts: int) -> tuple[Matrix, ...]:
    """Returns equal parts of the outputs of each expert, each as one matrix of all experts."""
    rows = np.arange(len(matrix.values)).reshape(experts, parts, -1)
    return tuple(matrix.rows(f"{matrix.name}/{i}", rows[:, i].reshape(-1)) for i in range(parts))


def _mixture(block: Any, normalized: bool) -> Mixture:
    bank, experts = block.expert_bank, block.num_experts
    open_experts(bank)
    *found, down = (read_matrix(product) for product in bank.expert_products)
    gate, up = found if len(found) > 1 else _parts(found[0], experts, 2)
    each = np.arange(len(down.values)).reshape(experts, -1)
    return Mixture(
        router=read_matrix(block._sparse_feedforward_gate_dense),
        gate=gate,
        up=up,
        down=tuple(down.rows(f"{down.name}/{i}", rows) for i, rows in enumerate(each)),
        activation=read_activation(bank.activation),
        top_k=block.top_k,
        normalized=normalized,
    )


def _mixtral_network(block: Any) -> Mixture:
    return _mixture(block._sparse_moe_block, normalized=True)


def _qwen_network(block: Any) -> FeedForward | Mixture:
    mlp = block.mlp
    if not hasattr(mlp, "expert_bank"):
        return _network(mlp)
    found = _mixture(mlp, normalized=mlp.norm_top_k_prob)
    if not hasattr(mlp, "shared_expert_dense"):
        return found
    return replace(
        found,
        shared=_network(mlp.shared_expert_dense),
        shared_gate=read_matrix(mlp.shared_expert_gate_dense),
    )


MIXTURE_ARITHMETIC: dict[type, Arithmetic] = {
    keras_hub.models.MixtralBackbone: Arithmetic(
        attention=mistral_window, network=_mixtral_network
    ),
    keras_hub.models.Qwen3MoeBackbone: Arithmetic(attention=qwen3_window, network=_qwen_network),
    keras_hub.models.QwenMoeBackbone: Arithmetic(attention=qwen_window, network=_qwen_network),
}
