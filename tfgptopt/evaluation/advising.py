"""What a machine can expect of a model of some shape, before anything is trained.

All of it is estimates from a few formulas: files by counting, speeds and steps by the floors of
memory and arithmetic, which real programs come near to and do not pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from tfgptopt.evaluation.gpus import Gpu
from tfgptopt.evaluation.machine import Machine

# Bytes of a weight of a matrix, and of one of the token table, scales included.
SPECS: dict[str, tuple[float, float]] = {
    "float32": (4.0, 4.0),
    "int8": (1.0, 1.0),
    "int4": (0.5, 1.0),
    "int4:32": (0.5 + 2 / 32, 1.0),
}
# Bytes that a step with AdamW holds of each weight: itself, gradient, two moments.
_TRAINED = 16
# Numbers of a token that each layer keeps for its gradients, in widths and in neurons.
_KEPT_WIDTHS, _KEPT_NEURONS = 14, 3
# Bytes of a logit in mixed precision: 16 bits, float32 for the loss, and its gradient.
_LOGITS_16 = 10
# Bytes of a weight that a step moves: both passes read it, gradients are written and read, AdamW
# reads and writes it and its moments.
_MOVED = 4 + 4 + 8 + 24
# Arithmetic of a token and weight: forwards, and twice that backwards.
_FORWARDS, _STEP = 2, 6


@dataclass(frozen=True)
class Shape:
    """The shape of a GPT.

    Attributes:
        layers: How many.
        width: Numbers of a token between layers.
        vocabulary: Tokens.
        feedforward: Neurons of each layer. `None` for four times the width.
        heads: Heads of queries, of which attention keeps weights while it trains.
        kv_share: Share of the heads that have keys and values of their own.
        gated: Whether neurons have gates, as in Llama: three matrices instead of two.
        tied: Whether the head is the table of tokens.
    """

    layers: int
    width: int
    vocabulary: int
    feedforward: int | None = None
    heads: int = 8
    kv_share: float = 1.0
    gated: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "width", "vocabulary", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an int >= 1. Received: {value!r}")
        if self.feedforward is not None and self.feedforward < 1:
            raise ValueError(f"`feedforward` must be >= 1. Received: {self.feedforward!r}")
        if not 0 < self.kv_share <= 1:
            raise ValueError(f"`kv_share` must be in (0, 1]. Received: {self.kv_share!r}")

    @property
    def neurons(self) -> int:
        """Neurons of each layer."""
        return self.feedforward or 4 * self.width

    @property
    def body(self) -> int:
        """Weights of the matrices of all layers."""
        attention = 2 * self.width**2 * (1 + self.kv_share)
        feedforward = (3 if self.gated else 2) * self.width * self.neurons
        return int(self.layers * (attention + feedforward))

    @property
    def table(self) -> int:
        """Weights of the table of tokens, which the head is or is as large as."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All of them, without norms, biases and positions."""
        return self.body + self.table * (1 if self.tied else 2)


@dataclass(frozen=True)
class FileEstimate:
    """What to expect of an exported file.

    Attributes:
        spec: Number type of its weights.
        bytes: Size.
        tokens_per_second: At most, by the memory: each token reads all weights once, and the keys
            and values of those before it.
        first_token_seconds: At least, of a prompt, by the arithmetic of float32; integers can be
            several times as fast.
    """

    spec: str
    bytes: int
    tokens_per_second: float
    first_token_seconds: float


@dataclass(frozen=True)
class TrainingEstimate:
    """What to expect of a step of training with AdamW.

    Attributes:
        bytes: Weights, gradients, moments, and what layers keep for their gradients.
        seconds: At least, by the arithmetic.
        fits: Whether it fits into the machine's memory.
    """

    bytes: int
    seconds: float
    fits: bool


