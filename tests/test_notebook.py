"""The tour is a valid notebook without outputs, and shows what its text says when it is run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def code_cells(notebook: Any) -> Iterator[Any]:
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def test_the_tour_is_valid_small_and_stripped() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    assert TOUR.stat().st_size < 20_000
    assert [cell.source for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None] == []
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each cell shows, by its last line."""
    from nbclient import NotebookClient

    notebook = nbformat.read(TOUR, as_version=4)
    folder = tmp_path_factory.mktemp("tour")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert list(folder.iterdir()) == []  # a tour leaves nothing behind
    return {
        cell.source.splitlines()[-1]: "".join(
            output.get("text", "") + "".join(map(str, output.get("data", {}).values())) for output in cell.outputs
        )
        for cell in code_cells(notebook)
    }


def accuracy(text: str) -> float:
    return float(text.split("validation accuracy: ")[1].split("%")[0])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_tour_shows_what_its_text_says(shown: dict[str, str]) -> None:
    assert "times higher" in shown["slow"].split("the best learning rate is probably about", 1)[1]
    assert "No finding." in shown["better"]
    assert accuracy(shown["better"]) > 95 > 80 > accuracy(shown["slow = fit(Net(lr=1e-5))"])
    assert "requested" in shown['turned.figure("angular_update")']
