"""What a `.tflite` file says of itself, as the writer fills it and the runtime reads it.

`docs/tflite_format.md` lists the fields as the file has them, in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

from tfgptopt.file.fields import Fields, Plain

METADATA_NAME = "tfgptopt"
# Beside it: as part of the JSON it would be held three times while a file is read.
SENTENCEPIECE_NAME = "tfgptopt_sentencepiece"
# Files without windows are written as the version that older runtimes read.
FORMAT_VERSION, _BEFORE_WINDOWS = 6, 5

CacheDtype = Literal["float32", "int8"]
CACHE_DTYPES: tuple[CacheDtype, ...] = get_args(CacheDtype)


class Signature(NamedTuple):
    """A function of the file that reads so many tokens at once."""

    length: int
    name: str


@dataclass(frozen=True)
class Signatures:
    """The signatures of a file, by what they are for.

    Attributes:
        decode: Reads one token and gives logits.
        prefill: Read many tokens without logits.
        score: Read many tokens and give the logits of each.
        batch: Read one token of each of many texts, and give the logits of each. There need not be
            any.
    """

    decode: Signature
    prefill: tuple[Signature, ...]
    score: tuple[Signature, ...]
    batch: tuple[Signature, ...] = ()


@dataclass(frozen=True)
class DecoderShape:
    """What a runtime must know of a decoder.

    Attributes:
        num_layers: Number of layers that have keys and values in the cache.
        num_heads: Number of query heads.
        num_key_value_heads: Number of heads of keys and values, of the first layer.
        head_dim: Numbers of a key, of the first layer.
        cache_dtype: `"float32"` or `"int8"`.
        resizable: Whether caches may have fewer positions than the context.
        context_length: Most tokens of a text.
        vocabulary_size: Number of tokens that the model knows.
        window: How many positions a token sees in the layers of `windowed_layers`, 0 without any.
            Their caches need not hold what lies before.
        windowed_layers: Layers of the cache with a window, if there are some whose signatures take
            `window_start`.
    """

    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    cache_dtype: CacheDtype
    resizable: bool
    context_length: int
    vocabulary_size: int
    window: int = 0
    windowed_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Carried:
    """A smaller model in the same file, which guesses what the other one says.

    Attributes:
        decoder: What a runtime must know of it.
        signatures: What a runtime can call; there are none that score.
    """

    decoder: DecoderShape
    signatures: Signatures


@dataclass(frozen=True)
class GenerationDefaults:
    """Special tokens.

    Attributes:
        start_token_id: What a text begins with, or `None`.
        end_token_ids: What ends a text, or a turn of a chat.
        pad_token_id: What fills a text up, or `None`.
    """

    start_token_id: int | None = None
    end_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None


@dataclass(frozen=True)
class Source:
    """The Keras model that a file was made of.

    Attributes:
        class_name: Class of the model.
        family: Class of its backbone.
        config: Configuration of the backbone.
    """

    class_name: str
    family: str
    config: Plain


@dataclass(frozen=True)
class Weights:
    """The weights of a file.

    Attributes:
        parameters: How many there are.
        nonzero: How many are not zero.
        sha256: Hash of their bytes.
    """

    parameters: int
    nonzero: int
    sha256: str


@dataclass(frozen=True)
class Chat:
    """How a chat is written out as text.

    Attributes:
        template: Jinja, as Hugging Face's tokenizers have it.
        bos_token: What the template calls so, or `""`.
        eos_token: What the template calls so, or `""`.
        stop_tokens: What ends an answer.
    """

    template: str
    bos_token: str = ""
    eos_token: str = ""
    stop_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metadata:
    """What a file says of itself.

    Attributes:
        versions: Of the libraries that wrote it.
        source: The Keras model.
        decoder: What a runtime must know of the decoder.
        signatures: What a runtime can call.
        generation: Special tokens.
        recipe: The techniques that the model was trained with, or `None`.
        weights: How many there are, and a hash.
        tokenizer: JSON of the `tokenizers` library, or `None`.
        format_version: Version of the format.
        sentencepiece: A SentencePiece model, or `None`; a file has this or `tokenizer`.
        special_tokens: Names of tokens that are no text, as far as the tokenizer does not say.
        chat: How a chat is written out, or `None`.
        draft: A smaller model in the same file, or `None`.
    """

    versions: Mapping[str, str]
    source: Source
    decoder: DecoderShape
    signatures: Signatures
    generation: GenerationDefaults
    recipe: Plain | None
    weights: Weights
    tokenizer: str | None
    format_version: int = FORMAT_VERSION
    sentencepiece: bytes | None = None
    special_tokens: tuple[str, ...] = ()
    chat: Chat | None = None
    draft: Carried | None = None

    @property
    def needed_version(self) -> int:
        """The oldest version of the format that has all that the file needs."""
        shapes = [self.decoder, *([self.draft.decoder] if self.draft else [])]
        windowed = any(shape.windowed_layers for shape in shapes)
        return FORMAT_VERSION if windowed else _BEFORE_WINDOWS

    def entries(self) -> dict[str, bytes]:
        """Returns the metadata as a file holds them, by name."""
        found = {METADATA_NAME: self._to_json()}
        if self.sentencepiece is not None:
            found[SENTENCEPIECE_NAME] = self.sentencepiece
        return found

    def _to_json(self) -> bytes:
        source = self.source
        about: Plain = {
            "format_version": self.needed_version,
            "versions": dict(self.versions),
            "source": {
                "class": source.class_name,
                "family": source.family,
                "config": source.config,
            },
            "decoder": _decoder_as_json(self.decoder),
            "signatures": _signatures_as_json(self.signatures),
            "generation": asdict(self.generation),
            "recipe": self.recipe,
            "weights": asdict(self.weights),
            "tokenizer": self.tokenizer,
        }
        if self.special_tokens:
            about["special_tokens"] = self.special_tokens
        if self.chat is not None:
            about["chat"] = asdict(self.chat)
        if self.draft is not None:
            about["draft"] = {
                "decoder": _decoder_as_json(self.draft.decoder),
                "signatures": _signatures_as_json(self.draft.signatures),
            }
        return json.dumps(about, ensure_ascii=False).encode()

    @classmethod
    def from_entries(cls, entries: Mapping[str, bytes], origin: str = "The file") -> Metadata:
        """Returns the metadata of a file; fields that are not known are passed over.

        Args:
            entries: What `entries` gave.
            origin: What an error message calls the file. Defaults to `"The file"`.

        Raises:
            ValueError: If the data are no JSON, have another version of the format, or lack a
                field or have one that cannot be.
        """
        try:
            read = json.loads(entries[METADATA_NAME])
        except ValueError as error:
            raise ValueError(f"{origin} is damaged or was cut off ({error!r}).") from None
        about = Fields(read, "", origin)
        version = _check_version(about.get("format_version"), origin)
        source = about.section("source")
        return cls(
            versions=about.section("versions").names_to(str),
            source=Source(
                source.one("class", str), source.one("family", str), source.plain("config")
            ),
            decoder=_read_decoder(about.section("decoder")),
            signatures=_read_signatures(about.section("signatures")),
            generation=_read_generation(about.section("generation")),
            recipe=about.maybe("recipe", about.plain),
            weights=_read_weights(about.section("weights")),
            tokenizer=about.maybe("tokenizer", lambda name: about.one(name, str)),
            format_version=version,
            sentencepiece=entries.get(SENTENCEPIECE_NAME),
            special_tokens=about.texts("special_tokens"),
            chat=_read_chat(about.section("chat")) if about.get("chat") is not None else None,
            draft=_read_carried(about.section("draft")) if about.get("draft") is not None else None,
        )


def _check_version(version: object, origin: str) -> int:
    """Returns the version of a format that can be read.

    Raises:
        ValueError: If it cannot.
    """
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{origin} is damaged: its format version is {version!r}.")
    if not _BEFORE_WINDOWS <= version <= FORMAT_VERSION:
        remedy = "Update tfgptopt." if version > FORMAT_VERSION else "Export the model again."
        raise ValueError(
            f"{origin} has format {version}; this tfgptopt reads formats "
            f"{_BEFORE_WINDOWS} to {FORMAT_VERSION}. {remedy}"
        )
    return version


def _read_decoder(fields: Fields) -> DecoderShape:
    """Returns what is said of the decoder.

    Raises:
        ValueError: If a field is missing or cannot be.
    """
    held = fields.one("cache_dtype", str)
    dtype = next((known for known in CACHE_DTYPES if known == held), None)
    if dtype is None:
        raise fields.wrong("cache_dtype", f"one of {CACHE_DTYPES}")
    return DecoderShape(
        num_layers=fields.integer("num_layers", 1),
        num_heads=fields.integer("num_heads", 1),
        num_key_value_heads=fields.integer("num_key_value_heads", 1),
        head_dim=fields.integer("head_dim", 1),
        cache_dtype=dtype,
        resizable=fields.one("resizable", bool),
        context_length=fields.integer("context_length", 1),
        vocabulary_size=fields.integer("vocabulary_size", 1),
        window=fields.integer("window", 0) if fields.get("window") else 0,
        windowed_layers=fields.integers("windowed_layers"),
    )


def _decoder_as_json(decoder: DecoderShape) -> Plain:
    found = asdict(decoder)
    if not decoder.windowed_layers:
        del found["window"], found["windowed_layers"]
    return found


def _signatures_as_json(signatures: Signatures) -> dict[str, dict[str, int]]:
    kinds = {
        "decode": (signatures.decode,),
        "prefill": signatures.prefill,
        "score": signatures.score,
        "batch": signatures.batch,
    }
    return {
        kind: {signature.name: signature.length for signature in found}
        for kind, found in kinds.items()
        if found
    }


def _read_carried(fields: Fields) -> Carried:
    decoder = _read_decoder(fields.section("decoder"))
    return Carried(decoder, _read_signatures(fields.section("signatures"), scoring=False))


def _read_signatures(fields: Fields, scoring: bool = True) -> Signatures:
    """Returns what can be called.

    Args:
        fields: The fields.
        scoring: Whether some have to score. Defaults to `True`.

    Raises:
        ValueError: If a kind is missing, or there is more than one `decode`.
    """

    def read(kind: str) -> tuple[Signature, ...]:
        section = fields.section(kind)
        found = tuple(Signature(section.integer(name, 1), name) for name in section.names_to(int))
        if not found:
            raise fields.wrong(kind, "a signature at least")
        return found

    decode, *others = read("decode")
    if others:
        raise fields.wrong("decode", "one signature")
    batch = () if fields.get("batch") is None else read("batch")
    return Signatures(decode, read("prefill"), read("score") if scoring else (), batch)


def _read_generation(fields: Fields) -> GenerationDefaults:
    """Returns the special tokens.

    Raises:
        ValueError: If a field is missing or cannot be.
    """
    ends = fields.one("end_token_ids", list)
    if not all(isinstance(token, int) for token in ends):
        raise fields.wrong("end_token_ids", "a list of token ids")
    return GenerationDefaults(
        start_token_id=fields.maybe("start_token_id", fields.integer),
        end_token_ids=tuple(ends),
        pad_token_id=fields.maybe("pad_token_id", fields.integer),
    )


def _read_weights(fields: Fields) -> Weights:
    return Weights(
        parameters=fields.integer("parameters", 1),
        nonzero=fields.integer("nonzero"),
        sha256=fields.one("sha256", str),
    )


def _read_chat(fields: Fields) -> Chat:
    return Chat(
        template=fields.one("template", str),
        bos_token=fields.one("bos_token", str),
        eos_token=fields.one("eos_token", str),
        stop_tokens=fields.texts("stop_tokens"),
    )
