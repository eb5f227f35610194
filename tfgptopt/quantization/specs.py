"""What a weight is rounded to: small, frozen, printable settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Int8:
    """Symmetric 8-bit weights with one scale per output channel.

    The inputs of a quantized product are rounded too, each row to asymmetric int8 with a scale of
    its own, measured on the fly ("dynamic" quantization): that is what LiteRT's kernels compute.

    Example:

    ```python
    import tfgptopt
    from tfgptopt.quantization import Int8

    tfgptopt.quantize_aware(model, Int8())
    ```
    """

    bits: ClassVar[int] = 8
    embedding_bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Int4:
    """Symmetric 4-bit weights with one scale per output channel.

    The inputs of a quantized product are rounded as with `Int8`.

    Args:
        embedding_bits: int, 4 or 8. Bits of the token table and of the output head tied to it.
            They are the most sensitive weights of a small GPT. Defaults to `8`.

    Raises:
        ValueError: If `embedding_bits` is neither 4 nor 8.
    """

    embedding_bits: int = 8

    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if self.embedding_bits not in (4, 8):
            raise ValueError(
                f"`embedding_bits` must be 4 or 8. Received: embedding_bits={self.embedding_bits!r}"
            )


Spec = Int8 | Int4
