"""Who may import whom: the layers of the design, and what the Hub allows in files that ship with a checkpoint."""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED_FOLDERS = ("modeling_dcm", "tokenization")
FIRST_PARTY = {*SHIPPED_FOLDERS, "training", "eval", "model_cards", "tests"}

# A module may import what stands in a folder of a lower rank, and modules of its own rank in its own package. A folder
# that is not named has the rank of the one above it.
RANKS = {
    "tests": 5,
    **dict.fromkeys(["eval/benchmarks", "eval/studies"], 4),
    **dict.fromkeys(["training", "eval"], 3),
    "model_cards": 2,
    **dict.fromkeys(["training/data", "training/perturbations", "eval/metrics"], 1),
    **dict.fromkeys(["modeling_dcm", "tokenization"], 0),
}
NUMERICAL = {"numpy", "scipy", "torch", "ot"}
MOST_MODULES = {"modeling_dcm": 15}  # elsewhere 12
NOT_COUNTED = ("__init__.py", "handler.py")


def source_files() -> list[Path]:
    return [path for folder in sorted(FIRST_PARTY) for path in sorted((ROOT / folder).rglob("*.py"))]


def shipped_files() -> list[Path]:
    """Files that are copied beside the weights: all of ``modeling_dcm/``, and the tokenizer's."""
    files = [path for folder in SHIPPED_FOLDERS for path in sorted((ROOT / folder).glob("*_dcm.py"))]
    return [*files, ROOT / "modeling_dcm" / "handler.py"]


def rank(path: str) -> int:
    return RANKS[next(folder for folder in map(str, Path(path).parents) if folder in RANKS)]


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Every import statement, those inside functions and under ``TYPE_CHECKING`` too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_modules(path: Path) -> set[str]:
    """Dotted names of what a file imports, relative imports made absolute, names of a package its modules."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = [*package[: len(package) - node.level + 1]] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        found |= {f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module for alias in node.names}
    return found


def is_module(dotted: str) -> bool:
    path = ROOT / Path(*dotted.split("."))
    return path.with_suffix(".py").exists()


def file_of(dotted: str) -> str:
    """Path of a first-party module below the root; of a package its ``__init__.py``."""
    path = Path(*dotted.split("."))
    return str(path.with_suffix(".py") if is_module(dotted) else path / "__init__.py")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_every_python_file_stands_in_a_layer():
    tops = {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py")} - {"demo", "build", "dist"}
    assert {top for top in tops if not top.startswith(".")} == FIRST_PARTY


@pytest.mark.parametrize("name", names(source_files()))
def test_imports_only_go_down(name):
    targets = [file_of(module) for module in imported_modules(ROOT / name) if module.split(".")[0] in FIRST_PARTY]
    sideways = [target for target in targets if rank(target) == rank(name)]
    assert {target.split("/")[0] for target in sideways} <= {name.split("/")[0]}
    assert [target for target in targets if rank(target) > rank(name)] == []


@pytest.mark.parametrize("name", names(sorted((ROOT / "eval" / "metrics").glob("*.py"))))
def test_metrics_need_numerical_packages_only(name):
    roots = {module.split(".")[0] for module in imported_modules(ROOT / name)}
    assert roots - set(sys.stdlib_module_names) <= NUMERICAL | {"eval"}


def test_no_folder_outgrows_a_floor_plan():
    modules = Counter(str(path.parent.relative_to(ROOT)) for path in source_files() if path.name not in NOT_COUNTED)
    folders = {name: number for name, number in modules.items() if not name.startswith("tests")}
    assert {name: number for name, number in folders.items() if number > MOST_MODULES.get(name, 12)} == {}


@pytest.mark.parametrize("name", names(shipped_files()))
def test_shipped_files_import_each_other_as_flat_siblings_only(name):
    """Saving copies them by basename into one folder, where only ``from .sibling_dcm import thing`` works. Transformers
    finds relative imports by a regular expression: no line of a docstring may look like one."""
    path, relative = ROOT / name, 0
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            relative += 1
            assert node.level == 1
            assert re.fullmatch(r"\w+_dcm", node.module or ""), "a lone `from . import x` breaks loading"
            assert (path.parent / f"{node.module}.py").exists()
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not {module.split(".")[0] for module in modules} & FIRST_PARTY
    looks = r"^\s*(?:from\s+\.\S*\s+import|import\s+\.)"
    assert len(re.findall(looks, path.read_text(encoding="utf-8"), flags=re.MULTILINE)) == relative


def test_no_two_shipped_files_have_the_same_basename():
    basenames = [path.name for path in shipped_files()]
    assert len(set(basenames)) == len(basenames)
