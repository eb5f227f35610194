"""Reads mixtures of experts, and what these families compute beyond their layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras_hub
import numpy as np

from tfgptopt.decoder.mixtures import Mixture
from tfgptopt.decoder.reader import Arithmetic
from tfgptopt.decoder.reading import as_floats, read_activation, read_matrix, read_rotary
from tfgptopt.decoder.rotary import Rotary
from tfgptopt.decoder.spec import Attention, FeedForward, Matrix
from tfgptopt.decoder.windows import mistral_window, qwen3_window, qwen_window
from tfgptopt.model.experts import open_experts


def _network(mlp: Any) -> FeedForward:
    return FeedForward(
        up=read_matrix(mlp._feedforward_intermediate_dense),
        down=read_matrix(mlp._feedforward_output_dense),
        gate=read_matrix(mlp._feedforward_gate_dense),
        activation=read_activation(mlp.activation),
    )


def _halves(matrix: Matrix, experts: int, alternating: bool = False) -> tuple[Matrix, Matrix]:
    """Returns gates and neurons, each as one matrix of all experts.

    The outputs of each expert are its gates, then its neurons, or both in turns.
    """
    shape = (experts, -1, 2) if alternating else (experts, 2, -1)
    rows = np.arange(len(matrix.values)).reshape(shape)
    gate, up = (rows.take(i, 2 if alternating else 1).reshape(-1) for i in (0, 1))
    return matrix.rows(f"{matrix.name}/0", gate), matrix.rows(f"{matrix.name}/1", up)


def _of_each(matrix: Matrix, experts: int) -> tuple[Matrix, ...]:
    rows = np.arange(len(matrix.values)).reshape(experts, -1)
    return tuple(matrix.rows(f"{matrix.name}/{i}", each) for i, each in enumerate(rows))


def _mixture(block: Any, normalized: bool) -> Mixture:
    bank, experts = block.expert_bank, block.num_experts
    open_experts(bank)
    *found, down = (read_matrix(product) for product in bank.expert_products)
    gate, up = found if len(found) > 1 else _halves(found[0], experts)
    return Mixture(
        router=read_matrix(block._sparse_feedforward_gate_dense),
        gate=_of_each(gate, experts),
        up=_of_each(up, experts),
        down=_of_each(down, experts),
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


def _gpt_oss_network(block: Any) -> Mixture:
    mlp = block.sparse_moe_block
    bank, experts = mlp.experts, mlp.num_experts
    open_experts(bank)
    both, down = (
        replace(read_matrix(product), bias=as_floats(bias).reshape(-1))
        for product, bias in zip(
            bank.expert_products, (bank.gate_up_proj_bias, bank.down_proj_bias), strict=True
        )
    )
    gate, up = _halves(both, experts, alternating=True)
    return Mixture(
        router=read_matrix(mlp.router.router_dense),
        gate=_of_each(gate, experts),
        up=_of_each(up, experts),
        down=_of_each(down, experts),
        activation=float(bank.alpha),
        top_k=mlp.top_k,
        normalized=True,
        limit=float(bank.limit),
    )


def _gpt_oss_attention(block: Any, attention: Attention) -> Attention:
    # Its window does not count the token itself.
    window = None if block.sliding_window is None else block.sliding_window + 1
    sinks = as_floats(block.self_attention_layer.sinks)
    return replace(attention, window=window, sinks=sinks)


def _gpt_oss_rotary(attention: Any, rotary: Any, head_dim: int) -> Rotary:
    return read_rotary(rotary, head_dim // 2 * 2)


MIXTURE_ARITHMETIC: dict[type, Arithmetic] = {
    keras_hub.models.GptOssBackbone: Arithmetic(
        attention=_gpt_oss_attention, network=_gpt_oss_network, rotary=_gpt_oss_rotary
    ),
    keras_hub.models.MixtralBackbone: Arithmetic(
        attention=mistral_window, network=_mixtral_network
    ),
    keras_hub.models.Qwen3MoeBackbone: Arithmetic(attention=qwen3_window, network=_qwen_network),
    keras_hub.models.QwenMoeBackbone: Arithmetic(attention=qwen_window, network=_qwen_network),
}
