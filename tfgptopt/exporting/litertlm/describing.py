"""What a bundle says of its model to LiteRT-LM.

Reference: https://github.com/google-ai-edge/LiteRT-LM, `runtime/proto`.
"""

from __future__ import annotations

from typing import Any

import sentencepiece
import tokenizers

from tfgptopt.exporting.litertlm.templates import SAMPLE, engine_template
from tfgptopt.file.bundle import bundle_builder
from tfgptopt.file.metadata import DecoderShape, Metadata
from tfgptopt.file.names import KEYS, VALUES, in_layer, parts_of
from tfgptopt.generation.codec import Codec
from tfgptopt.generation.templates import ChatTemplate, encode_written, shielded

_PROTOS = "runtime.proto"


def engine_tokenizer(about: Metadata) -> str | bytes:
    """Returns the tokenizer of a model as LiteRT-LM reads it: JSON, or a SentencePiece model.

    In JSON, each name that is no text is a token: the engine encodes what a template wrote whole.
    """
    if about.sentencepiece is not None:
        return about.sentencepiece
    tokenizer = tokenizers.Tokenizer.from_str(about.tokenizer or "")
    tokenizer.add_special_tokens(list(about.special_tokens))
    text: str = tokenizer.to_str()
    return text


def llm_metadata(about: Metadata) -> Any:
    """Returns what is said of start and end, context length and chats, as a protobuf message.

    Args:
        about: What the model's file says of itself.

    Raises:
        ValueError: If the model has no tokenizer or no end token, or its chat template is more than
            LiteRT-LM understands.
    """
    if about.tokenizer is None and about.sentencepiece is None:
        raise ValueError(
            "A bundle for LiteRT-LM has a tokenizer, and the model has none: it has no "
            "preprocessor. Set `model.preprocessor`, or export a TFLite file: a name that ends "
            "with '.tflite'."
        )
    tokenizer = Codec(about).tokenizer
    message: Any = bundle_builder(f"{_PROTOS}.llm_metadata_pb2").LlmMetadata()
    start = about.generation.start_token_id
    names = about.chat.stop_tokens if about.chat else ()
    ends = [*about.generation.end_token_ids, *map(tokenizer.token_to_id, names)]
    for end in dict.fromkeys(token for token in ends if token is not None):
        message.stop_tokens.add().token_ids.ids.append(end)
    for name in names:
        if tokenizer.token_to_id(name) is None:  # The model writes it out.
            message.stop_tokens.add().token_str = name
    if not message.stop_tokens:
        raise ValueError(
            "LiteRT-LM needs a token that ends an answer, and the model's tokenizer has none: "
            "neither an end token nor stop tokens of a chat template."
        )
    template = None if about.chat is None else ChatTemplate.from_metadata(about.chat)
    written = engine_template(template)
    message.jinja_prompt_template = written.source
    if template is not None:
        start = tokenizer.token_to_id(template.bos_token) if written.starts else None
        text = template.render(shielded(SAMPLE), add_generation_prompt=True)
        _check_same_tokens(about, encode_written(tokenizer, text), start, written.render())
    if start is not None:
        message.start_token.token_ids.ids.append(start)
    message.max_num_tokens = about.decoder.context_length
    message.llm_model_type.generic_model.SetInParent()
    message.supports_thinking = message.supports_function_calling = False
    return message


def _check_same_tokens(about: Metadata, ours: list[int], start: int | None, text: str) -> None:
    """Raises where LiteRT-LM would read a chat as other tokens than `TFLiteCausalLM` does.

    Raises:
        ValueError: If it would.
    """
    stored = engine_tokenizer(about)
    if isinstance(stored, bytes):
        theirs = sentencepiece.SentencePieceProcessor(model_proto=stored).encode(text)
    else:
        theirs = tokenizers.Tokenizer.from_str(stored).encode(text, add_special_tokens=False).ids
    theirs = [*([] if start is None else [start]), *theirs]
    if theirs != ours:
        raise ValueError(
            "LiteRT-LM encodes what the chat template writes as a whole, which gives other tokens: "
            f"{theirs} in place of {ours} for {text!r}. Control tokens of SentencePiece cannot be "
            "written out; of these the engine only puts the start token."
        )


def executor_metadata(decoder: DecoderShape) -> Any:
    """Returns which inputs are caches, as a protobuf message."""
    protos: Any = bundle_builder(f"{_PROTOS}.executor_metadata_pb2")
    message = protos.ExecutorMetadata()
    buffers = message.llm_executor_metadata.state_buffers
    kinds = {
        KEYS: protos.StateBuffer.TYPE_GLOBAL_KEY_CACHE,
        VALUES: protos.StateBuffer.TYPE_GLOBAL_VALUE_CACHE,
    }
    for layer in range(decoder.num_layers):
        for kind, number in kinds.items():
            for part in parts_of(kind, decoder.cache_dtype):
                name = in_layer(part, layer)
                buffers.add(
                    prefill_input_name=name,
                    prefill_output_name=name,
                    decode_input_name=name,
                    decode_output_name=name,
                    type=number,
                    sequence_axis=1,
                )
    return message
