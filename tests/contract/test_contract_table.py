"""docs/contract.md says which tests show which promise, and says it truly."""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from contract.table import DOCUMENT, marked_tests, rewritten, table

# How many items each section has: optimizer, configuration in Lightning, metric, monitor. A section counts as whole
# from the moment a test shows its first item; before, a part of it may stand here.
SECTIONS = {"O": 42, "H": 17, "M": 21, "C": 31}


@functools.cache
def markers() -> dict[str, list[str]]:
    return marked_tests()


@functools.cache
def rows() -> dict[str, list[str]]:
    return table(DOCUMENT.read_text(encoding="utf-8"))


def expected(marked: Iterable[str]) -> list[str]:
    """The items that the document must have, in order."""
    marked = set(marked)
    sections = {letter: [f"{letter}{number}" for number in range(1, n + 1)] for letter, n in SECTIONS.items()}
    return [item for items in sections.values() for item in items if items[0] in marked or item in marked]


def test_every_item_of_the_contract_has_one_row() -> None:
    items = expected(markers())
    assert list(rows()) == items
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines if re.match(r"\| [A-Z]\d", line)] == items


@pytest.mark.parametrize("item", sorted({*expected(markers()), *rows()}))
def test_a_row_names_the_tests_that_carry_its_marker(item: str) -> None:
    tests = markers().get(item)
    assert tests, f"no test is marked with {item}"
    assert rows().get(item) == tests, "run `python tests/contract/table.py`"


def test_no_marker_names_an_item_without_a_row() -> None:
    assert set(markers()) <= set(expected(markers()))


def test_a_section_is_whole_once_its_first_item_is_marked() -> None:
    assert expected(["C31", "H2", "C7"]) == ["H2", "C7", "C31"]
    assert expected(["M1"]) == [f"M{number}" for number in range(1, 22)]


EXAMPLE = """\
import pytest

@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.contract("O1", "O2")
def test_first(value): ...

class TestMore:
    @pytest.mark.contract("O2")
    def test_second(self): ...

@pytest.mark.contract("O3")
def helper(): ...
"""


def write(folder: Path, source: str) -> None:
    (folder / "tests" / "deep").mkdir(parents=True, exist_ok=True)
    (folder / "tests" / "deep" / "test_it.py").write_text(source, encoding="utf-8")


def test_markers_are_read_from_the_source(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLE.replace("def helper", "def test_third"))
    file = "tests/deep/test_it.py"
    assert marked_tests(tmp_path) == {
        "O1": [f"{file}::test_first"],
        "O2": [f"{file}::test_first", f"{file}::test_second"],
        "O3": [f"{file}::test_third"],
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (EXAMPLE, r"tests/deep/test_it\.py:11: the contract marker must decorate a test function\."),
        ("pytestmark = pytest.mark.contract('O1')", r"test_it\.py:1: the contract marker must decorate a test"),
        (
            "@pytest.mark.contract(ITEM)\ndef test_it(): ...",
            r'test_it\.py:1: the contract marker must name items such as "O1"\.',
        ),
        ("@pytest.mark.contract()\ndef test_it(): ...", r"test_it\.py:1: the contract marker must name items"),
        ("@pytest.mark.contract('1')\ndef test_it(): ...", r"test_it\.py:1: the contract marker must name items"),
    ],
)
def test_markers_that_say_nothing_are_errors(tmp_path: Path, source: str, message: str) -> None:
    write(tmp_path, source)
    with pytest.raises(ValueError, match=message):
        marked_tests(tmp_path)


def test_rewriting_changes_nothing_but_the_names() -> None:
    text = "# Title\n\n| item | promise | tests |\n|---|---|---|\n| O1 | one | `tests/a.py::test_old` |\n| O2 | two | *none* |\n"
    marked = {"O1": ["tests/a.py::test_new", "tests/b.py::test_new"]}
    new = rewritten(text, marked)
    assert new == text.replace("`tests/a.py::test_old`", "`tests/a.py::test_new`<br>`tests/b.py::test_new`")
    assert table(new) == {"O1": marked["O1"], "O2": []}
    assert rewritten(new, marked) == new
