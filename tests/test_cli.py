"""The command line: what each command writes and prints, and how it fails."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import wandb
from histories import HOSTILE, history_of
from offline_runs import read_offline_run

from pl_layer_rotation import RotationHistory, __version__, cli
from pl_layer_rotation._log_keys import log_keys
from pl_layer_rotation.report import workspace
from pl_layer_rotation.report.wandb_sink import run_config

COMMANDS = ("report", "compare", "show", "workspace")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """The command, started in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments: object) -> Ended:
        with pytest.raises(SystemExit, match=r"^[012]$") as stop:
            cli.main([str(argument) for argument in arguments], prog_name="pl-layer-rotation")
        out, err = capsys.readouterr()
        return Ended(int(str(stop.value)), out, err)

    return start


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an offline run of two layers, called `from W&B`."""
    history = RotationHistory(["conv", "fc"], [(8, 3), (2, 8)])
    folder = tmp_path_factory.mktemp("runs")
    with wandb.init(mode="offline", dir=str(folder), name="from W&B", config=run_config(history)) as run:
        for step in (0, 9):
            run.log(dict(zip(log_keys(["conv", "fc"]), [0.25, 0.5], strict=True)) | {"trainer/global_step": step})
    read_offline_run(run.dir)
    return Path(run.dir).parent


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A log folder with three runs."""
    for name, last, accuracy in (("sgd", 0.1, 0.5), ("adam", 0.3, 0.9), ("layca", 0.6, 0.75)):
        history = history_of([0.0, last], [last, last + 0.2], metrics={"val_acc": accuracy, "speed": 1.0})
        history.save(tmp_path / "logs" / name / "version_0" / "layer_rotation.jsonl")
    return tmp_path / "logs"


def file_of(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "run.jsonl").write_text(text, encoding="utf-8")
        return folder / "run.jsonl"

    return write


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_the_group_says_what_exit_codes_mean(command: str, call: Any) -> None:
    ended = call(command, "--help")
    assert ended.code == 0
    assert f"Examples:\n    pl-layer-rotation {command} " in ended.out
    overview = call("--help").out
    assert f"\n    pl-layer-rotation {command} " in overview
    assert "  1  a run could not be read (the others are used), or nothing could be written\n" in overview


def test_version(call: Any) -> None:
    assert call("--version") == (0, f"pl-layer-rotation {__version__}\n", "")


