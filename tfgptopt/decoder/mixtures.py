"""A feed-forward network of many experts, of which each token is read by a few."""

from __future__ import annotations

from dataclasses import dataclass

from tfgptopt.decoder.spec import Activation, FeedForward, Matrix


@dataclass(frozen=True, eq=False)
class Mixture:
    """`sum_i p_i down_i(activation(gate_i(x)) * up_i(x))` over the experts with the largest `p_i`.

    `p = softmax(router(x))`. Those that are not chosen count nothing, whether they are computed or
    not. With a limit, gates are at most that, and what they are multiplied with is within plus and
    minus that, plus 1.

    Reference: Shazeer et al., 2017, "Outrageously Large Neural Networks: The Sparsely-Gated
    Mixture-of-Experts Layer" (https://arxiv.org/abs/1701.06538).

    Attributes:
        router: Projection to the experts.
        gate: Projection of each expert to its gates.
        up: Projection of each expert to its neurons.
        down: Projection of each expert from its neurons.
        activation: Of the gates: its name, or the factor `a` of `x * sigmoid(a * x)`.
        top_k: How many experts read a token.
        normalized: Whether the `p_i` of these are divided by their sum.
        shared: A network that reads every token besides, or `None`.
        shared_gate: Projection to one number, whose logistic function is a factor on it.
        limit: See above; `None` for none.
    """

    router: Matrix
    gate: tuple[Matrix, ...]
    up: tuple[Matrix, ...]
    down: tuple[Matrix, ...]
    activation: Activation | float
    top_k: int
    normalized: bool
    shared: FeedForward | None = None
    shared_gate: Matrix | None = None
    limit: float | None = None

    def matrices(self) -> list[Matrix]:
        """Returns the weights of products."""
        shared = [] if self.shared is None else self.shared.matrices()
        shared += [] if self.shared_gate is None else [self.shared_gate]
        return [self.router, *self.gate, *self.up, *self.down, *shared]

    def __str__(self) -> str:
        a = self.activation
        named = a if isinstance(a, str) else f"sigmoid of {a:g} x"
        named += f" up to {self.limit:g}" if self.limit is not None else ""
        besides = "" if self.shared is None else f", besides {self.shared}"
        experts = len(self.down)
        return f"{self.top_k} of {experts} experts, gated {named} of {self.down[0].inputs}{besides}"
