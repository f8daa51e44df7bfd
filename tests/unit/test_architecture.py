"""The architecture: layers, no work at import, and every module saying what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "parbake"
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
)
OPTIONAL = {"pandas", "sklearn", "skl2onnx", "joblib", "lightgbm", "xgboost", "torch", "onnxscript"}


def test_the_layers_hold() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_says_what_it_is_in_its_first_line(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if not tree.body:
        assert path.name == "__init__.py"
        return
    first = (ast.get_docstring(tree) or "").split("\n")[0]
    assert first.endswith((".", ":"))
    assert len(first) <= 120


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_optional_libraries_are_imported_in_functions_only(path: Path) -> None:
    at_import: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            at_import |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            at_import.add(node.module.partition(".")[0])
    assert not at_import & OPTIONAL


def test_one_module_imports_onnxruntime_with_its_telemetry_off() -> None:
    found = set()
    for path in MODULES:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "onnxruntime" in text else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            if any(name.partition(".")[0] == "onnxruntime" for name in names):
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == {"contract/ort.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_is_named_after_nothing(path: Path) -> None:
    assert path.stem not in {"utils", "helpers", "manager", "common", "misc"}


def test_the_command_starts_without_the_libraries_that_take_long() -> None:
    code = "import sys, parbake.cli.main as m; m.main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "click" in loaded
    assert not loaded & (
        OPTIONAL | {"sqlalchemy", "numpy", "onnx", "onnxruntime", "pyarrow", "grpc", "asyncio"}
    )


def test_the_version_is_written_once() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert not [path for path in MODULES if "__version__ = " in path.read_text()]


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_a_lock_has_hashes_and_no_address(lock: Path) -> None:
    text = lock.read_text()
    pinned = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert pinned
    for line in pinned:
        assert "==" in line
        assert line.endswith("\\"), f"{line} has no hash"
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


@pytest.mark.xdist_group("one worker")
def test_tests_of_a_group_run_in_one_worker(request: pytest.FixtureRequest) -> None:
    # By what stands behind the @ xdist knows, where it is told to go by groups.
    grouped = getattr(request.config.option, "loadgroup", False)
    assert request.node.nodeid.endswith("@one worker") == grouped
