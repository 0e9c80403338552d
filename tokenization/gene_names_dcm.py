"""Find the genes of a panel among the genes of data: by name, and Ensembl ids whatever version is written behind them.

Never guesses: where several names mean one gene, nothing is chosen. Letter: G genes that are looked for.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

VERSIONED = re.compile(r"(ENS[A-Z]*\d{11})\.\d+")
ENSEMBL_ID = re.compile(r"(ENS[A-Z]*\d{11})(?:\.\d+)?")


def without_version(name: str) -> str:
    """``ENSG00000141510`` for ``ENSG00000141510.12``; any other name as it is."""
    match = VERSIONED.fullmatch(name)
    return match[1] if match else name


def find_genes(genes: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Where ``genes`` stand among ``names``, each of which is unique.

    A gene stands where its name does. An Ensembl id that does not is found with another version, or without one, if one
    gene and one name have this id.

    Returns:
        Positions in ``names``, (G,) int64, -1 where there is none; and the Ensembl ids that are several genes or names,
        not all of them the same on both sides, with these names: -1 too.
    """
    position = {name: i for i, name in enumerate(names)}
    found = np.array([position.get(gene, -1) for gene in genes], dtype=np.int64)
    if (found >= 0).all() and len(genes) == len(names):
        return found, {}
    wanted, there = _by_id(genes), _by_id(names)
    doubtful = {}
    for id_ in wanted.keys() & there.keys():
        rows, columns = wanted[id_], there[id_]
        if set(columns) <= set(found[rows].tolist()):  # every name is the name of a gene
            continue
        if len(rows) == len(columns) == 1:
            found[rows[0]] = columns[0]
        else:
            doubtful[id_] = sorted({*(genes[i] for i in rows), *(names[i] for i in columns)})
            found[rows] = -1
    return found, dict(sorted(doubtful.items()))


def _by_id(names: Sequence[str]) -> dict[str, list[int]]:
    """Positions of the names of each Ensembl id."""
    positions = defaultdict(list)
    for i, name in enumerate(names):
        match = ENSEMBL_ID.fullmatch(name)
        if match:
            positions[match[1]].append(i)
    return positions
