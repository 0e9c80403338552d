"""The tokenizer that ships with every checkpoint, and file and command-line functions that all stages share."""

from transformers import AutoTokenizer, PreTrainedConfig

from tokenization.tokenization_dcm import DCMTokenizer

DCMTokenizer.register_for_auto_class()


class _TokenizerOnly(PreTrainedConfig):
    """AutoTokenizer registers a class beside a configuration; the model's own is not known here."""

    model_type = "dcm_tokenizer"


# With this package imported AutoTokenizer finds the class by the name that tokenizer_config.json gives it.
AutoTokenizer.register(_TokenizerOnly, tokenizer_class=DCMTokenizer, exist_ok=True)

__all__ = ["DCMTokenizer"]
