"""Train, import and open tokenizers; a tokenizer is a folder with a model file and its facts."""

from data_tools.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
