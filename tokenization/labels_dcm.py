"""Read names, turn label columns into ids, and unknown labels into errors that list near matches.

Needs numpy only: pandas columns are recognised by what they offer.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

SHOWN_LABELS = 20


def read_text(path: str | Path) -> str:
    """Text of a file of names. A byte-order mark, as spreadsheets write it, is no part of the first one.

    Raises:
        ValueError: it is not text in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a text file ({error}); expected UTF-8") from error


def read_names(path: str | Path) -> list[str]:
    """Names of a text file, one per line, in order, without white space around them; empty lines are passed over.

    Raises as :func:`read_text`.
    """
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def unknown_label_error(kind: str, unknown: Sequence[str], known: Sequence[str]) -> ValueError:
    """The error for labels that a vocabulary lacks: near matches if there are any, else the labels that exist.

    Args:
        kind: what the labels are, such as ``"perturbation"``.
        unknown: the labels that were not found; the first is matched against ``known``.
        known: every label of the vocabulary.
    """
    near = difflib.get_close_matches(unknown[0], known, n=5, cutoff=0.6)
    if not near:
        near = [label for label in known if label.lower() == unknown[0].lower()]
    others = f" (and {len(unknown) - 1} more unknown labels)" if len(unknown) > 1 else ""
    if near:
        hint = f"near matches: {', '.join(map(repr, near))}"
    else:
        shown = ", ".join(map(repr, known[:SHOWN_LABELS]))
        hint = f"known labels: {shown}" + (f", ... ({len(known):,} in all)" if len(known) > SHOWN_LABELS else "")
    return ValueError(f"unknown {kind} {unknown[0]!r}{others}; {hint}")


def shortened(names: Iterable[object], most: int = 5) -> str:
    """Return the first names, separated by commas, and how many more there are; ``"none"`` without any."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def factorize(labels: object) -> tuple[list[str], np.ndarray]:
    """Unique labels as strings, and for each of n cells the index of its label, -1 where it is missing (None, NaN, NA).

    Args:
        labels: n labels: a sequence, an array, or a pandas column (categories are used as they are, without a sort).

    Returns:
        The labels that occur, and indices into them, (n,) int64.
    """
    categorical = getattr(labels, "cat", labels)
    if hasattr(categorical, "categories") and hasattr(categorical, "codes"):
        codes = np.asarray(categorical.codes, dtype=np.int64)
        used = np.unique(codes[codes >= 0])
        renumbered = np.full(len(categorical.categories) + 1, -1, dtype=np.int64)
        renumbered[used] = np.arange(len(used))
        return [str(categorical.categories[code]) for code in used], renumbered[codes]
    values = np.asarray(labels, dtype=object).reshape(-1)
    if hasattr(labels, "isna"):
        missing = np.asarray(labels.isna())
    else:
        try:
            missing = np.equal(values, None) | np.not_equal(values, values).astype(bool)
        except TypeError:  # pandas' NA says neither yes nor no to any comparison
            missing = np.array([v is None or type(v).__name__ == "NAType" or v != v for v in values], dtype=bool)
    codes = np.full(len(values), -1, dtype=np.int64)
    unique, codes[~missing] = np.unique(values[~missing].astype(str), return_inverse=True)
    return unique.tolist(), codes


def label_ids(labels: object, vocabulary: Sequence[str], kind: str) -> np.ndarray:
    """Ids of n labels in a vocabulary, (n,) int64; -1 where a label is missing.

    Raises:
        ValueError: a label is not in the vocabulary.
    """
    unique, codes = factorize(labels)
    index = {label: i for i, label in enumerate(vocabulary)}
    unknown = [label for label in unique if label not in index]
    if unknown:
        raise unknown_label_error(kind, unknown, vocabulary)
    return np.array([index[label] for label in unique] + [-1], dtype=np.int64)[codes]


def split_perturbation(label: str, *, control: str | None, separator: str | None) -> list[str]:
    """Single names of a perturbation label, sorted, each once, without the control unless it stands alone.

    ``"KLF1+TGFBR2"`` gives both genes, ``"KLF1 + TGFBR2"`` too, ``"X+control"`` gives X, ``"control+control"`` and
    ``"control"`` give the control.

    Raises:
        ValueError: a part is empty, as in ``"KLF1+"``.
    """
    parts = [part.strip() for part in label.split(separator)] if separator else [label]
    if not all(parts):
        raise ValueError(
            f"perturbation {label!r} has an empty part; expected names joined by {separator!r}: where it is a part of "
            'names, pass --separator "" (separator=None), or what else joins names'
        )
    names = sorted(set(parts) - {control})
    return names or [parts[0]]


def join_perturbation(names: Iterable[str], separator: str | None) -> str:
    """The label of a combination: its single names sorted, joined by the separator."""
    return (separator or "+").join(sorted(names))
