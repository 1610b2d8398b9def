"""Which tests show which item of the contract; run as a program it writes their names into docs/contract.md."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "contract.md"

_ROW = re.compile(r"^\| (?P<item>[A-Z]\d+) \| (?P<promise>[^|]+) \| (?P<tests>[^|]*) \|$", re.MULTILINE)
_NAME = re.compile(r"`(tests/[^`]+::test_\w+)`")


def marked_tests(root: Path = ROOT) -> dict[str, list[str]]:
    """Item of the contract → tests that carry its marker, by file and line.

    Raises:
        ValueError: If a marker names no item, names one by an expression, or decorates no test.

    """
    found: dict[str, list[str]] = {}
    for file in sorted(root.glob("tests/**/test_*.py")):
        where = file.relative_to(root).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        markers = {node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_marker(node)}
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or not function.name.startswith("test_"):
                continue
            for marker in markers.intersection(function.decorator_list):
                markers.remove(marker)
                for item in _items(marker, where):
                    found.setdefault(item, []).append(f"{where}::{function.name}")
        for marker in markers:
            raise ValueError(f"{where}:{marker.lineno}: the contract marker must decorate a test function.")
    return found


def table(text: str) -> dict[str, list[str]]:
    """Item → tests that its row of the document names."""
    return {row["item"]: _NAME.findall(row["tests"]) for row in _ROW.finditer(text)}


def rewritten(text: str, marked: Mapping[str, list[str]]) -> str:
    """The document with the column of test names as the markers have it."""

    def row(match: re.Match[str]) -> str:
        tests = "<br>".join(f"`{name}`" for name in marked.get(match["item"], []))
        return f"| {match['item']} | {match['promise']} | {tests or '*none*'} |"

    return _ROW.sub(row, text)


def _is_marker(node: ast.Call) -> bool:
    return ast.unparse(node.func).endswith("mark.contract")


def _items(marker: ast.Call, where: str) -> list[str]:
    items = [argument.value for argument in marker.args if isinstance(argument, ast.Constant)]
    if not items or len(items) != len(marker.args) or not all(re.fullmatch(r"[A-Z]\d+", str(item)) for item in items):
        raise ValueError(f'{where}:{marker.lineno}: the contract marker must name items such as "O1".')
    return items


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8"), marked_tests()), encoding="utf-8")
