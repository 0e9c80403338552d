"""Checkpoints and files of cells come in; drawn, completed and scored cells, and numbers about them, go out.

``compare`` and ``plot`` take cells in memory.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.in_memory import compare, plot

__all__ = ["compare", "plot"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from eval import in_memory

    return getattr(in_memory, name)
