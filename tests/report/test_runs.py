"""Which runs lie under a path, and what they are called."""

import os
from pathlib import Path

import pytest
from histories import history_of

from pl_layer_rotation.report import runs
from pl_layer_rotation.report.runs import Found, find_runs, read_run, run_names


def saved(*parts: str | Path) -> Path:
    file = Path(*parts, "layer_rotation.jsonl")
    history_of([0.1]).save(file)
    return file


def test_runs_of_a_folder_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    files = [saved(tmp_path, "logs", name) for name in ("b", "a", "c/version_0")]
    assert [found.file for found in find_runs(tmp_path)] == [files[1], files[0], files[2]]


def test_a_file_is_a_run_whatever_its_name(tmp_path: Path) -> None:
    history_of([0.25]).save(tmp_path / "sgd.jsonl")
    (found,) = find_runs(tmp_path / "sgd.jsonl")
    assert read_run(found).history.final() == {"layer0": 0.25}


def test_hidden_folders_links_and_what_lies_too_deep_are_passed_over(tmp_path: Path) -> None:
    inside = saved(tmp_path, "1/2/3/4/5/6/7/8")
    saved(tmp_path, "1/2/3/4/5/6/7/8/9")
    saved(tmp_path, ".cache/run")
    saved(tmp_path, "node_modules/run")
    (tmp_path / "latest").symlink_to(inside.parent, target_is_directory=True)
    assert [found.file for found in find_runs(tmp_path)] == [inside]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "",
            r"^no run in it: neither a layer_rotation\.jsonl nor a run of W&B\. Pass the folder where a training with ",
        ),
        (
            "missing",
            r"^there is no such file or folder\. Pass a history file, a log folder or the folder of an offline",
        ),
    ],
)
def test_where_there_is_nothing_the_error_says_what_to_pass(path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_runs(tmp_path / path)


def test_addresses_are_not_read() -> None:
    message = r"^addresses are not read\. Pass the run's folder on this machine, such as wandb/offline-run-DATE-ID\.$"
    with pytest.raises(ValueError, match=message):
        find_runs("https://wandb.ai/me/project/runs/1")


def test_folder_with_too_much_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "a/b")
    monkeypatch.setattr(runs, "_MOST_ENTRIES", 3)
    assert len(find_runs(tmp_path)) == 1
    (tmp_path / "one more").touch()
    with pytest.raises(ValueError, match=r"^more than 3 files and folders in it\. Pass the log folder itself\.$"):
        find_runs(tmp_path)


def test_reading_that_was_cut_is_told(tmp_path: Path) -> None:
    file = saved(tmp_path)
    with file.open("a") as stream:
        stream.write('{"step":20,"rot')
    (note,) = read_run(Found(file)).notes
    assert note == f"The last reading in {file} was cut while it was written and is left out."


def test_file_that_nests_too_deep_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"^it is damaged: .*\. Pass another copy\.$|has no header of ours"):
        read_run(Found(tmp_path / "run.jsonl"))


@pytest.mark.parametrize(
    ("files", "titles", "names"),
    [
        (["logs/sgd/layer_rotation.jsonl"], [""], ["sgd"]),
        (["logs/version_3/layer_rotation.jsonl"], [""], ["logs/version_3"]),
        (["lr=1/s0/layer_rotation.jsonl", "lr=2/s0/layer_rotation.jsonl"], ["", ""], ["lr=1", "lr=2"]),
        (["a/x/layer_rotation.jsonl", "a/y/z/layer_rotation.jsonl"], ["", ""], ["x", "y/z"]),
        (["sgd.jsonl", "layca.jsonl"], ["", ""], ["sgd", "layca"]),
        (["w/offline-run-1/run-1.wandb", "w/offline-run-2/run-2.wandb"], ["", "two"], ["offline-run-1", "two"]),
        (["a/run-1.wandb", "b/run-2.wandb"], ["run", "run"], ["run (a)", "run (b)"]),
        (["sgd.jsonl", "w/run-1.wandb", "v/run-2.wandb"], ["", "sgd", "sgd (2)"], ["sgd", "sgd (2)", "sgd (2) (2)"]),
    ],
    ids=["one", "one version", "common ends", "depths", "files", "titles", "same title", "title like a path"],
)
def test_names_tell_runs_apart(files: list[str], titles: list[str], names: list[str]) -> None:
    assert run_names([Path(file) for file in files], titles) == names


@pytest.mark.skipif(os.name == "nt", reason="paths are text there")
def test_path_that_is_no_text_gives_a_name_that_can_be_written() -> None:
    files = [Path(os.fsdecode(b"r\xff/layer_rotation.jsonl")), Path("b/layer_rotation.jsonl")]
    assert run_names(files, ["", ""]) == ["r\N{REPLACEMENT CHARACTER}", "b"]
