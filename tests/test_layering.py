"""Imports run one way: ops, layers, models, then classification and detection, which never meet."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "dat/ops": ("dat.layers", "dat.models", "dat.engine", "detection", "classification"),
    "dat/layers": ("dat.models", "dat.engine", "detection", "classification"),
    "dat/models": ("dat.engine", "detection", "classification"),
    "dat/deploy": ("detection", "classification"),
    "dat/training": ("detection", "classification"),
    "detection": ("classification", "examples"),
    "classification": ("detection", "examples"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_run_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            wrong = [f for f in FORBIDDEN[folder] if name == f or name.startswith(f + ".")]
            assert not wrong, f"{path.relative_to(ROOT)} imports {name}"


def test_the_package_lists_all_its_folders():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "dat").rglob("__init__.py")}
    assert set(listed) == present
