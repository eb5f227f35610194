"""Text from an exported file. Imports neither TensorFlow nor Keras."""

from tfgptopt.generation.beams import Beam, Hypothesis
from tfgptopt.generation.chat import Chat
from tfgptopt.generation.constraints import Grammar, JsonSchema, Regex
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
    "Beam",
    "Chat",
    "ChatTemplate",
    "Draft",
    "Grammar",
    "Greedy",
    "Hypothesis",
    "JsonSchema",
    "MinP",
    "NGram",
    "Random",
    "Regex",
    "RepetitionPenalty",
    "Session",
    "Statistics",
    "TFLiteCausalLM",
    "TopK",
    "TopP",
]
