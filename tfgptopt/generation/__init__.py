"""Text from an exported file. Imports neither TensorFlow nor Keras."""

from tfgptopt.generation.chat import Chat
from tfgptopt.generation.runtime import TFLiteCausalLM
from tfgptopt.generation.samplers import (
    Greedy,
    MinP,
    Random,
    RepetitionPenalty,
    TopK,
    TopP,
)
from tfgptopt.generation.session import Session
from tfgptopt.generation.templates import ChatTemplate

__all__ = [
    "Chat",
    "ChatTemplate",
    "Greedy",
    "MinP",
    "Random",
    "RepetitionPenalty",
    "Session",
    "TFLiteCausalLM",
    "TopK",
    "TopP",
]
