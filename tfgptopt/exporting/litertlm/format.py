"""The format LiteRTLM, as settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import keras

from tfgptopt.decoder import why_unreadable
from tfgptopt.exporting.litertlm.describing import (
    engine_tokenizer,
    executor_metadata,
    llm_metadata,
)
from tfgptopt.exporting.litertlm.packing import write_bundle
from tfgptopt.exporting.tflite.described import described_model
from tfgptopt.exporting.tflite.describing import PREFILL_LENGTHS, check_settings
from tfgptopt.file.bundle import bundle_builder
from tfgptopt.file.container import append_seal
from tfgptopt.file.metadata import CacheDtype

# Near the end of a cache LiteRT-LM reads with a signature that still fits: one of one token.
_STATIC_LENGTHS = (1, *PREFILL_LENGTHS)


@dataclass(frozen=True)
class LiteRTLM:
    """A `.litertlm` bundle for LiteRT-LM, Google's engine for phones, desktops and the web.

    It holds the graph of a `.tflite` file, the tokenizer and the chat template. `TFLiteCausalLM`
    reads it, too. It is for causal LMs of the known families (see `TFLite`) with a tokenizer, and
    needs the package `litert-lm-builder`: `pip install 'tfgptopt[litertlm]'`.

    Weights are dense: LiteRT-LM computes other tokens with sparse ones.

    Args:
        context_length: int. The most tokens that a text can have: LiteRT-LM holds a cache of so
            many positions from the beginning. Defaults to `None`: as for `TFLite`.
        cache_dtype: `"float32"` or `"int8"`. How keys and values are held, as for `TFLite`.
            Defaults to `"float32"`.
        growing_cache: bool. Whether LiteRT-LM makes the cache larger as a text grows, on CPUs: it
            is faster behind short texts then. Defaults to `False`: the whole context at once.
        accelerator: `"cpu"` or `"gpu"`. For GPUs LiteRT-LM gives the mask, and constants are within
            half precision; such a bundle runs on CPUs, too, where it was tested. On a GPU it was
            not. Defaults to `"cpu"`: apps do not take the GPU for it.

    Raises:
        ImportError: If `litert-lm-builder` is not installed.
        ValueError: If a setting is out of range, or two do not go together.

    Example:

    ```python
    tfgptopt.export(gpt, "gpt.litertlm", LiteRTLM(context_length=512))
    print(tfgptopt.TFLiteCausalLM("gpt.litertlm").generate("import os"))
    ```

    Reference: https://ai.google.dev/edge/litert-lm
    """

    context_length: int | None = None
    cache_dtype: CacheDtype = "float32"
    growing_cache: bool = False
    accelerator: Literal["cpu", "gpu"] = "cpu"

    suffix: ClassVar[str] = ".litertlm"
    sparse: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self.context_length, self.cache_dtype)
        if not isinstance(self.growing_cache, bool):
            raise ValueError(f"`growing_cache` must be a bool. Received: {self.growing_cache!r}")
        if self.accelerator not in ("cpu", "gpu"):
            raise ValueError(
                f"`accelerator` must be 'cpu' or 'gpu'. Received: {self.accelerator!r}"
            )
        if self.accelerator == "gpu" and (self.growing_cache or self.cache_dtype != "float32"):
            raise ValueError(
                "`accelerator='gpu'` goes with a float32 cache of the whole context: caches grow "
                "on CPUs, and scales of int8 rows are beyond half precision. Received: "
                f"cache_dtype={self.cache_dtype!r}, growing_cache={self.growing_cache}"
            )
        bundle_builder("litertlm_builder")  # Raises.

    def write(self, model: keras.Model, target: Path) -> None:
        """Writes a built model, dressed or plain.

        Args:
            model: The model.
            target: The file, which is not there.

        Raises:
            ValueError: If no reader describes the model, it has no tokenizer or no end token, or
                its chat template is more than LiteRT-LM understands.
        """
        reason = why_unreadable(model)
        if reason is not None:
            raise ValueError(
                f"A bundle for LiteRT-LM needs a reader for {type(model).__name__}: {reason}. "
                "Export a TFLite file instead: a name that ends with '.tflite'."
            )
        lengths = PREFILL_LENGTHS if self.growing_cache else _STATIC_LENGTHS
        masked = self.accelerator == "gpu"
        file, about = described_model(model, self, lengths, self.growing_cache, masked=masked)
        language = llm_metadata(about)
        # Where it is said which axis of a cache may grow, none does.
        executor = None if self.growing_cache else executor_metadata(about.decoder)
        # The tokenizer is held once, where LiteRT-LM looks for it.
        for name, data in replace(about, tokenizer=None, sentencepiece=None).entries().items():
            file.metadata(name, data)
        where = "gpu,cpu" if masked else "cpu"
        write_bundle(target, file.pack(), engine_tokenizer(about), language, executor, where)
        append_seal(target)
