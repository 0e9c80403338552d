"""The tokenizer that ships with every checkpoint: cells and labels in, ids out, and back.

The class is imported when it is asked for, as transformers takes seconds; the modules of names and labels need none.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenization.tokenization_dcm import DCMTokenizer

__all__ = ["DCMTokenizer"]


def __getattr__(name: str) -> type:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import AutoTokenizer, PreTrainedConfig

    from tokenization.tokenization_dcm import DCMTokenizer

    class TokenizerOnly(PreTrainedConfig):
        """AutoTokenizer registers a class beside a configuration; the model's own is not known here."""

        model_type = "dcm_tokenizer"

    # AutoTokenizer then finds the class by the name that tokenizer_config.json gives it
    AutoTokenizer.register(TokenizerOnly, tokenizer_class=DCMTokenizer, exist_ok=True)
    globals()[name] = DCMTokenizer
    return DCMTokenizer
