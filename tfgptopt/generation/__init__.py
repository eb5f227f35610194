"""Text from an exported file. Imports neither TensorFlow nor Keras."""

from tfgptopt.generation.chat import Chat
from tfgptopt.generation.guessing import Draft, NGram
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
from tfgptopt.generation.speculating import Statistics
from tfgptopt.generation.templates import ChatTemplate

__all__ = [
    "Chat",
    "ChatTemplate",
    "Draft",
    "Greedy",
    "MinP",
    "NGram",
    "Random",
    "RepetitionPenalty",
    "Session",
    "Statistics",
    "TFLiteCausalLM",
    "TopK",
    "TopP",
]