def test_help_loads_no_library_that_only_reports_need() -> None:
    code = (
        "import sys; from pl_layer_rotation.cli import main; main(['report', '--help'], standalone_mode=False)\n"
        "print({'plotly', 'wandb', 'pl_layer_rotation.report.page', 'pl_layer_rotation.report.runs'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert run.stdout.startswith("Usage: ")
    assert run.stdout.endswith("\nset()\n")


def test_report_of_a_file_a_folder_and_a_wandb_run(call: Any, logs: Path, wandb_run: Path, tmp_path: Path) -> None:
    ended = call("report", logs / "sgd" / "version_0" / "layer_rotation.jsonl", logs / "adam", wandb_run)
    assert ended == (0, "layer_rotation.html\n", "")
    page = (tmp_path / "layer_rotation.html").read_text(encoding="utf-8")
    for part in ("mean rotation 0.200 over 2 layers", "mean rotation 0.400 over 2 layers"):
        assert part in page
    assert "After 10 optimizer steps: mean rotation 0.375 over 2 layers" in page
    assert "from W&amp;B" in page


def test_compare_writes_the_page_where_it_is_told(call: Any, logs: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    assert call("compare", logs, "-o", target) == (0, f"{target}\n", "")
    page = target.read_text(encoding="utf-8")
    assert "<code>layca</code> turned most (mean rotation 0.700), <code>sgd</code> least (0.200)." in page
    assert "Best <code>val_acc</code> at the end (largest of 3): 0.900 in <code>adam</code>." in page


def test_compare_twice_gives_the_same_bytes(call: Any, logs: Path, wandb_run: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        assert call("compare", logs, wandb_run, "--output", name).code == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_compare_takes_a_metric_and_a_mode(call: Any, logs: Path, tmp_path: Path) -> None:
    assert call("compare", logs, "--metric", "val_acc", "--mode", "min").code == 0
    page = (tmp_path / "layer_rotation_comparison.html").read_text(encoding="utf-8")
    assert "(smallest of 3): 0.500 in <code>sgd</code>." in page


def test_show_prints_the_table_and_the_findings(call: Any, logs: Path, wandb_run: Path) -> None:
    ended = call("show", logs / "sgd", wandb_run)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.index("\nsgd/version_0\n") < ended.out.index("0.100") < ended.out.index("\nfrom W&B\n")
    assert ended.out.count("No finding. This does not mean that the run is well tuned.") == 2
    assert "sgd/version_0" not in call("show", logs / "sgd").out


def test_run_that_two_paths_lead_to_counts_once(call: Any, logs: Path) -> None:
    ended = call("compare", logs / "sgd", logs / "sgd" / "version_0")
    assert (ended.code, ended.out) == (2, "")
    assert "Error: RUN must name two runs at least, got one that can be read. See `pl-layer-rotation" in ended.err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: folder,
            "no run in it: neither a layer_rotation.jsonl nor a run of W&B. Pass the folder where ",
        ),
        (lambda folder: folder / "gone", "there is no such file or folder. Pass a history file, a log folder or the "),
        (file_of("{}"), ", but it has no header of ours. Pass the `layer_rotation.jsonl` in the folder of the logs."),
        (
            file_of("\x00\x01"),
            ", but it has no header of ours. Pass the `layer_rotation.jsonl` in the folder of the logs.",
        ),
        (file_of(""), ", but it has no header of ours. Pass the `layer_rotation.jsonl` in the folder of the logs."),
        (
            file_of('{"format":"csv","version":1}\n'),
            ", but its format is 'csv'. Pass the `layer_rotation.jsonl` in the folder of the logs.",
        ),
        (file_of('{"format":"pl-layer-rotation history","version":9}\n'), "got version 9 in"),
        (
            file_of('{"format":"pl-layer-rotation history","version":1,"layers":[{"name":3,"shape":[]}],"facts":{}}\n'),
            ", but it is damaged: a layer's name is no text. Pass the `layer_rotation.jsonl` in the folder of the logs.",
        ),
    ],
    ids=["empty folder", "missing", "other JSON", "bytes", "empty file", "other format", "newer", "names"],
)
def test_what_cannot_be_read_is_named_with_the_mend(make: Any, message: str, call: Any, tmp_path: Path) -> None:
    for command in ("report", "compare", "show"):
        path = make(tmp_path)
        ended = call(command, path)
        assert (ended.code, ended.out) == (1, "")
        first, last = ended.err.splitlines()
        assert first.startswith(f"Error: {path}: ")
        assert message in first
        assert last == "Error: no run could be read."


def test_wandb_runs_that_hold_no_rotation_or_are_no_runs_are_told(call: Any, tmp_path: Path) -> None:
    with wandb.init(mode="offline", dir=str(tmp_path)) as run:
        run.log({"loss": 1.0})
    read_offline_run(run.dir)
    (tmp_path / "run-2.wandb").write_bytes(b"else")
    ended = call("show", tmp_path)
    assert ended.code == 1
    assert ": no layer rotation was logged in this W&B run. Train with `LayerRotationMonitor()`.\n" in ended.err
    assert "run-2.wandb: it is no log of W&B. Pass the folder of an offline run, or a layer_rotation" in ended.err


def test_the_others_are_used_where_some_cannot_be_read(call: Any, logs: Path, tmp_path: Path) -> None:
    broken = logs / "layca" / "version_0" / "layer_rotation.jsonl"
    broken.write_text("{}")
    ended = call("compare", logs)
    assert (ended.code, ended.out) == (1, "layer_rotation_comparison.html\n")
    assert ended.err.startswith(f"Error: {broken}: ")
    assert len(ended.err.splitlines()) == 1
    assert "<title>Layer rotation: 2 runs compared</title>" in Path("layer_rotation_comparison.html").read_text("utf-8")
    assert "got one that can be read" in call("compare", logs / "layca", logs / "sgd").err


