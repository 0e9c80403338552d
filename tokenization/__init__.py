"""The tokenizer that ships with every checkpoint, and the small file and command-line helpers that every stage shares."""

from tokenization.tokenization_dcm import DCMTokenizer

DCMTokenizer.register_for_auto_class()

__all__ = ["DCMTokenizer"]
