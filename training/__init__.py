"""Files of counts come in; shards, and checkpoints trained on them, go out.

``fit`` takes cells in memory.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.in_memory import fit

__all__ = ["fit"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from training.in_memory import fit

    return fit