def test_reading_that_was_cut_is_a_warning(call: Any, logs: Path) -> None:
    file = logs / "sgd" / "version_0" / "layer_rotation.jsonl"
    with file.open("a") as stream:
        stream.write('{"step":30,"rotation":[0.')
    ended = call("report", logs / "sgd")
    assert (ended.code, ended.out) == (0, "layer_rotation.html\n")
    said = f"The last reading in {file} was cut while it was written and is left out."
    assert ended.err == f"Warning: {file}: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "Missing argument 'RUN...'."),
        (["compare", "logs", "--metric", "f1"], "`metric` must be one that a run has (speed, val_acc), got 'f1'."),
        (["compare", "logs", "--metric", "speed"], "the name 'speed' does not say which is better. Pass it."),
        (["compare", "logs", "--mode", "best"], "'best' is not one of 'min', 'max'."),
        (
            ["workspace", "project"],
            "`ENTITY/PROJECT` must be a W&B user or team and one of its projects, got 'project'.",
        ),
        (["workspace", "a/b/c"], "`ENTITY/PROJECT` must be a W&B user or team and one of its projects, got 'a/b/c'."),
        (["draw"], "No such command 'draw'."),
    ],
)
def test_wrong_usage_is_told_and_ends_with_two(arguments: list[str], message: str, call: Any, logs: Path) -> None:
    ended = call(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_page_never_overwrites_a_run(call: Any, logs: Path) -> None:
    file = logs / "sgd" / "version_0" / "layer_rotation.jsonl"
    before = file.read_bytes()
    ended = call("report", logs, "-o", file)
    assert (ended.code, file.read_bytes()) == (2, before)
    assert f"-o {file} is one of the runs and would be overwritten. Name another file." in ended.err


def test_page_that_cannot_be_written_is_an_error(call: Any, logs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = call("compare", logs, "-o", "file/page.html")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("Error: file/page.html could not be written: ")


def test_names_move_no_cursor(call: Any, tmp_path: Path) -> None:
    for folder in ("a", "b\x1b[2J"):
        history_of([0.5], names=[HOSTILE]).save(tmp_path / folder / "layer_rotation.jsonl")
    (tmp_path / "c\x1b[2J\u202e.jsonl").touch()
    ended = call("show", tmp_path, tmp_path / "c\x1b[2J\u202e.jsonl")
    assert ended.code == 1
    assert not {"\x1b", "\u202e"} & set(ended.out + ended.err)
    assert "c [2J .jsonl: " in ended.err
    assert "\nb [2J\n" in ended.out


def test_console_without_unicode_gets_the_nearest_letters(call: Any, logs: Path, monkeypatch: Any) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert call("show", logs / "sgd").code == 0
    console.flush()
    printed = console.buffer.getvalue().decode("ascii")
    assert "8 x 3" in printed
    assert "?" not in printed


@pytest.mark.parametrize(
    ("terminal", "patience", "shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_bar_shows_on_a_terminal_once_it_takes_long(
    terminal: bool, patience: float, shown: bool, call: Any, logs: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cli, "_PATIENCE", patience)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    ended = call("compare", logs)
    assert (ended.code, ended.out) == (0, "layer_rotation_comparison.html\n")
    assert ("Reading runs" in ended.err) is shown
    assert ("100%" in ended.err) is shown


def test_workspace_is_saved_or_only_printed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dry = call("workspace", "me/rotation", "--dry-run")
    assert (dry.code, dry.out) == (0, workspace.workspace_json("me", "rotation") + "\n")
    assert json.loads(dry.out)["displayName"] == "Layer rotation"
    # Saving needs a server: tests/report/test_workspace.py has one.
    monkeypatch.setattr(workspace, "save_workspace", lambda *given: f"https://wandb.ai/{given}")
    assert call("workspace", "me/rotation") == (0, "https://wandb.ai/('me', 'rotation', 'val_loss', '')\n", "")


def test_workspace_draws_against_the_metric_and_finds_the_keys_of_the_prefix(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--metric", "val/acc", "--prefix", "exp")
    dry = call("workspace", "me/rotation", *options, "--dry-run")
    assert dry == (0, workspace.workspace_json("me", "rotation", metric="val/acc", prefix="exp") + "\n", "")
    assert "Mean rotation and val/acc" in dry.out
    assert "val_loss" not in dry.out
    assert "exp-layer_rotation_stats/mean" in dry.out
    monkeypatch.setattr(workspace, "save_workspace", lambda *given: str(given))
    assert call("workspace", "me/rotation", *options).out == "('me', 'rotation', 'val/acc', 'exp')\n"
    assert "[default: val_loss]" in call("workspace", "--help").out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'wandb_workspaces'", name="wandb_workspaces.workspaces"),
            'the workspace needs wandb-workspaces. Run: pip install "pl-layer-rotation[workspace]"',
        ),
        (ValueError("`WANDB_API_KEY` must be set."), "`WANDB_API_KEY` must be set."),
        (RuntimeError("no API key"), "the workspace could not be made: RuntimeError: no API key"),
    ],
    ids=["extra missing", "refused", "unforeseen"],
)
def test_workspace_that_cannot_be_saved(
    error: Exception, message: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: str) -> str:
        raise error

    monkeypatch.setattr(workspace, "save_workspace", fail)
    assert call("workspace", "me/rotation") == (1, "", f"Error: {message}\n")
