"""A file from a stranger executes nothing, whichever door it comes in by (see SECURITY.md)."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer

from pl_layer_rotation import LayerRotationMonitor, RotationHistory
from pl_layer_rotation._sidecar import read_sidecar, write_sidecar
from pl_layer_rotation.cli import main
from pl_layer_rotation.report.offline_run import read_log


class Payload:
    """Leaves a file behind when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture(params=["pickle", "checkpoint"])
def hostile(request: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A hostile file, and the file that would be there if it had its way."""
    file, mark = tmp_path / "file.ckpt", tmp_path / "mark"
    if request.param == "pickle":
        file.write_bytes(pickle.dumps(Payload(mark), protocol=2))  # what torch writes
    else:
        torch.save({"state_dict": {"head.weight": Payload(mark)}}, file)
    return file, mark


def test_the_payload_works_where_a_file_is_trusted(hostile: tuple[Path, Path]) -> None:
    file, mark = hostile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(file, weights_only=False) if file.read_bytes()[:2] == b"PK" else pickle.loads(file.read_bytes())
    assert mark.exists()


def test_a_history_is_read_as_json(hostile: tuple[Path, Path]) -> None:
    file, mark = hostile
    with pytest.raises(ValueError, match="it has no header of ours"):
        RotationHistory.load(file)
    assert not mark.exists()


def test_a_log_of_wandb_is_read_as_records(hostile: tuple[Path, Path]) -> None:
    file, mark = hostile
    with pytest.raises(ValueError, match="it is no log of W&B"):
        read_log(file)
    assert not mark.exists()


def test_the_command_line_refuses_the_file(hostile: tuple[Path, Path]) -> None:
    file, mark = hostile
    assert CliRunner().invoke(main, ["show", str(file)]).exit_code != 0
    assert not mark.exists()


def test_a_reference_is_read_as_weights_only(hostile: tuple[Path, Path]) -> None:
    file, mark = hostile
    with pytest.raises(MisconfigurationException, match=r"`reference` must be the path of weights .*UnpicklingError"):
        trainer(LayerRotationMonitor(reference=file, report=False), max_epochs=1).fit(Net(), batches())
    assert not mark.exists()


@pytest.mark.parametrize("payload", ["a function", "a class of torch", "a module's part"])
def test_the_index_of_a_folder_of_references_holds_tensors_only(payload: str, tmp_path: Path) -> None:
    weights = {"fc": torch.randn(3, 4), "half": torch.randn(3, 4).bfloat16()}
    write_sidecar(tmp_path, weights, weights, first=True)
    read = read_sidecar(tmp_path, weights)
    assert all(torch.equal(read[name], weight) for name, weight in weights.items())
    hostile = {
        "a function": Payload(tmp_path / "mark"),
        "a class of torch": torch.nn.Linear,
        "a module's part": Path.touch,
    }
    (tmp_path / ".metadata").write_bytes(pickle.dumps(hostile[payload], protocol=4))
    with pytest.raises(pickle.UnpicklingError, match=r"its index holds .*, which is no description of a tensor"):
        read_sidecar(tmp_path, weights)
    assert not (tmp_path / "mark").exists()
