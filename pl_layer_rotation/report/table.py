"""The table of layers, and what the curves say, that end a training in the terminal."""

from collections.abc import Sequence

from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.findings import finding_lines
from pl_layer_rotation.report.text import printable, shape_text, three_digits

_MOST_ROWS = 60  # layers that are shown; a longer table keeps its first and last
_COLUMNS = ("depth", "layer", "shape", "rotation", "norm ratio", "last update (rad)")


def table_rows(history: RotationHistory) -> list[tuple[str, ...]]:
    """One row a layer in depth order: depth, name, shape, rotation, norm ratio and last angular update.

    Args:
        history: the recorded curves.

    Returns:
        Rows of texts; ``-`` where a value is undefined or was not measured.

    Example::

        >>> history = RotationHistory(["conv", "fc"], [(8, 1, 3, 3), (10, 8)])
        >>> history.append(1, rotation=[0.25, 0.5], norm_ratio=[1.0, 1.1])
        >>> table_rows(history)[1]
        ('1', 'fc', '10 × 8', '0.500', '1.10', '-')

    """
    values = [history.final(quantity) for quantity in ("rotation", "norm_ratio", "angular_update")]
    return [
        (str(depth), printable(name), shape_text(shape, "-"), *(three_digits(value[name]) for value in values))
        for depth, (name, shape) in enumerate(zip(history.layer_names, history.layer_shapes, strict=True))
    ]


def print_table(history: RotationHistory) -> None:
    """Print the table and what the curves say: with rich where it is installed, as aligned text elsewhere."""
    rows, findings = table_rows(history), finding_lines(history)
    hidden = len(rows) - _MOST_ROWS
    if hidden > 0:
        half = _MOST_ROWS // 2
        middle = ("", f"… {hidden} more layers", "", "", "", "")
        rows = [*rows[:half], middle, *rows[-half:]]
    title = f"Layer rotation after {history.steps[-1]} steps" if history.steps else "Layer rotation: no reading"
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(title, rows, findings)
        return
    table = Table(title=title)
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if i in (1, 2) else "right", overflow="fold")
    for row in rows:
        # As Text, so that rich does not take a layer called "[red]" for markup.
        table.add_row(*map(Text, row))
    console = Console()
    try:
        console.print(table)
    except UnicodeEncodeError:
        _print_plain(title, rows, findings)
        return
    for line in findings:
        console.print(Text(line))


def _print_plain(title: str, rows: Sequence[Sequence[str]], findings: Sequence[str]) -> None:
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [_COLUMNS, *rows]]
    text = "\n".join([title, *(line.rstrip() for line in lines), *findings])
    try:
        print(text)
    except UnicodeEncodeError:
        # A Windows console in a legacy code page has neither the multiplication sign nor every layer's name.
        print(text.replace("×", "x").replace("…", "...").encode("ascii", "replace").decode("ascii"))
