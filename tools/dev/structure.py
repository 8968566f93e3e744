"""Checks the architecture on the source itself: purity of the cores, who loads settings, and sizes. Who may import
whom is import-linter's (pyproject.toml).

    python -m tools.dev.structure

prints what breaks a rule, exits 1 if anything does, and reports the largest files and functions.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
PACKAGES: Final = ("conf", "gateway", "storage", "ha", "tools")
FILE_LINES_MAX: Final = 500  # about 400 is the aim; past this a file must be split
FUNCTION_LINES_MAX: Final = 60

# Plain Python: no sockets, threads, clocks, files or chance.
PURE: Final = {
    "gateway/dicom/states.py",
    "gateway/dicom/upper_layer.py",
    "gateway/dicom/dimse.py",
    "storage/replication/replica.py",
    "storage/state/files.py",
    "storage/state/file_rows.py",
    "storage/replication/effects.py",
    "storage/replication/epochs.py",
    "storage/replication/messages.py",
    "ha/decide.py",
    "ha/tell/alerts.py",
}
IMPURE_MODULES: Final = {"asyncio", "socket", "threading", "time", "random", "os", "pathlib", "subprocess", "datetime"}
# Only entry points read settings from a file.
MAY_LOAD: Final = {"tools/cli/main.py"}


def modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


def problems_in(path: Path) -> Iterator[str]:
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for module, line in modules(tree):
        top = module.split(".")[0]
        if name in PURE and top in IMPURE_MODULES:
            yield f"{name}:{line}: a pure core must not import {module}"
    if name not in MAY_LOAD and package != "tools" and name != "conf/settings.py" and "load(" in source:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "load":
                yield f"{name}:{node.lineno}: only entry points load settings"
    lines = len(source.splitlines())
    if lines > FILE_LINES_MAX:
        yield f"{name}: {lines} lines; the design asks for a new room"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines"


def main() -> int:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    found = [problem for path in paths for problem in problems_in(path)]
    for problem in found:
        print(problem)
    sizes = sorted(((len(path.read_text().splitlines()), path.relative_to(ROOT)) for path in paths), reverse=True)
    total = sum(lines for lines, _ in sizes)
    largest = ", ".join(f"{path} {lines}" for lines, path in sizes[:5])
    print(f"structure: {len(paths)} files, {total} lines; largest: {largest}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
