"""The format TFLite, as settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import keras

from tfgptopt.decoder import is_decoder_only, why_unreadable
from tfgptopt.exporting.tflite.converted import converted_causal_lm_file, converted_file
from tfgptopt.exporting.tflite.described import described_file
from tfgptopt.exporting.tflite.describing import check_batch_sizes, check_settings
from tfgptopt.file.container import seal
from tfgptopt.file.metadata import CacheDtype


@dataclass(frozen=True)
class TFLite:
    """A `.tflite` file. All settings but the defaults are for causal LMs.

    What the file holds depends on the model:

    - A causal language model of a known family (Bloom, Falcon, Gemma 1 to 4, Gemma 3n, GPT-2,
      GPT-NeoX, Llama, Mistral, OPT, Phi-3, Qwen 2 and 3, SmolLM3; the mixtures of experts GPT-OSS,
      Mixtral, Qwen MoE, Qwen 3 MoE, of which one token computes those it is sent to): prefill and
      decode signatures with a KV cache, each weight once, as the integers that training rounded
      to, the tokenizer and the recipe. `TFLiteCausalLM` reads it, and so does any LiteRT runtime.
      Of a Gemma that sees or hears it is the text part, without the encoders.
    - Any other causal language model, such as a class of your own over one of KerasHub's: the same
      signatures, made by TensorFlow's converter from the model's `call_with_cache`. It warns: the
      export takes longer, and the file is larger and slower.
    - Any other Keras model: what `keras.Model.export` gives, with the weights of its quantized
      Dense, EinsumDense and Embedding layers as the integers that training rounded to.

    Args:
        context_length: int. The most tokens that a text can have: the KV cache grows up to it.
            Defaults to `None`: all positions that the model has; of a model that has any number,
            the `sequence_length` of its preprocessor, or else 1024.
        cache_dtype: `"float32"` or `"int8"`. How keys and values are held: as floats, exactly, or
            as integers with a scale for each position and head, in a quarter of the memory and
            faster to read behind long texts. `"int8"` is for models without grouped queries.
            Defaults to `"float32"`.
        sparse: bool. Leave out the empty blocks of float32 weights that were pruned with
            `Block(4, 1)`: a smaller file, and one that decodes faster from about 60 % of zeros on.
            Defaults to `False`.
        batch_sizes: tuple of ints. How many texts can be decoded together, such as `(4, 8)`: for
            lists of prompts and beams, since weights are read once for all of them. Each adds some
            hundred kB to a file, and time to load. Defaults to `()`: one text after the other.

    Raises:
        ValueError: If a setting is out of range.

    Example:

    ```python
    tfgptopt.export(gpt, "gpt.tflite", TFLite(context_length=512, cache_dtype="int8"))
    ```
    """

    context_length: int | None = None
    cache_dtype: CacheDtype = "float32"
    sparse: bool = False
    batch_sizes: tuple[int, ...] = ()

    suffix: ClassVar[str] = ".tflite"

    def __post_init__(self) -> None:
        check_settings(self.context_length, self.cache_dtype)
        if not isinstance(self.sparse, bool):
            raise ValueError(f"`sparse` must be a bool. Received: {self.sparse!r}")
        check_batch_sizes(self.batch_sizes)

    def write(self, model: keras.Model, target: Path, draft: keras.Model | None = None) -> None:
        """Writes a built model, dressed or plain.

        Args:
            model: The model.
            target: The file, which is not there.
            draft: A smaller model that the file carries, too. Defaults to `None`.

        Raises:
            ValueError: If the model cannot be exported, or a setting does not fit it.
        """
        known = why_unreadable(model) is None
        asked = {
            "sparse=True": self.sparse,
            "cache_dtype='int8'": self.cache_dtype == "int8",
            f"batch_sizes={self.batch_sizes}": self.batch_sizes,
            "draft": draft is not None,
        }
        for setting, is_asked in asked.items():
            if is_asked and not known:
                raise ValueError(f"`{setting}` needs a reader for {type(model).__name__}.")
        if known:
            data = described_file(model, self, self.batch_sizes, draft)
        elif is_decoder_only(model):
            data = converted_causal_lm_file(model, self)
        else:
            data = converted_file(model, self)
        with target.open("wb") as stream:
            stream.write(data)
            stream.write(seal(data))
