"""Text and chats in: files, records, templates, tokenizers, windows."""

from tfgptopt.backend import require_tensorflow
from tfgptopt.data.chats import load_template, set_template, template_of
from tfgptopt.data.corpus import Corpus, load_corpus, tokens_as_input
from tfgptopt.data.files import TextFile, find_files, split_files, standard_library
from tfgptopt.data.presets import load_preset, load_weights, save_preset
from tfgptopt.data.tokenizer import train_tokenizer
from tfgptopt.generation.templates import ChatTemplate

require_tensorflow()

__all__ = [
    "ChatTemplate",
    "Corpus",
    "TextFile",
    "find_files",
    "load_corpus",
    "load_preset",
    "load_template",
    "load_weights",
    "save_preset",
    "set_template",
    "split_files",
    "standard_library",
    "template_of",
    "tokens_as_input",
    "train_tokenizer",
]
