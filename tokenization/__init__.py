"""The tokenizer that ships with every checkpoint, and file and command-line functions that all stages share."""

from tokenization.tokenization_dcm import DCMTokenizer

DCMTokenizer.register_for_auto_class()

__all__ = ["DCMTokenizer"]
