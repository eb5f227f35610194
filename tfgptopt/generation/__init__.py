"""Text from an exported file. Imports neither TensorFlow nor Keras."""

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

__all__ = [
    "Greedy",
    "MinP",
    "Random",
    "RepetitionPenalty",
    "Session",
    "TFLiteCausalLM",
    "TopK",
    "TopP",
]
