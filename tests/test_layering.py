"""Imports run one way, without circles, and `import dat` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room of the package, and the rooms that it may import.
ALLOWED = {
    "utils": set(),
    "ops": {"utils"},
    "layers": {"utils", "ops"},
    "models": {"utils", "ops", "layers"},
    "engine": {"utils", "models"},
    "export": {"utils", "engine", "ops"},
    "detection": {"utils", "ops", "layers", "models", "engine", "export"},
    "classification": {"utils", "ops", "layers", "models", "engine", "export"},
}
# What `import dat` must not bring along; timm itself imports torchvision.
HEAVY = ("torchvision", "matplotlib", "scipy", "fastapi", "onnxruntime", "faster_coco_eval", "tensorboard", "av")


def imports(path):
    """Modules that a file imports anywhere in it, and what it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_rooms_below_it(room):
    files = sorted((ROOT / "dat" / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "dat" and len(parts) > 1:
                assert parts[1] in ALLOWED[room] | {room}, f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in ("detection", "classification", "examples", "benchmarks", "tests")


def test_no_two_modules_import_each_other():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "dat").rglob("*.py")
    }
    # A package's __init__ re-exports its modules: what they import from the package itself is not an edge to them.
    edges = {name: {n for n in imports(path) if n in modules} for name, path in modules.items()}
    edges = {
        name: {n for n in found if not name.startswith(f"{n}.") and n != name}
        for name, found in edges.items()
        if modules[name].name != "__init__.py"
    }
    order, open_ = [], []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name not in order:
            open_.append(name)
            for other in sorted(edges.get(name, ())):
                visit(other)
            order.append(open_.pop())

    for name in sorted(edges):
        visit(name)


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_dat_brings_nothing_heavy_beside_timm_and_what_draws_no_matplotlib():
    code = "import sys, timm; before = set(sys.modules); import dat; "
    code += f"print(sorted(({{*sys.modules}} - before) & {{*{HEAVY!r}}}), end=' '); "
    code += "import dat.visualize; print('matplotlib' in sys.modules)"
    assert run_python(code) == "[] False"
