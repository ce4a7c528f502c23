"""Imports only go down: every module may import its own layer and those below it."""

import ast
from pathlib import Path

import pytest

import bilevel_imaging

ROOT = Path(bilevel_imaging.__file__).parent
LAYERS = [
    {"_version", "checks", "tensors", "errors", "cost", "derivatives", "kernels", "native", "transforms"},
    {"regularizers", "energies"},
    {"lower_solvers", "linear_solvers"},
    {"certificates"},
    {"hypergradients"},
    {"upper_level"},
    {"data", "training", "experiments"},
    {
        "cli",
        "config",
        "config_file",
        "export",
        "import_checkpoints",
        "assembly",
        "training_run",
        "evaluation_run",
        "comparison_cli",
        "__init__",
    },
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# inside a layer there is an order too, where one would otherwise be possible both ways
ONE_WAY = {("regularizers", "energies"), ("linear_solvers", "lower_solvers"), ("data", "training")}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Top-level rooms of the package that a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "bilevel_imaging":
                names = [f"bilevel_imaging.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("bilevel_imaging.")}
    return {name for name in found if name in RANK}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    mine = room(path)
    assert mine in RANK, f"{mine} has no layer: add it to LAYERS"
    for other in imports(path):
        assert RANK[other] <= RANK[mine], f"{path.name} ({mine}) imports {other}, which lies above it"
        assert (mine, other) not in ONE_WAY, f"{mine} must not import {other}"


def test_the_rule_can_fail() -> None:
    assert RANK["cli"] > RANK["training"] > RANK["hypergradients"] > RANK["energies"]
    assert len(modules()) > 30
    assert any("hypergradients" in imports(p) for p in modules() if room(p) == "training")
