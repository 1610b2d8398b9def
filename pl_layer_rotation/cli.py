"""The command ``pl-layer-rotation``: pages, tables and the W&B workspace of runs that lie on this machine."""

import codecs
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from pl_layer_rotation import __version__
from pl_layer_rotation.report.text import printable

# What is heavy is imported where it is used, so that help and errors of usage need not wait for it.
if TYPE_CHECKING:
    from pl_layer_rotation.history import RotationHistory

_Item = TypeVar("_Item")
_Command = TypeVar("_Command", bound=Callable[..., Any])

_PATIENCE = 1.0  # seconds before a progress bar appears
_ASCII = {"×": "x", "…": "...", "–": "-", "ρ": "rho", "“": '"', "”": '"'}  # noqa: RUF001

_EXIT_CODES = """\b
Exit codes:
  0  all went well
  1  a run could not be read (the others are used), or nothing could be written
  2  wrong usage"""
_RUN = """\b
RUN is one of
  .../layer_rotation.jsonl  a history that LayerRotationMonitor wrote
  a log folder              every run within eight levels below it
  wandb/offline-run-...     a run that W&B keeps on this machine;
                            runs on a server are not read"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """See how far the weights of each layer turned in your runs.

    \b
    Examples:
      pl-layer-rotation show lightning_logs/version_0
      pl-layer-rotation report lightning_logs/version_0 -o rotation.html
      pl-layer-rotation compare lightning_logs
      pl-layer-rotation workspace my-team/my-project --dry-run
    """  # noqa: D301
    for stream in (sys.stdout, sys.stderr):
        _replace_what_a_terminal_lacks(stream)


def _with_runs(command: _Command) -> _Command:
    return click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))(command)


def _with_output(default: str) -> Callable[[_Command], _Command]:
    return click.option(
        "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=default, show_default=True,
        help="The page; it appears whole or not at all.",
    )  # fmt: skip


@main.command(epilog=f"{_RUN}\n\n{_EXIT_CODES}")
@_with_runs
@_with_output("layer_rotation.html")
def report(runs: Sequence[Path], output: Path) -> None:
    """Write one HTML page with the curves, findings and layers of each RUN.

    \b
    Examples:
      pl-layer-rotation report lightning_logs/version_0
      pl-layer-rotation report sgd.jsonl layca.jsonl -o both.html
      pl-layer-rotation report wandb/latest-run
    """  # noqa: D301
    histories, failed = _read(runs, output)
    from pl_layer_rotation.report.page import write_page

    _write(output, lambda: write_page(output, histories))
    sys.exit(int(failed))


@main.command(epilog=f"{_RUN}\n\n{_EXIT_CODES}")
@_with_runs
@_with_output("layer_rotation_comparison.html")
@click.option("--metric", metavar="NAME", help="Judge runs by this metric; by default by one that most of them have.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="What is better; by default read from the name.")
def compare(runs: Sequence[Path], output: Path, metric: str | None, mode: Literal["min", "max"] | None) -> None:
    """Lay 2 to 200 runs over each other on one HTML page.

    Curves, rotation by layer, rotation and straightness against the metric that the runs are judged by (with Spearman's
    rank correlation), and the settings that differ. The metric is one of those that the run had logged at its end; a
    name with a word such as acc, f1 or auc counts as better when larger, one with loss or err when smaller.

    \b
    Examples:
      pl-layer-rotation compare lightning_logs
      pl-layer-rotation compare sgd.jsonl layca.jsonl -o both.html
      pl-layer-rotation compare sweep --metric val_bleu --mode max
    """  # noqa: D301
    histories, failed = _read(runs, output)
    if len(histories) < 2:
        problem = "RUN must name two runs at least, got one that can be read. See `pl-layer-rotation report`."
        raise click.ClickException(problem) if failed else click.UsageError(problem)
    from pl_layer_rotation.report.compare import write_comparison
    from pl_layer_rotation.report.comparison import judged_by

    try:
        metric, mode = judged_by(histories, metric, mode)
    except ValueError as error:
        raise click.UsageError(printable(str(error))) from error
    _write(output, lambda: write_comparison(output, histories, metric, mode))
    sys.exit(int(failed))


@main.command(epilog=f"{_RUN}\n\n{_EXIT_CODES}")
@_with_runs
def show(runs: Sequence[Path]) -> None:
    """Print the layers of each RUN, and what its curves say.

    \b
    Examples:
      pl-layer-rotation show lightning_logs/version_0
      pl-layer-rotation show wandb/latest-run
    """  # noqa: D301
    histories, failed = _read(runs)
    from pl_layer_rotation.report.table import print_table

    for name, history in histories.items():
        if len(histories) > 1:
            click.echo(f"\n{printable(name)}")
        print_table(history)
    sys.exit(int(failed))


@main.command()
@click.argument("project", metavar="ENTITY/PROJECT")
@click.option(
    "--metric", metavar="KEY", default="val_loss", show_default=True,
    help="Logged key of the metric that runs are judged by; rotation and straightness are drawn against it.",
)  # fmt: skip
@click.option("--prefix", metavar="TEXT", default="", help="The prefix of the runs' WandbLogger, where it has one.")
@click.option("--dry-run", is_flag=True, help="Print the workspace as JSON and send nothing; needs no account.")
def workspace(project: str, metric: str, prefix: str, dry_run: bool) -> None:
    """Save a workspace for layer rotation in a project on W&B, and print its address.

    Needs the extra: pip install "pl-layer-rotation[workspace]"

    \b
    Examples:
      pl-layer-rotation workspace my-team/my-project
      pl-layer-rotation workspace my-team/my-project --metric val_acc
      pl-layer-rotation workspace my-team/my-project --dry-run
    """  # noqa: D301
    from pl_layer_rotation.report.workspace import entity_and_project, save_workspace, workspace_json

    try:
        entity, name = entity_and_project(project)
    except ValueError as error:
        raise click.UsageError(printable(str(error))) from error
    try:
        made = (workspace_json if dry_run else save_workspace)(entity, name, metric, prefix)
    except ModuleNotFoundError as error:
        mend = 'Run: pip install "pl-layer-rotation[workspace]"'
        raise click.ClickException(f"the workspace needs wandb-workspaces. {mend}") from error
    except ValueError as error:
        raise click.ClickException(printable(str(error))) from error
    except Exception as error:
        problem = f"{type(error).__name__}: {printable(str(error))}"
        raise click.ClickException(f"the workspace could not be made: {problem}") from error
    click.echo(made)


def _read(paths: Sequence[Path], output: Path | None = None) -> tuple[dict[str, "RotationHistory"], bool]:
    """The runs under the paths by name, and whether any could not be read."""
    from pl_layer_rotation.report.runs import Found, RunRead, find_runs, read_run, run_names

    failed = False
    found: dict[Path, Found] = {}  # each file once, however many paths lead to it
    for path in paths:
        try:
            for run in find_runs(path):
                found.setdefault(run.file.resolve(), run)
        except (OSError, ValueError) as error:
            failed = _say("Error", path, error)
    if output is not None and output.resolve() in found:
        raise click.UsageError(f"-o {output} is one of the runs and would be overwritten. Name another file.")
    read: list[tuple[Path, RunRead]] = []
    for run in _with_progress(list(found.values()), "Reading runs"):
        try:
            read.append((run.file, read_run(run)))
        except (OSError, ValueError) as error:
            failed = _say("Error", run.file, error)
    if not read:
        raise click.ClickException("no run could be read.")
    for file, known in read:
        for note in known.notes:
            _say("Warning", file, note)
    names = run_names([file for file, _ in read], [known.title for _, known in read])
    return {name: known.history for name, (_, known) in zip(names, read, strict=True)}, failed


def _write(output: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except (OSError, UnicodeEncodeError) as error:
        raise click.ClickException(f"{output} could not be written: {printable(str(error))}") from error
    click.echo(output)


def _say(kind: str, path: Path, what: object) -> bool:
    """Tell of a problem with a run on stderr; true, for that there was one."""
    click.echo(f"{kind}: {printable(f'{path}: {what}')}", err=True)
    return True


def _with_progress(items: Sequence[_Item], label: str) -> Iterator[_Item]:
    """The items; on a terminal with a progress bar, once they have taken a second."""
    start, rest, done = time.monotonic(), iter(items), 0
    for item in rest:
        yield item
        done += 1
        if sys.stderr.isatty() and time.monotonic() - start > _PATIENCE:
            break
    if done == len(items):
        return
    with click.progressbar(rest, length=len(items), label=label, file=sys.stderr) as bar:
        bar.update(done)
        yield from bar


def _replace_what_a_terminal_lacks(stream: object) -> None:
    """An old console's code page, or a pipe in the C locale, must not end in an error."""
    codecs.register_error("pl_layer_rotation", _nearest)
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="pl_layer_rotation")


def _nearest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end
