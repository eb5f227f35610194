"""What a weight is rounded to: small, frozen, printable settings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from tfgptopt.file.number_types import number_type
from tfgptopt.model.types import Config

ScaleMethod = Literal["absmax", "mse", "learned"]
Activations = Literal["dynamic"]

_METHODS = ("absmax", "mse", "learned")
_SETTINGS = ("bits", "embedding_bits", "block_size", "scale", "activations")
# What a class from outside may leave out.
_DEFAULTS = {"activation_blocks": 1, "embedding_block_size": None}
_by_name: dict[str, type[Spec]] = {}


class Spec(Protocol):
    """What a weight is rounded to: a frozen dataclass of these, as fields or for the whole class.

    `Int8` and `Int4` are specs; `register_spec` adds a class from outside.

    Attributes:
        bits: Bits of a weight; `tfgptopt.file.number_types` has what there is.
        embedding_bits: Bits of the token table and of the output head.
        block_size: How many inputs share a scale, or `None` for all.
        scale: How the scales are found.
        activations: `"dynamic"`, or `None` to leave the inputs of products as floats.
        activation_blocks: Of how many products that are added a product is made, each with its own
            part of the inputs. A class that is registered may leave it out: it is 1 then.
        embedding_block_size: How many entries of a row of the token table, or of the head, share a
            scale, or `None` for all, as for a class that leaves it out.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def bits(self) -> int: ...
    @property
    def embedding_bits(self) -> int: ...
    @property
    def block_size(self) -> int | None: ...
    @property
    def scale(self) -> ScaleMethod: ...
    @property
    def activations(self) -> Activations | None: ...
    @property
    def activation_blocks(self) -> int: ...
    @property
    def embedding_block_size(self) -> int | None: ...


_Class = TypeVar("_Class", bound=type[Spec])


def register_spec(cls: _Class) -> _Class:
    """Makes a class a quantization spec, which files and recipes know by its name in lower case.

    It can stand above a frozen dataclass. Its number of bits must be in the table of number types.

    Args:
        cls: The class.

    Returns:
        It.

    Raises:
        ValueError: If it is no frozen dataclass or lacks a setting, or another one has its name.

    Example:

    ```python
    register_number_type(NumberType("int6", 6, schema.TensorType.INT8))

    @register_spec
    @dataclasses.dataclass(frozen=True)
    class Int6:
        scale: str = "absmax"
        activations: str | None = "dynamic"
        bits: ClassVar[int] = 6
        embedding_bits: ClassVar[int] = 8
        block_size: ClassVar[None] = None

    tfgptopt.quantize_aware(model, Int6())
    ```
    """
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise ValueError(f"A quantization spec is a frozen dataclass. Received: {cls!r}")
    known = {entry.name for entry in fields(cls)}
    missing = [name for name in _SETTINGS if name not in known and not hasattr(cls, name)]
    if missing:
        raise ValueError(f"The quantization spec {cls.__name__} lacks {', '.join(missing)}.")
    for name, value in _DEFAULTS.items():
        if name not in known and not hasattr(cls, name):
            setattr(cls, name, value)
    taken = _by_name.setdefault(cls.__name__.lower(), cls)
    if taken is not cls:
        raise ValueError(f"A quantization spec is named {cls.__name__} already: {taken!r}")
    return cls


@register_spec
@dataclass(frozen=True, repr=False)
class Int8:
    """Symmetric 8-bit weights with one scale per output channel.

    Args:
        scale: How the scales are found. `"absmax"`: from the largest magnitude. `"mse"`: the one
            with the smallest squared error, which clips the largest weights. `"learned"`: trained
            along with the weights (LSQ) by the callback `QuantizationAwareTraining`. Defaults to
            `"absmax"`.
        activations: `"dynamic"` rounds the inputs of each product too, each row to asymmetric int8
            with a scale of its own, measured on the fly: that is what LiteRT computes, and what
            makes it fast. `None` leaves them as floats: the file is as small, and slower. Defaults
            to `"dynamic"`.
        activation_blocks: int. Cuts each product along its inputs into as many that are added, so
            that a row of inputs has as many scales: what a few large features cost stays in their
            part. Weights keep their scales. Tables and heads are not cut. For weights whose inputs
            differ much in size, such as those of `down`; see the method `"sorting"` of
            `tfgptopt.quantize`. Defaults to `1`.

    Raises:
        ValueError: If a setting is unknown or out of range.

    Example:

    ```python
    import tfgptopt
    from tfgptopt.quantization import Int8

    tfgptopt.quantize_aware(model, Int8())
    ```
    """

    scale: ScaleMethod = "absmax"
    activations: Activations | None = "dynamic"
    activation_blocks: int = 1

    bits: ClassVar[int] = 8
    embedding_bits: ClassVar[int] = 8
    block_size: ClassVar[None] = None
    embedding_block_size: ClassVar[None] = None

    def __post_init__(self) -> None:
        _check(self)

    def __repr__(self) -> str:
        return _as_text(self)