def estimate_files(
    shape: Shape, machine: Machine, depth: int = 128, prompt: int = 128
) -> list[FileEstimate]:
    """Returns what to expect of files of each number type.

    Args:
        shape: Of the model.
        machine: What `measure_machine` gave.
        depth: Tokens before the new ones. Defaults to `128`.
        prompt: Tokens of a prompt. Defaults to `128`.

    Example:

    ```python
    from tfgptopt.evaluation.machine import measure_machine

    for one in estimate_files(Shape(12, 768, 50257), measure_machine()):
        print(one.spec, one.bytes, one.tokens_per_second)
    ```
    """
    found = []
    cache = 2 * shape.layers * shape.width * shape.kv_share * depth * 4
    tables = 1 if shape.tied else 2
    for spec, (weight, token) in SPECS.items():
        size = shape.body * weight + shape.table * token * tables
        read = shape.body * weight + shape.table * token + cache
        rate = machine.tokens_per_second_floor(read)
        reading = _FORWARDS * shape.body * prompt / machine.flops
        found.append(FileEstimate(spec, int(size), rate, reading))
    return found


def estimate_training(
    shape: Shape, machine: Machine, batch: int = 8, length: int = 128
) -> TrainingEstimate:
    """Returns what to expect of a step of training.

    Args:
        shape: Of the model.
        machine: What `measure_machine` gave.
        batch: Windows of a step. Defaults to `8`.
        length: Tokens of a window. Defaults to `128`.
    """
    tokens = batch * length
    kept = tokens * (_kept(shape, length) + 3 * shape.vocabulary) * 4
    size = _TRAINED * shape.parameters + kept
    seconds = _STEP * (shape.body + shape.table) * tokens / machine.flops
    return TrainingEstimate(int(size), seconds, size < machine.memory_bytes)


def estimate_on_gpu(shape: Shape, gpu: Gpu, batch: int = 8, length: int = 128) -> TrainingEstimate:
    """Returns what to expect of a step of training in mixed precision on a GPU.

    Weights, gradients and moments are float32, what layers keep has 16 bits, the last logits both.
    A step takes as long as its arithmetic at the rate of the data sheet, or as reading and writing
    all weights and moments, whichever is longer; programs reach a third to a half of such rates.

    Args:
        shape: Of the model.
        gpu: One of `GPUS`, or your own.
        batch: Windows of a step. Defaults to `8`.
        length: Tokens of a window. Defaults to `128`.
    """
    tokens = batch * length
    kept = tokens * (2 * _kept(shape, length) + _LOGITS_16 * shape.vocabulary)
    size = (_TRAINED + 2) * shape.parameters + kept
    arithmetic = _STEP * (shape.body + shape.table) * tokens / gpu.flops
    moved = (_MOVED * shape.parameters + 2 * kept) / gpu.bandwidth
    return TrainingEstimate(int(size), max(arithmetic, moved), size < gpu.memory_bytes)


def _kept(shape: Shape, length: int) -> float:
    """Returns how many numbers layers keep of a token for their gradients."""
    layer = _KEPT_WIDTHS * shape.width + _KEPT_NEURONS * shape.neurons
    return shape.layers * (layer + 3 * shape.heads * length)


def shape_of(config: dict[str, object]) -> Shape:
    """Returns the shape that the configuration of a KerasHub backbone tells.

    Args:
        config: What `backbone.get_config()` gives.

    Raises:
        ValueError: If it lacks a field.
    """

    def number(*names: str) -> int | None:
        found = next((config[name] for name in names if config.get(name) is not None), None)
        return found if isinstance(found, int) else None

    heads = number("num_heads", "num_query_heads")
    kv = number("num_key_value_heads") or heads
    layers, width, vocabulary = (
        number("num_layers"), number("hidden_dim", "hidden_size"), number("vocabulary_size")
    )  # fmt: skip
    if heads is None or kv is None or layers is None or width is None or vocabulary is None:
        raise ValueError(
            "Expected the fields num_layers, hidden_dim, vocabulary_size and heads. Received: "
            f"{', '.join(config)}"
        )
    gated = "num_key_value_heads" in config or "num_query_heads" in config
    tied = bool(config.get("tie_word_embeddings", True))
    neurons = number("intermediate_dim")
    return Shape(layers, width, vocabulary, neurons, heads, kv / heads, gated, tied)
