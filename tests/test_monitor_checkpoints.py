"""Checkpoints, second trainings and copies: where the monitor goes on, starts anew, and what its state holds."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import fit
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from traces import SavedWeights, by_hand

from pl_layer_rotation import LayerRotationMonitor


@pytest.mark.contract("C15")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("interrupted_after", [8, 11], ids=["end of an epoch", "middle of an epoch"])
def test_resumed_history_equals_the_uninterrupted_one(
    tmp_path: Path, interrupted_after: int, weights_only: bool
) -> None:
    data = batches(identical=True)
    whole = LayerRotationMonitor(every_n_steps=2, report=False)
    keep = [
        ModelCheckpoint(tmp_path / run, every_n_train_steps=interrupted_after, save_top_k=-1, filename="half")
        for run in "ab"
    ]
    fit(whole, keep[0], data=data, max_epochs=2, enable_checkpointing=True)
    resumed = LayerRotationMonitor(every_n_steps=2, report=False)
    run = trainer(resumed, keep[1], max_epochs=2, enable_checkpointing=True)
    run.fit(Net(), data, ckpt_path=tmp_path / "a" / "half.ckpt", weights_only=weights_only)
    assert len(whole.history) == 8
    assert resumed.history == whole.history


@pytest.mark.contract("C15")
def test_a_resumed_run_may_read_at_another_cadence(tmp_path: Path) -> None:
    fit(LayerRotationMonitor(every_n_steps=4, report=False)).save_checkpoint(tmp_path / "a.ckpt")
    monitor = LayerRotationMonitor(every_n_steps=2, report=False)
    trainer(monitor, max_epochs=2).fit(Net(), batches(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert monitor.history.steps == [4, 8, 10, 12, 14, 16]


@pytest.mark.contract("C15")
def test_without_a_saved_reference_a_resumed_run_measures_from_where_it_resumes(tmp_path: Path) -> None:
    run = fit(LayerRotationMonitor(save_reference=False, report=False))
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=False)["callbacks"] != {}
    monitor = LayerRotationMonitor(save_reference=False, report=False)
    resumed = trainer(monitor, max_epochs=2)
    with pytest.warns(UserWarning, match=r"no weights to measure 'body.0', 'head' from: they are measured from now on"):
        resumed.fit(Net(), batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert (monitor.history.values("rotation")[8] < monitor.history.values("rotation")[7]).all()


@pytest.mark.contract("C15")
def test_a_checkpoint_without_our_state_warns_and_measures_from_now(tmp_path: Path) -> None:
    fit().save_checkpoint(tmp_path / "plain.ckpt")
    monitor = LayerRotationMonitor(report=False)
    with pytest.warns(UserWarning, match="the checkpoint holds no layer rotation: curves start where training resumes"):
        trainer(monitor, max_epochs=2).fit(Net(), batches(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    assert monitor.history.steps == list(range(9, 17))


@pytest.mark.parametrize("carried", ["nothing", "no weights"])
def test_sums_start_with_the_weights_that_a_resumed_training_measures_from(carried: str, tmp_path: Path) -> None:
    first = [LayerRotationMonitor(report=False, save_reference=False)] if carried == "no weights" else []
    fit(*first, data=batches(identical=True)).save_checkpoint(tmp_path / "half.ckpt")
    monitor, saved = LayerRotationMonitor(report=False), SavedWeights()
    run = trainer(monitor, saved, max_epochs=2)
    with pytest.warns(UserWarning, match="the checkpoint holds no"):
        run.fit(Net(), batches(identical=True), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    path = by_hand(saved.snapshots)["angular_update"].sum(0)
    np.testing.assert_allclose(monitor.history.values("path")[-1].numpy(), path, rtol=1e-5)


@pytest.mark.contract("C14")
def test_a_second_fit_goes_on_and_a_new_model_starts_anew() -> None:
    monitor, module = LayerRotationMonitor(report=False), Net()
    run = fit(monitor, module=module)
    run.fit_loop.max_epochs = 2
    run.fit(module, batches())
    assert monitor.history.steps == list(range(1, 17))
    fit(monitor)
    assert monitor.history.steps == list(range(1, 9))


@pytest.mark.contract("C14")
def test_another_model_in_the_same_trainer_is_measured_from_its_own_weights() -> None:
    monitor = LayerRotationMonitor(report=False)
    run = fit(monitor)
    other = Net(lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
    nn.init.normal_(other.head.weight)
    run.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="curves start where training resumes"):
        run.fit(other, batches())
    assert set(monitor.history.final().values()) == {0.0}


@pytest.mark.contract("C14")
def test_fitting_again_after_an_interrupt_goes_on() -> None:
    class InterruptsOnce(pl.Callback):
        done = False

        def on_validation_start(self, *args: Any) -> None:
            if not self.done and not args[0].sanity_checking:
                self.done = True
                raise KeyboardInterrupt

    monitor, saved, module = LayerRotationMonitor(report=False), SavedWeights(), Net()
    run = trainer(monitor, saved, InterruptsOnce(), max_epochs=2, val_check_interval=3)
    with pytest.raises(SystemExit, match="1"):
        run.fit(module, batches(), batches())
    run.fit(module, batches(), batches())
    assert run.state.finished
    # Interrupted after its third step, Lightning gives that number to the fourth one too.
    assert monitor.history.steps == list(range(1, 19))
    start, first, second, _, _, *others = saved.snapshots
    expected = by_hand([start, first, second, *others])["rotation"]
    np.testing.assert_allclose(monitor.history.values("rotation").numpy(), expected, rtol=1e-4)


@pytest.mark.contract("C8")
def test_validating_a_checkpoint_first_does_not_make_a_fresh_fit_resume(tmp_path: Path) -> None:
    fit(LayerRotationMonitor(report=False)).save_checkpoint(tmp_path / "a.ckpt")
    monitor = LayerRotationMonitor(report=False)
    run = trainer(monitor)
    run.validate(Net(), batches(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    run.fit(Net(), batches())
    assert monitor.history.steps == list(range(1, 9))


@pytest.mark.contract("C17")
def test_state_is_empty_before_training_and_plain_afterwards(tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(report=False)
    assert monitor.state_dict() == {}
    fit(monitor)
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["reference"].keys() == {"body.0", "head"}


@pytest.mark.contract("C19")
def test_pickle_and_deepcopy_after_a_training() -> None:
    monitor = LayerRotationMonitor(exclude="head", report=False)
    monitor.setup(trainer(), Net(), "fit")
    for twin in (pickle.loads(pickle.dumps(monitor)), copy.deepcopy(monitor)):
        assert twin.state_key == monitor.state_key
        assert twin.history == monitor.history


class Copies(pl.Callback):
    """What a pickled and a deep copy of the monitor know in the middle of a training."""

    def __init__(self, monitor: LayerRotationMonitor) -> None:
        self.monitor, self.twins = monitor, []

    def on_train_batch_end(self, *args: Any) -> None:
        if args[-1] == 4:
            self.twins = [pickle.loads(pickle.dumps(self.monitor)), copy.deepcopy(self.monitor)]


@pytest.mark.contract("C19")
def test_pickle_and_deepcopy_during_a_training_hold_no_module() -> None:
    monitor = LayerRotationMonitor(report=False)
    copies = Copies(monitor)
    fit(monitor, copies)
    for twin in copies.twins:
        assert twin.history.steps == [1, 2, 3, 4, 5]
        assert not any(isinstance(value, nn.Module) for value in vars(twin).values())
        assert "log" not in vars(twin)


@pytest.mark.contract("C16")
def test_monitors_with_other_options_live_side_by_side(tmp_path: Path) -> None:
    both = [LayerRotationMonitor(report=False), LayerRotationMonitor(include="head", report=False)]
    run = fit(*both)
    run.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"].keys()
    assert {monitor.state_key for monitor in both} <= set(keys)
    assert [len(monitor.history.layer_names) for monitor in both] == [2, 1]


@pytest.mark.contract("C16")
def test_a_second_monitor_of_the_same_options_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LayerRotationMonitor`"):
        trainer(LayerRotationMonitor(), LayerRotationMonitor())
