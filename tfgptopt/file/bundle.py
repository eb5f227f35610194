"""Where the parts of a LiteRT-LM bundle (`.litertlm`) are: a header, and sections behind it.

Reference: https://github.com/google-ai-edge/LiteRT-LM, `schema/core/litertlm_header_schema.fbs`.
"""

from __future__ import annotations

import importlib
import mmap
import zlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

MAGIC = b"LITERTLM"
_HEADER_AT = 32
_PACKAGE = "litert_lm_builder"


def bundle_builder(module: str) -> ModuleType:
    """Returns a module of the library that knows bundles.

    Args:
        module: Its name in `litert_lm_builder`.

    Raises:
        ImportError: If it is not installed, or another version has no such module.
    """
    try:
        importlib.import_module(_PACKAGE)
    except ModuleNotFoundError:
        raise ImportError(
            "Bundles for LiteRT-LM (.litertlm) need the package litert-lm-builder: "
            "pip install 'tfgptopt[litertlm]'."
        ) from None
    try:
        return importlib.import_module(f"{_PACKAGE}.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The installed litert-lm-builder lacks {error.name}. Bundles were tried with the "
            "version that `pip install 'tfgptopt[litertlm]'` brings."
        ) from error


@dataclass(frozen=True)
class Place:
    """Where something is in a file.

    Attributes:
        begin: Its first byte.
        end: The byte behind its last.
    """

    begin: int
    end: int


@dataclass(frozen=True)
class Bundle:
    """What is in a bundle, as far as a decoder is concerned.

    Attributes:
        model: The TFLite model that reads prompts and decodes, or `None`.
        tokenizer: JSON of the `tokenizers` library, or `None`.
        sentencepiece: A SentencePiece model, or `None`.
    """

    model: Place | None
    tokenizer: str | None
    sentencepiece: bytes | None


def read_bundle(data: mmap.mmap) -> Bundle:
    """Returns what is in a bundle.

    Args:
        data: The whole file.

    Raises:
        Exception: Of any kind, if it is damaged or was cut off.
        ImportError: If the library that knows bundles is not installed.
    """
    schema: Any = bundle_builder("litertlm_header_schema_py_generated")
    kinds = schema.AnySectionDataType
    model = tokenizer = sentencepiece = None
    sections = schema.LiteRTLMMetaData.GetRootAs(data, _HEADER_AT).SectionMetadata()
    for i in range(sections.ObjectsLength()):
        section = sections.Objects(i)
        place = Place(section.BeginOffset(), section.EndOffset())
        if not _HEADER_AT < place.begin <= place.end <= len(data):
            raise ValueError(f"section {i} is said to end at {place.end}")
        kind = section.DataType()
        if kind == kinds.TFLiteModel and model is None and _decodes(schema, section):
            model = place
        elif kind == kinds.HF_Tokenizer_Zlib:
            # Its size stands before it.
            tokenizer = zlib.decompress(data[place.begin + 8 : place.end]).decode()
        elif kind == kinds.SP_Tokenizer:
            sentencepiece = data[place.begin : place.end]
    return Bundle(model, tokenizer, sentencepiece)


def _decodes(schema: Any, section: Any) -> bool:
    """Returns whether a model is the decoder, and not one for pictures or sound."""
    for i in range(section.ItemsLength()):
        item = section.Items(i)
        if item.Key() == b"model_type":
            text = schema.StringValue()
            text.Init(item.Value().Bytes, item.Value().Pos)
            return bool(text.Value() == b"tf_lite_prefill_decode")
    return False
