"""Change one expression of the program at a time, and see whether a test notices.

Outside CI: ``.venv/bin/python tests/mutation/run.py --help``.  Each mutant is made in a copy of the
checkout, and the tests of its group run there until the first failure.  The same seed makes the
same mutants, so that two versions of the tests can be compared.  The report is JSON lines: one
mutant a line, ``killed`` or ``survived``, then a line of totals for each group.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "http1": (("llmproxy/http1",), ("tests/http1", "tests/upstream/test_http1.py")),
    "policy": (("llmproxy/policy",), ("tests/policy",)),
    "dialects": (("llmproxy/dialects",), ("tests/dialects", "tests/stream")),
    "gateway": (("llmproxy/gateway",), ("tests/gateway",)),
    "stream": (("llmproxy/stream",), ("tests/stream",)),
}
"""By name: the folders whose modules are changed, and the tests that must notice."""

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
_ARITHMETIC: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.FloorDiv(),
    ast.FloorDiv: ast.Mult(),
}


class Mutant(NamedTuple):
    """One change: the source between two offsets (in bytes) is replaced."""

    file: str
    place: str
    before: str
    after: str
    start: int
    end: int


class Finder(ast.NodeVisitor):
    """Finds every change that can be made in one module, with the function that it stands in."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file = file
        self.source = source
        self.found: list[Mutant] = []
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._place: list[str] = []

    def _add(self, node: ast.expr | ast.stmt, after: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._lines[node.lineno - 1] + node.col_offset
        end = self._lines[node.end_lineno - 1] + node.end_col_offset
        before = self.source[start:end].decode()
        if before != after:
            place = ".".join(self._place)
            self.found.append(Mutant(self.file, place, before, after, start, end))

    def _inside(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._place.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._place.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Look into a class."""
        self._inside(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Look into a function."""
        self._inside(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        """Look into a coroutine."""
        self._inside(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Leave annotations alone."""
        if node.value is not None:
            self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Turn a comparison around, or move its edge."""
        if len(node.ops) == 1:
            left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
            self._add(node, f"({left}) {_COMPARISONS[type(node.ops[0])]} ({right})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Swap ``and`` and ``or``."""
        word = " or " if isinstance(node.op, ast.And) else " and "
        self._add(node, "(" + word.join(f"({ast.unparse(one)})" for one in node.values) + ")")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Leave out ``not``."""
        if isinstance(node.op, ast.Not):
            self._add(node, f"bool({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Swap sums and differences, products and quotients."""
        other = _ARITHMETIC.get(type(node.op))
        if other is not None:
            self._add(node, f"({ast.unparse(ast.BinOp(node.left, other, node.right))})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Move a number by one, and turn a truth around."""
        if isinstance(node.value, bool):
            self._add(node, str(not node.value))
        elif isinstance(node.value, int):
            self._add(node, str(node.value + 1))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave texts alone."""

    def visit_Return(self, node: ast.Return) -> None:
        """Return nothing."""
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self._add(node, "return None")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Leave out a call."""
        if isinstance(node.value, ast.Call | ast.Await):
            self._add(node, "pass")
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Leave out the change of an attribute."""
        if all(isinstance(target, ast.Attribute) for target in node.targets) and self._place[
            -1:
        ] != ["__init__"]:
            self._add(node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """Leave out a count."""
        self._add(node, "pass")
        self.generic_visit(node)


def mutants(root: Path, folders: tuple[str, ...]) -> list[Mutant]:
    """Return every mutant of the modules in these folders (or of these files)."""
    found: list[Mutant] = []
    for folder in folders:
        path = root / folder
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            source = file.read_bytes()
            finder = Finder(str(file.relative_to(root)), source)
            finder.visit(ast.parse(source))
            found += finder.found
    return found


def run(
    copy: Path, python: str, mutant: Mutant | None, tests: tuple[str, ...], limit: float
) -> bool:
    """Tell whether the tests fail (or hang) with this mutant in the copy."""
    file, source = None, b""
    if mutant is not None:
        file = copy / mutant.file
        source = file.read_bytes()
        file.write_bytes(source[: mutant.start] + mutant.after.encode() + source[mutant.end :])
    command = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, timeout=limit, check=False)
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        if file is not None:
            file.write_bytes(source)


def judged(args: argparse.Namespace, copy: Path) -> Iterator[dict[str, object]]:
    """Yield the verdict on each mutant, then the totals."""
    for name in args.group or GROUPS:
        folders, tests = GROUPS[name]
        if run(copy, args.python, None, tests, args.limit):
            sys.exit(f"{name}: the tests fail without a mutant: {' '.join(tests)}")
        chosen = mutants(copy, folders)
        every = len(chosen)
        if args.most < every:
            chosen = random.Random(args.seed).sample(chosen, args.most)
        killed = 0
        for mutant in chosen:
            is_killed = run(copy, args.python, mutant, tests, args.limit)
            killed += is_killed
            verdict = "killed" if is_killed else "survived"
            yield {"group": name, "verdict": verdict, **mutant._asdict()}
        yield {"group": name, "mutants": every, "tried": len(chosen), "killed": killed}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "group", nargs="*", help=f"some of {', '.join(GROUPS)} (default: every one)"
    )
    parser.add_argument("--most", type=int, default=100, help="mutants of a group (100)")
    parser.add_argument("--seed", type=int, default=13, help="which of them (13)")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for one mutant (90)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs tests")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmproxy-mutants-") as folder:
        copy = Path(folder) / "copy"
        skipped = shutil.ignore_patterns(
            ".git", ".venv", "build", "*.egg-info", "__pycache__", "node_modules"
        )
        shutil.copytree(args.root, copy, ignore=skipped)
        for line in judged(args, copy):
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
