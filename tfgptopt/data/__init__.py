"""Text in: files, tokenizer, packed windows."""

from tfgptopt.backend import require_tensorflow
from tfgptopt.data.corpus import Corpus, load_corpus, tokens_as_input
from tfgptopt.data.files import TextFile, find_files, split_files, standard_library
from tfgptopt.data.tokenizer import train_tokenizer

require_tensorflow()

__all__ = [
    "Corpus",
    "TextFile",
    "find_files",
    "load_corpus",
    "split_files",
    "standard_library",
    "tokens_as_input",
    "train_tokenizer",
]
