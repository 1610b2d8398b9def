"""Contract C15: a resumed training records what the uninterrupted one does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import fit, quiet
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from pl_layer_rotation import LayerRotationMonitor, layca_optimizers


def layca(module: nn.Module) -> Any:
    return layca_optimizers(module, lr=0.05, momentum=0.9)


def train(
    folder: Path, epochs: int, keep: dict[str, Any], **fit_options: Any
) -> tuple[LayerRotationMonitor, pl.Trainer]:
    monitor, checkpoint = quiet(), ModelCheckpoint(folder, filename="half", **keep)
    run = trainer(monitor, checkpoint, max_epochs=epochs, default_root_dir=folder, enable_checkpointing=True)
    run.fit(Net(layca), batches(identical=True), batches(), **fit_options)
    return monitor, run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> LayerRotationMonitor:
    return train(tmp_path_factory.mktemp("whole"), 2, {})[0]


def by_hand(run: pl.Trainer, folder: Path) -> str:
    run.save_checkpoint(folder / "by hand.ckpt")
    return str(folder / "by hand.ckpt")


def for_a_cluster(run: pl.Trainer, folder: Path) -> str:
    run.save_checkpoint(run._checkpoint_connector.hpc_save_path(folder))
    return "hpc"


def kept(run: pl.Trainer, folder: Path) -> str:
    return str(folder / "half.ckpt")


# What ModelCheckpoint is asked, after how many epochs the first training ends, and what the second goes on from.
WAYS: dict[str, tuple[dict[str, Any], int, Callable[[pl.Trainer, Path], str]]] = {
    "by hand": ({}, 1, by_hand),
    "hpc": ({}, 1, for_a_cluster),
    "last": ({"save_last": True}, 1, lambda run, folder: "last"),
    "end of an epoch": ({"every_n_epochs": 1}, 1, kept),
    "middle of an epoch": ({"every_n_train_steps": 11}, 2, kept),
    "after a validation": ({"monitor": "val_loss", "save_on_train_epoch_end": False}, 1, kept),
}


@pytest.mark.contract("C2", "C15")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_history_is_the_uninterrupted_one(
    way: str, weights_only: bool, tmp_path: Path, uninterrupted: LayerRotationMonitor
) -> None:
    keep, epochs, find = WAYS[way]
    path = find(train(tmp_path, epochs, keep)[1], tmp_path)
    resumed, _ = train(tmp_path, 2, keep, ckpt_path=path, weights_only=weights_only)
    assert uninterrupted.history.steps == list(range(1, 17))
    assert resumed.history == uninterrupted.history


@pytest.mark.contract("C15")
@pytest.mark.parametrize("every", [3, 4])
def test_the_row_of_the_step_that_saves_is_in_the_checkpoint(every: int, tmp_path: Path) -> None:
    monitor = quiet(every_n_steps=every)
    # Listed first, it still comes after the monitor: Lightning runs checkpoint callbacks last.
    fit(ModelCheckpoint(tmp_path, every_n_train_steps=every, save_top_k=-1), monitor, enable_checkpointing=True)
    for file in tmp_path.glob("*.ckpt"):
        loaded = torch.load(file, weights_only=True)
        saved = [row["step"] for row in loaded["callbacks"][monitor.state_key]["history"]["rows"]]
        assert saved == list(range(every, loaded["global_step"] + 1, every))


class Wider(Net):
    """A checkpoint of `Net` has other shapes for its layers, and a layer less."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6))


@pytest.mark.contract("C15")
def test_a_state_of_other_layers_is_merged_by_name_and_shape(tmp_path: Path) -> None:
    first, second = quiet(), quiet()
    fit(first, module=Wider())
    state = first.state_dict()
    run = trainer(second, max_epochs=2)
    fit().save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["callbacks"][second.state_key] = state
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="the checkpoint holds no weights to measure 'body.0' from: they are measured"):
        run.fit(Net(), batches(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    history = second.history
    assert dict(zip(history.layer_names, history.layer_shapes, strict=True)) == {
        "body.0": (6, 7),
        "head": (3, 6),
        "body.2": (6, 9),
    }
    curves = dict(zip(history.layer_names, history.values("rotation").T, strict=True))
    assert curves["body.2"][:8].gt(0).all()
    assert curves["body.2"][8:].isnan().all()
    assert curves["body.0"][8] < curves["head"][8]
