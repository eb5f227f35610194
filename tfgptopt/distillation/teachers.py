"""What can teach: a model that runs beside the student, or a recording of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import keras
import keras_hub
import tensorflow as tf

from tfgptopt.data.encoding import tokenizer_of
from tfgptopt.distillation.features import AttentionMaps, HiddenStates
from tfgptopt.distillation.recording import Recording
from tfgptopt.distillation.views import View, look
from tfgptopt.model import masks
from tfgptopt.model.cloning import clone
from tfgptopt.model.types import Data
from tfgptopt.quantization.layers import is_dressed


@dataclass(eq=False)
class LiveTeacher:
    """A model that runs in the same compiled step, in inference mode and without gradient.

    It is no part of the student's `Distiller`: neither trained, nor saved, nor dressed.

    Attributes:
        model: The teacher.
        hidden, attention: Its layers that are watched.
    """

    model: keras.Model
    hidden: list[keras.Layer] = field(default_factory=list)
    attention: list[keras.Layer] = field(default_factory=list)

    def look(self, inputs: Data) -> View:
        """Returns what the teacher says of a batch."""
        seen = look(self.model, inputs, self.hidden, self.attention)
        return seen.map(tf.stop_gradient)


def check_built(model: keras.Model, role: str) -> None:
    """Raises unless a student or teacher is a built Keras model.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"The {role} must be a Keras 3 model. Received: {model!r} (of type {type(model)})"
        )
    if not model.built:
        raise ValueError(
            f"The {role} '{model.name}' is not built, so it has no weights yet. Call it on a "
            "batch, or `model.build(input_shape)`, first."
        )


def live_teacher(student: keras.Model, teacher: keras.Model | Literal["self"]) -> LiveTeacher:
    """Returns the teacher of a student, a copy of it for `"self"`.

    Raises:
        ValueError: If it is no built model, shares layers or has another vocabulary.
    """
    if isinstance(teacher, str):
        if teacher != "self":
            raise ValueError(
                f"`teacher` must be a model, a Recording or 'self'. Received: {teacher!r}"
            )
        return LiveTeacher(_dense_copy(student))
    check_built(teacher, "teacher")
    mine = {id(variable) for variable in student.variables}
    if any(id(variable) in mine for variable in teacher.variables):
        raise ValueError(
            "Teacher and student share weights, so the teacher would change with the student. "
            "For a copy of the student as it is now, give `teacher='self'`."
        )
    _check_vocabularies(student, teacher)
    return LiveTeacher(teacher)


def check_recording(student: keras.Model, recording: Recording, losses: Sequence[Any]) -> None:
    """Raises if a student cannot learn from a recording by some losses.

    Raises:
        ValueError: If the vocabulary or the tokenizer is another one, or a loss needs what was not
            recorded.
    """
    size = vocabulary_size(student)
    if size is not None and size != recording.vocabulary_size:
        raise ValueError(
            f"The recorded teacher has {recording.vocabulary_size} tokens, and the student {size}."
        )
    own = tokenizer_hash(tokenizer_of(student))
    if None not in (own, recording.tokenizer) and own != recording.tokenizer:
        raise ValueError("The recording was made with another tokenizer than the student's.")
    for loss in losses:
        if isinstance(loss, HiddenStates | AttentionMaps):
            raise ValueError(
                f"{type(loss).__name__} needs the teacher itself; a recording has the likeliest "
                "tokens only."
            )
        temperature = getattr(loss, "temperature", recording.temperature)
        if temperature != recording.temperature:
            raise ValueError(
                f"The recording was made with temperature {recording.temperature}, and {loss} "
                f"asks for {temperature}. Record again, or use the recorded one."
            )


def _dense_copy(student: keras.Model) -> keras.Model:
    """Returns a copy of a student before it is compressed, to teach it.

    Raises:
        ValueError: If it is pruned or quantize-aware already.
    """
    dressed = any(is_dressed(layer) for layer in student._flatten_layers())
    if dressed or any(masks.masked(variable) for variable in student.variables):
        raise ValueError(
            f"The student '{student.name}' is pruned or quantize-aware already: `teacher='self'` "
            "would copy the compressed model. Make the Distiller before that, or give the dense "
            "model as the teacher."
        )
    return clone(student)


def vocabulary_size(model: keras.Model) -> int | None:
    """Returns for how many tokens a model gives logits, or `None` if that is not known yet."""
    outputs = getattr(model, "outputs", None)
    if not isinstance(outputs, Sequence) or len(outputs) != 1:
        return None
    size = outputs[0].shape[-1]
    return None if size is None else int(size)


def tokenizer_hash(tokenizer: keras_hub.tokenizers.Tokenizer) -> str | None:
    """Returns a hash of the tokens in their order, or `None` where there is no tokenizer."""
    if tokenizer is None:
        return None
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.vocabulary_size())]
    return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=16).hexdigest()


def _check_vocabularies(student: keras.Model, teacher: keras.Model) -> None:
    """Raises if two models are known to speak of different tokens.

    Raises:
        ValueError: If they give logits for other numbers of tokens, or have other tokenizers.
    """
    mine, yours = vocabulary_size(student), vocabulary_size(teacher)
    if mine is not None and yours is not None and mine != yours:
        raise ValueError(
            f"The teacher gives logits for {yours} tokens, and the student for {mine}: they need "
            "the same vocabulary. To shrink the vocabulary, shrink the teacher's first: "
            "`tfgptopt.shrink(teacher, vocabulary=...)`."
        )
    hashes = tokenizer_hash(tokenizer_of(student)), tokenizer_hash(tokenizer_of(teacher))
    if None not in hashes and hashes[0] != hashes[1]:
        raise ValueError(
            "Teacher and student have different tokenizers, so the same token id means another "
            "text to each. Distillation needs one vocabulary for both."
        )