@register_spec
@dataclass(frozen=True, repr=False)
class Int4:
    """Symmetric 4-bit weights, one scale per output channel or per block of its inputs.

    Args:
        block_size: int, a multiple of 32 such as 32, 64 or 128: how many inputs share a scale.
            Smaller blocks keep more quality; a scale takes 16 bits. Defaults to `None`: one scale
            per output channel, the smallest and fastest.
        embedding_bits: int, 4 or 8. Bits of the token table and of the output head, tied or not,
            which have one scale per token, or more by `embedding_block_size`. They are the most
            sensitive weights of a small GPT. Defaults to `8`.
        scale: As with `Int8`. Defaults to `"absmax"`.
        activations: As with `Int8`. Defaults to `"dynamic"`.
        activation_blocks: As with `Int8`; each part holds whole blocks of weights. Defaults to `1`.
        embedding_block_size: int, a multiple of 32: how many entries of a row of a table or head of
            4 bits share a scale. It needs dynamic activations. Defaults to `None`: all.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    block_size: int | None = None
    embedding_bits: int = 8
    scale: ScaleMethod = "absmax"
    activations: Activations | None = "dynamic"
    activation_blocks: int = 1
    embedding_block_size: int | None = None

    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        for name in ("block_size", "embedding_block_size"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or size < 32 or size % 32):
                raise ValueError(
                    f"`{name}` must be None or a multiple of 32, such as 32, 64 or 128, which is "
                    f"what LiteRT's kernels compute with. Received: {name}={size!r}"
                )
        plain = self.embedding_bits != 4 or self.activations is None
        if self.embedding_block_size is not None and plain:
            raise ValueError(
                "`embedding_block_size` is for tables of 4 bits whose inputs are rounded: give "
                '`embedding_bits=4` and `activations="dynamic"`. Received: embedding_block_size='
                f"{self.embedding_block_size}, embedding_bits={self.embedding_bits!r}, "
                f"activations={self.activations!r}"
            )
        if self.embedding_bits not in (4, 8):
            raise ValueError(
                f"`embedding_bits` must be 4 or 8. Received: embedding_bits={self.embedding_bits!r}"
            )
        _check(self)

    def __repr__(self) -> str:
        return _as_text(self)


def _as_text(spec: Spec) -> str:
    """Returns a spec as code, without what is as by default."""
    given = [(f.name, getattr(spec, f.name)) for f in fields(spec)
             if getattr(spec, f.name) != f.default]  # fmt: skip
    return f"{type(spec).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"


def _check(spec: Spec) -> None:
    if spec.scale not in _METHODS:
        raise ValueError(f"`scale` must be one of {_METHODS}. Received: scale={spec.scale!r}")
    if spec.activations not in ("dynamic", None):
        raise ValueError(
            f'`activations` must be "dynamic" or None. Received: activations={spec.activations!r}'
        )
    parts = spec.activation_blocks
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise ValueError(
            f"`activation_blocks` must be an int >= 1. Received: activation_blocks={parts!r}"
        )
    if parts > 1 and spec.activations is None:
        raise ValueError(
            "`activation_blocks` gives rounded inputs more scales, and `activations=None` rounds "
            f"none. Leave one of them out. Received: activation_blocks={parts}"
        )


def check_spec(spec: Any) -> None:
    """Raises if `spec` is no quantization spec.

    Raises:
        ValueError: If it is something else, such as the class instead of an instance, or there is
            no number type of its bits.
    """
    if type(spec) not in _by_name.values():
        known = " or ".join(f"{cls.__name__}()" for cls in _by_name.values())
        raise ValueError(f"`spec` must be {known}. Received: {spec!r} (of type {type(spec)})")
    number_type(spec.bits)
    number_type(spec.embedding_bits)


def serialize_spec(spec: Spec) -> Config:
    """Returns a spec as plain data."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return {"name": type(spec).__name__.lower(), **values}


def deserialize_spec(config: Config) -> Spec:
    """Returns the spec that `serialize_spec` wrote. All but the name may be missing.

    Raises:
        ValueError: If the name or a field is not known.
    """
    config = dict(config)
    name = config.pop("name", None)
    if name not in _by_name:
        known = " or ".join(_by_name)
        raise ValueError(f"A quantization spec is named {known}. Received: {name!r}")
    try:
        return _by_name[name](**config)
    except TypeError as error:
        raise ValueError(f"Unknown setting for {name}: {sorted(config)} ({error})") from None


def short_name(spec: Spec) -> str:
    """Returns what `parse_spec` reads where that tells all of a spec, else the spec as code."""
    name = type(spec).__name__.lower()
    text = name if spec.block_size is None else f"{name}:{spec.block_size}"
    try:
        return text if parse_spec(text) == spec else str(spec)
    except ValueError:
        return str(spec)


def parse_spec(text: str) -> Spec:
    """Returns the spec that a command line names: `int8`, `int4`, or `int4:32` with a block size.

    Raises:
        ValueError: If it names none, or the block size is out of range.
    """
    name, _, size = text.partition(":")
    if size and not size.isdigit():
        raise ValueError(
            f"A spec is int8, int4 or int4:BLOCK_SIZE, such as int4:32. Received: {text!r}"
        )
    config: Config = {"name": name}
    if size:
        config["block_size"] = int(size)
    return deserialize_spec(config)
