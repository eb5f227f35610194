"""Text from an exported file. Imports neither TensorFlow nor Keras."""

from tfgptopt.generation.runtime import TFLiteCausalLM
from tfgptopt.generation.samplers import Greedy, TopK

__all__ = ["Greedy", "TFLiteCausalLM", "TopK"]
