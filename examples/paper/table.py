"""A study's results beside the paper's, as a table in Markdown."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from published import Published, published
from results import StudyFolder
from studies import settings_of

_HEAD = ("task", "setting", "seeds", "test % here", "paper", "cosine distance here", "paper", "where in the paper")


def print_table(study: str, folders: Sequence[StudyFolder]) -> None:
    """Print the rows, and under them how long the trainings were."""
    rows, lengths = [], []
    for folder in folders:
        results = list(folder.read())
        lengths += [_length(result) for result in results[:1]]
        for setting in settings_of(study, folder.task):
            found = [result for result in results if result["setting"] == setting.name]
            rows.append(table_row(study, folder.task, setting.name, found))
    widths = [max(len(row[column]) for row in (*rows, _HEAD)) for column in range(len(_HEAD))]
    for row in (_HEAD, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print("\n" + "\n".join(lengths))


def table_row(study: str, task: str, setting: str, results: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """One setting's cells; a dash where it has not been run, or the paper gives no number."""
    paper = published(study, task, setting)
    which = paper.which if paper else "range"
    return (
        task,
        setting,
        str(len(results)),
        with_spread([result["test_acc"] for result in results], 2),
        f"{paper.test:.2f}" if paper else "-",
        _distances([distances(result, which) for result in results], which),
        _paper_distances(paper),
        paper.source if paper else "-",
    )


def distances(result: dict[str, Any], which: str) -> list[float]:
    """Cosine distances of a result: the ones that the paper gives, see :class:`~published.Published`."""
    rotation, whole = result["rotation"], result["recipe"]["schedule"]["epochs"]
    if which == "range":
        # A shortened training is read after the same share of it.
        at = min(rotation["epochs"], key=lambda epoch: abs(epoch * whole - 80 * result["plan"]["epochs"]))
        row = rotation["values"][rotation["epochs"].index(at)]
        defined = [value for value in row if value is not None]
        return [min(defined), max(defined)] if defined else []
    last = [value for value in rotation["values"][-1] if value is not None]
    return last[:1] if which == "first" else last


def with_spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the sample's standard deviation where there are several."""
    if not values:
        return "-"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _distances(rows: Sequence[Sequence[float]], which: str) -> str:
    rows = [row for row in rows if row]
    if not rows:
        return "-"
    return _joined([with_spread(column, 2 if which == "range" else 3) for column in zip(*rows, strict=True)], which)


def _paper_distances(paper: Published | None) -> str:
    if paper is None or not paper.distances:
        return "-"
    return _joined(
        [f"{value:.2f}" if paper.which != "all" else f"{value:.3f}" for value in paper.distances], paper.which
    )


def _joined(cells: Sequence[str], which: str) -> str:
    if which == "range":
        return f"{cells[0]} to {cells[1]} over layers"
    return f"{cells[0]} first layer" if which == "first" else ", ".join(cells)


def _length(result: dict[str, Any]) -> str:
    plan = result["plan"]
    length = "the paper's length" if plan["scale"] == 1 else f"shortened to {plan['scale']:g} of the paper's work"
    return (
        f"{result['task']}: {length}, {plan['epochs']} epochs of {plan['train_images']} images in batches of "
        f"{plan['batch_size']}, {plan['test_images']} test images; {result['data']}; {result['machine']}"
    )
