"""Which runs lie under a path, and what each of them recorded."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pl_layer_rotation.history import RotationHistory
from pl_layer_rotation.report.offline_run import read_log, read_title, to_history

HISTORY = "layer_rotation.jsonl"

_DEEPEST = 8  # folders below the one that was named
_MOST_ENTRIES = 200_000  # files and folders that are looked at: a home folder or a data set is no log folder
_VERSION = re.compile(r"version_\d+")  # what Lightning's loggers call a run's folder
_UNFINISHED = "The run did not end: it goes on, or was killed. Shown is what it had logged."
_PASSED_OVER = frozenset({"node_modules", "__pycache__"})


class Found(NamedTuple):
    """A run that was found: the file that holds it, and what it is called where the path does not say."""

    file: Path
    title: str = ""


class RunRead(NamedTuple):
    """A run that was read: its curves, the name it gives itself, and what a reader should be told."""

    history: RotationHistory
    title: str
    notes: list[str]


def find_runs(path: str | os.PathLike[str]) -> list[Found]:
    """The runs under a path, sorted by it: a file itself, of a folder everything within eight levels.

    Looks for ``layer_rotation.jsonl``, which :class:`~pl_layer_rotation.LayerRotationMonitor` writes, and for the logs
    of W&B (``run-….wandb``). Of a run that has both, the first counts: it knows more. Links and hidden folders are
    passed over, so that W&B's ``latest-run`` does not count twice.

    Args:
        path: a history file, a log folder, the folder of an offline W&B run, or its log.

    Raises:
        ValueError: If there is nothing, no run under it, or too much to look through.

    Example::

        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     RotationHistory(["fc"]).save(pathlib.Path(folder, "version_0", "layer_rotation.jsonl"))
        ...     [found.file.parent.name for found in find_runs(folder)]
        ['version_0']

    """
    start = Path(path)
    if start.is_file():
        return [Found(start)]
    if not start.is_dir():
        raise ValueError(_nothing_there(str(path)))
    if start.name == "files" and any(start.absolute().parent.glob("run-*.wandb")):
        start = start.absolute().parent  # what `wandb.run.dir` names
    files = _files_of_runs(start)
    if not files:
        raise ValueError(
            f"no run in it: neither a {HISTORY} nor a run of W&B. Pass the folder where a training with "
            "`LayerRotationMonitor()` wrote its logs."
        )
    histories = {file.parent.name: file for file in files if file.name == HISTORY}
    titles: dict[Path, str] = {}
    for log in [file for file in files if file.name != HISTORY]:
        # Lightning's `WandbLogger` calls the folder that its callbacks write to by the run's id.
        same = histories.get(log.stem.removeprefix("run-"))
        if same is not None:
            files.remove(log)
            titles[same] = _title_or_nothing(log)
    return [Found(file, titles.get(file, "")) for file in files]


def read_run(found: Found) -> RunRead:
    """Read one run.

    Args:
        found: what :func:`find_runs` gave.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is none of ours, damaged, or of a newer version of the package; says what to do.

    """
    try:
        if found.file.suffix == ".wandb":
            run = read_log(found.file)
            notes = [] if run.finished else [_UNFINISHED]
            return RunRead(to_history(run), run.title, notes)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = RotationHistory.load(found.file)
        return RunRead(history, found.title, [str(warning.message) for warning in caught])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is damaged: {error}. Pass another copy.") from error


def run_names(files: Sequence[Path], titles: Sequence[str]) -> list[str]:
    """A name for each run, all different: its title, or the part of its path that tells it from the others.

    Args:
        files: the file of each run.
        titles: the name that each gives itself; empty where it has none.

    Example::

        >>> files = [Path("logs/lr=0.1/layer_rotation.jsonl"), Path("logs/lr=0.2/layer_rotation.jsonl")]
        >>> run_names(files, ["", ""])
        ['lr=0.1', 'lr=0.2']
        >>> run_names(files, ["same", "same"])
        ['same (lr=0.1)', 'same (lr=0.2)']

    """
    names = list(titles)
    for title in dict.fromkeys(titles):
        same = [i for i, other in enumerate(titles) if other == title]
        for i, path in zip(same, _telling_parts([_own_path(files[i]) for i in same]), strict=True):
            names[i] = f"{title} ({path})" if title and len(same) > 1 else title or path
    return _unique(names)


def _nothing_there(path: str) -> str:
    if "://" in path:
        return "addresses are not read. Pass the run's folder on this machine, such as wandb/offline-run-DATE-ID."
    return "there is no such file or folder. Pass a history file, a log folder or the folder of an offline W&B run."


def _files_of_runs(start: Path) -> list[Path]:
    found, seen = [], 0
    for folder, folders, files in os.walk(start):
        seen += len(folders) + len(files)
        if seen > _MOST_ENTRIES:
            raise ValueError(f"more than {_MOST_ENTRIES:,} files and folders in it. Pass the log folder itself.")
        deep = len(Path(folder).relative_to(start).parts) >= _DEEPEST
        folders[:] = [] if deep else sorted(n for n in folders if not n.startswith(".") and n not in _PASSED_OVER)
        ours = [name for name in files if name == HISTORY or (name.startswith("run-") and name.endswith(".wandb"))]
        found += [Path(folder, name) for name in sorted(ours)]
    return found


def _title_or_nothing(log: Path) -> str:
    try:
        return read_title(log)
    except (OSError, ValueError):
        return ""  # the history beside it is whole, and has a folder to be called by


def _own_path(file: Path) -> tuple[str, ...]:
    """The parts of a path that can name a run: without the names that every run's file has."""
    path = file.absolute()
    return path.parent.parts if path.name == HISTORY or path.suffix == ".wandb" else path.with_suffix("").parts


def _telling_parts(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Paths without what all of them begin and end with; of a single one the last part that says something."""
    if len(paths) == 1:
        (path,) = paths
        return [_as_text(path[-2:] if _VERSION.fullmatch(path[-1]) else path[-1:])]
    shortest = min(map(len, paths)) - 1
    start = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest)
    end = next((i for i in range(shortest - start) if len({path[-1 - i] for path in paths}) > 1), shortest - start)
    return [_as_text(path[start : len(path) - end] or path[-1:]) for path in paths]


def _unique(names: Sequence[str]) -> list[str]:
    """Names with a number where one is taken: a title can be another run's path."""
    taken: list[str] = []
    for name in names:
        free, number = name, 1
        while free in taken:
            number += 1
            free = f"{name} ({number})"
        taken.append(free)
    return taken


def _as_text(path: Sequence[str]) -> str:
    # A path that is no text could not be written into a page.
    return os.fsencode("/".join(path)).decode("utf-8", "replace")
