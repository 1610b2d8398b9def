"""LayerRotationMonitor in real trainings, against values computed by hand from the saved weights."""

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from pl_layer_rotation import LayerRotationMonitor, RotationHistory, layca_optimizers

LAYERS = {"body.0": "body.0.weight", "head": "head.weight"}


class SavedWeights(pl.Callback):
    """The layers' weights before training and after every batch, in float64."""

    def __init__(self) -> None:
        self.snapshots: list[dict[str, np.ndarray]] = []

    def _save(self, module: nn.Module) -> None:
        weights = module.state_dict()
        self.snapshots.append({name: weights[key].double().flatten().numpy() for name, key in LAYERS.items()})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._save(pl_module)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    first, second = (v.astype(np.longdouble) / np.linalg.norm(v.astype(np.longdouble)) for v in (first, second))
    return float(((first - second) ** 2).sum() / 2)


def by_hand(snapshots: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    start, steps = snapshots[0], range(1, len(snapshots))
    return {
        "rotation": np.array([[distance(snapshots[t][n], start[n]) for n in LAYERS] for t in steps]),
        "norm_ratio": np.array(
            [[np.linalg.norm(snapshots[t][n]) / np.linalg.norm(start[n]) for n in LAYERS] for t in steps]
        ),
        "angular_update": np.array(
            [
                [2 * math.asin(math.sqrt(distance(snapshots[t][n], snapshots[t - 1][n]) / 2)) for n in LAYERS]
                for t in steps
            ]
        ),
    }


def fit(
    *callbacks: pl.Callback, module: pl.LightningModule | None = None, data: Any = None, **options: Any
) -> pl.Trainer:
    run = trainer(*callbacks, **options)
    run.fit(module or Net(), data or batches())
    return run


@pytest.mark.contract("C1")
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Layca"])
def test_history_equals_a_computation_from_the_saved_weights(optimizer: str) -> None:
    make = {
        "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
        "Layca": lambda m: layca_optimizers(m, lr=0.05, momentum=0.9),
    }[optimizer]
    monitor, saved = LayerRotationMonitor(report=False), SavedWeights()
    fit(monitor, saved, module=Net(make), max_epochs=3)
    assert monitor.history.layer_names == list(LAYERS)
    assert monitor.history.steps == list(range(1, 25))
    for quantity, expected in by_hand(saved.snapshots).items():
        np.testing.assert_allclose(monitor.history.values(quantity).numpy(), expected, rtol=1e-6, atol=1e-14)


def sums_by_hand(angles: np.ndarray, read: list[int]) -> dict[str, np.ndarray]:
    """After the last step, where the angles of these steps (counted from 1) were read."""
    weights = np.diff([0, *read])[:, None]
    angles = angles[np.array(read) - 1]
    return {
        "path": (weights * angles).sum(0),
        "path_square": (weights * angles**2).sum(0),
        "peak": angles.max(0),
        "peak_step": np.array(read)[angles.argmax(0)],
    }


@pytest.mark.parametrize(
    ("every", "epochs", "read"),
    [
        (1, 3, list(range(1, 25))),
        (8, 3, list(range(1, 25))),  # 24 steps: fewer than 60 readings, so every step is read
        (40, 30, [*range(1, 25), *range(28, 241, 4)]),  # each of the first tenth, then 60 over the training
        (2, 30, [*range(1, 25), *range(26, 241, 2)]),
    ],
)
def test_sums_over_steps_equal_those_from_the_saved_weights(every: int, epochs: int, read: list[int]) -> None:
    monitor, saved = LayerRotationMonitor(every_n_steps=every, report=False), SavedWeights()
    module = Net(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    run = fit(monitor, saved, module=module, max_epochs=epochs)
    curves = by_hand(saved.snapshots)
    sums = sums_by_hand(curves["angular_update"], read)
    for quantity, expected in sums.items():
        np.testing.assert_allclose(monitor.history.values(quantity)[-1].numpy(), expected, rtol=1e-6)
    walk = np.arccos(np.exp(-0.5 * 19 * sums["path_square"]))
    kappa = np.arccos(1 - curves["rotation"][-1]) / walk
    np.testing.assert_allclose(monitor.history.values("straightness")[-1].numpy(), kappa, rtol=1e-5)
    median = run.callback_metrics["layer_straightness_stats/median"]
    assert float(median) == pytest.approx(float(np.sort(kappa)[0]), rel=1e-5)
    facts = monitor.history.facts
    assert (facts["angle_readings"], facts["momentum"], facts["constant_learning_rate"]) == (len(read), 0.9, True)


def test_without_a_known_momentum_there_is_no_straightness() -> None:
    monitor = LayerRotationMonitor(report=False)
    run = fit(monitor, module=Net(lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1)))
    assert "straightness" not in monitor.history.quantities
    assert not any("straightness" in key for key in run.callback_metrics)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_facts_say_whether_the_learning_rate_stayed(schedule: Any) -> None:
    monitor = LayerRotationMonitor(report=False)
    fit(monitor, module=Net(lambda m: layca_optimizers(m, base="AdamW", schedule=schedule)), max_epochs=2)
    assert monitor.history.facts["constant_learning_rate"] is (schedule == "constant")
    assert monitor.history.facts["base"] == "AdamW"
    assert monitor.history.facts["momentum"] == 0.9


def test_a_second_training_at_another_constant_rate_is_constant_too() -> None:
    monitor = LayerRotationMonitor(report=False)
    for lr in (0.1, 0.02):
        module = Net(lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr=lr))
        fit(monitor, module=module)
        assert monitor.history.facts["constant_learning_rate"] is True


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


def test_the_facts_name_layers_before_a_batch_norm_and_the_length() -> None:
    monitor, module = LayerRotationMonitor(report=False), Net()
    module.body = nn.Sequential(module.body[0], nn.BatchNorm1d(module.body[0].out_features), *module.body[1:])
    fit(monitor, module=module, max_epochs=2)
    assert monitor.history.facts["followed_by_norm"] == ["body.0"]
    assert monitor.history.facts["total_steps"] == 16


def test_the_learning_rate_of_a_run_that_warms_up_is_the_one_that_it_warms_up_to() -> None:
    monitor = LayerRotationMonitor(report=False)
    fit(monitor, module=Net(lambda m: layca_optimizers(m, lr=0.05, schedule="cosine", warmup_steps=4)))
    assert monitor.history.facts["learning_rate"] == pytest.approx(0.05)


@pytest.mark.contract("C1")
def test_layca_angles_and_norms_are_as_requested() -> None:
    monitor = LayerRotationMonitor(report=False)
    fit(monitor, module=Net(lambda m: layca_optimizers(m, lr=0.05)))
    torch.testing.assert_close(
        monitor.history.values("angular_update"), torch.full((8, 2), math.atan(0.05)).double(), rtol=1e-5, atol=0.0
    )
    torch.testing.assert_close(
        monitor.history.values("norm_ratio"), torch.ones(8, 2, dtype=torch.float64), rtol=1e-6, atol=0.0
    )


@pytest.mark.contract("C2")
@pytest.mark.parametrize(
    ("every", "log_every", "expected"),
    [(1, 50, list(range(1, 17))), (3, 1, [3, 6, 9, 12, 15, 16]), (None, 5, [5, 10, 15, 16]), (None, 50, [16])],
)
def test_readings_follow_the_cadence_and_end_with_the_last_step(
    every: int | None, log_every: int, expected: list[int]
) -> None:
    monitor = LayerRotationMonitor(every_n_steps=every, report=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches")
        fit(monitor, max_epochs=2, log_every_n_steps=log_every)
    assert monitor.history.steps == expected


@pytest.mark.contract("C3")
def test_accumulated_batches_count_as_one_step() -> None:
    monitor, saved = LayerRotationMonitor(report=False), SavedWeights()
    fit(monitor, saved, data=batches(5), accumulate_grad_batches=2)
    assert monitor.history.steps == [1, 2, 3]
    after = [saved.snapshots[i] for i in (0, 2, 4, 5)]
    np.testing.assert_allclose(
        monitor.history.values("rotation").numpy(), by_hand(after)["rotation"], rtol=1e-6, atol=0
    )


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int = 0) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


@pytest.mark.contract("C4")
def test_manual_optimization_with_two_optimizers_counts_batches() -> None:
    monitor, saved = LayerRotationMonitor(every_n_steps=3, report=False), SavedWeights()
    fit(monitor, saved, module=TwoOptimizers())
    assert monitor.history.steps == [3, 6, 8]
    expected = by_hand(saved.snapshots)
    for quantity in ("rotation", "angular_update"):
        np.testing.assert_allclose(
            monitor.history.values(quantity)[:2].numpy(), expected[quantity][[2, 5]], rtol=1e-6, atol=0
        )


def read_csv(folder: Path) -> list[dict[str, str]]:
    import csv

    with next(folder.rglob("metrics.csv")).open(encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if row.get("layer_rotation_stats/mean")]


@pytest.mark.contract("C6")
def test_every_logger_gets_each_reading_at_lightnings_step(tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(every_n_steps=2, log_quantities=["rotation", "norm_ratio"], report=False)
    fit(monitor, logger=[CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")])
    for folder in ("a", "b"):
        rows = read_csv(tmp_path / folder)
        assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
        logged = [[float(row[f"layer_rotation/{key}"]) for key in ("000_body_0", "001_head")] for row in rows]
        np.testing.assert_allclose(logged, monitor.history.values("rotation").numpy(), rtol=1e-12)
        mean = [float(row["layer_norm_ratio_stats/mean"]) for row in rows]
        np.testing.assert_allclose(mean, monitor.history.values("norm_ratio").mean(1).numpy(), rtol=1e-12)


@pytest.mark.contract("C5")
def test_early_stopping_acts_on_an_aggregate_from_the_first_validation_on() -> None:
    stop = EarlyStopping(
        "layer_rotation_stats/mean", mode="max", stopping_threshold=1e-3, check_on_train_epoch_end=False
    )
    monitor = LayerRotationMonitor(every_n_steps=1000, report=False)
    run = trainer(stop, monitor, max_epochs=50, num_sanity_val_steps=1)
    run.fit(Net(), batches(), batches())
    assert 0 < run.current_epoch < 50
    mean = monitor.history.values("rotation").mean().item()
    assert run.callback_metrics["layer_rotation_stats/mean"].item() == pytest.approx(mean, rel=1e-6)
    assert mean >= 1e-3


@pytest.mark.contract("C5")
def test_model_checkpoint_keeps_the_epoch_with_the_largest_aggregate(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="layer_rotation_stats/max", mode="max", filename="{epoch}")
    fit(LayerRotationMonitor(report=False), keep, max_epochs=3, enable_checkpointing=True)
    assert keep.best_model_path.endswith("epoch=2.ckpt")


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


@pytest.mark.contract("C14")
def test_a_second_fit_goes_on_and_a_new_model_starts_anew() -> None:
    monitor, module = LayerRotationMonitor(report=False), Net()
    run = fit(monitor, module=module)
    run.fit_loop.max_epochs = 2
    run.fit(module, batches())
    assert monitor.history.steps == list(range(1, 17))
    fit(monitor)
    assert monitor.history.steps == list(range(1, 9))


@pytest.mark.contract("C8")
def test_validating_a_checkpoint_first_does_not_make_a_fresh_fit_resume(tmp_path: Path) -> None:
    fit(LayerRotationMonitor(report=False)).save_checkpoint(tmp_path / "a.ckpt")
    monitor = LayerRotationMonitor(report=False)
    run = trainer(monitor)
    run.validate(Net(), batches(), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    run.fit(Net(), batches())
    assert monitor.history.steps == list(range(1, 9))


def test_a_layer_of_zeros_is_measured_from_its_first_nonzero_weights() -> None:
    module = Net()
    nn.init.zeros_(module.head.weight)
    monitor, saved = LayerRotationMonitor(report=False), SavedWeights()
    with pytest.warns(UserWarning, match="'head' start at zero and have no direction") as caught:
        run = fit(monitor, saved, module=module)
    assert len([w for w in caught if "start at zero" in str(w.message)]) == 1
    head = monitor.history.values("rotation")[:, 1]
    expected = [distance(s["head"], saved.snapshots[1]["head"]) for s in saved.snapshots[1:]]
    np.testing.assert_allclose(head.numpy(), expected, rtol=1e-6, atol=1e-12)
    assert monitor.history.facts["reference_steps"] == {"head": 1}
    assert all(math.isfinite(v) for k, v in run.callback_metrics.items() if k.startswith("layer_"))


def test_a_layer_that_stays_zero_is_never_logged(tmp_path: Path) -> None:
    module = Net()
    nn.init.zeros_(module.head.weight).requires_grad_(False)
    monitor = LayerRotationMonitor(report=False)
    with pytest.warns(UserWarning, match="start at zero"):
        fit(monitor, module=module, logger=CSVLogger(tmp_path))
    assert monitor.history.values("rotation")[:, 1].isnan().all()
    assert all("layer_rotation/001_head" not in row for row in read_csv(tmp_path))


def test_a_frozen_layer_reads_exactly_zero() -> None:
    module = Net()
    module.head.requires_grad_(False)
    monitor = LayerRotationMonitor(report=False)
    fit(monitor, module=module)
    assert monitor.history.final() == {"body.0": pytest.approx(0.005, abs=0.02), "head": 0.0}
    assert monitor.history.values("angular_update")[:, 1].eq(0).all()


class GrowsLate(Net):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.late = nn.Linear(3, 3)
            self.optimizers().add_param_group({"params": list(self.late.parameters())})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(inputs)
        return self.late(outputs) if hasattr(self, "late") else outputs


@pytest.mark.contract("C22")
def test_a_layer_that_appears_later_joins_with_its_own_start() -> None:
    monitor = LayerRotationMonitor(report=False)
    fit(monitor, module=GrowsLate(), max_epochs=2)
    late = monitor.history.values("rotation")[:, 2]
    assert monitor.history.layer_names == ["body.0", "head", "late"]
    assert late[:8].isnan().all()
    assert 0 < late[8] < late[9] < late[15]


@pytest.mark.contract("C14")
def test_fitting_again_after_an_interrupt_goes_on() -> None:
    class InterruptsOnce(pl.Callback):
        done = False

        def on_validation_start(self, *args: Any) -> None:
            if not self.done and not args[0].sanity_checking:
                self.done = True
                raise KeyboardInterrupt

    monitor, module = LayerRotationMonitor(report=False), Net()
    run = trainer(monitor, InterruptsOnce(), max_epochs=2, val_check_interval=3)
    with pytest.raises(SystemExit, match="1"):
        run.fit(module, batches(), batches())
    run.fit(module, batches(), batches())
    assert run.state.finished
    assert monitor.history.steps == sorted(set(monitor.history.steps))


@pytest.mark.contract("C13")
def test_a_failed_measurement_is_a_warning_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = LayerRotationMonitor(report=False)
    calls = iter(range(100))

    def fails_later(*args: Any) -> Any:
        if next(calls) == 3:
            raise MemoryError("no room for a copy")
        return original(*args)

    original = monitor._read
    monkeypatch.setattr(monitor, "_read", fails_later)
    with pytest.warns(UserWarning, match="measuring failed and stops here: MemoryError: no room for a copy"):
        run = fit(monitor)
    assert run.state.finished
    assert monitor.history.steps == [1, 2, 3]


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


@pytest.mark.contract("C5")
def test_weights_that_are_not_finite_show_in_the_aggregates() -> None:
    run = fit(LayerRotationMonitor(report=False), module=Net(lambda m: torch.optim.SGD(m.parameters(), lr=1e30)))
    assert run.callback_metrics["layer_rotation_stats/mean"].isnan()


class LogsItsOwn(Net):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int = 0) -> torch.Tensor:
        self.log("layer_penalty", 0.5, on_step=False, on_epoch=True)
        return super().training_step(batch)


@pytest.mark.parametrize("lr", [0.1, 1e30], ids=["healthy", "diverged"])
def test_metrics_of_the_user_are_left_alone_whatever_their_name(lr: float) -> None:
    monitor, module = LayerRotationMonitor(report=False), LogsItsOwn(lambda m: torch.optim.SGD(m.parameters(), lr=lr))
    run = fit(monitor, module=module, max_epochs=2)
    assert run.callback_metrics["layer_penalty"].item() == 0.5
    assert monitor.history.facts["metrics"] == {"layer_penalty": 0.5}


class EveryOther(TwoOptimizers):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int = 0) -> None:
        self.manual_backward(Net.training_step(self, batch))
        if batch_idx % 3 == 1:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.contract("C4")
def test_accumulating_by_hand_still_meets_the_cadence() -> None:
    monitor = LayerRotationMonitor(every_n_steps=3, report=False)
    fit(monitor, module=EveryOther(), data=batches(12))
    assert monitor.history.steps == [5, 8, 11]
    assert not monitor.history.values("angular_update").isnan().any()


class FailingLogger(CSVLogger):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("layer_") for key in metrics):
            raise OSError(28, "No space left on device")
        super().log_metrics(metrics, step)


@pytest.mark.contract("C13")
def test_a_logger_that_fails_is_a_warning_and_other_loggers_are_served(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="logging to FailingLogger failed and is left out: OSError") as caught:
        run = fit(LayerRotationMonitor(report=False), logger=[FailingLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")])
    assert run.state.finished
    assert len([w for w in caught if "FailingLogger" in str(w.message)]) == 1
    assert len(read_csv(tmp_path / "b")) == 8


@pytest.mark.contract("C13")
def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.warns(
        UserWarning, match="writing the (page|history) failed and is left out: NotADirectoryError"
    ) as seen:
        run = fit(LayerRotationMonitor(), default_root_dir=tmp_path / "file" / "below")
    assert run.state.finished
    assert len([w for w in seen if "LayerRotationMonitor" in str(w.message)]) == 2


class WithoutRate(torch.optim.SGD):
    """An optimizer whose groups hold no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        del self.param_groups[0]["lr"]

    def step(self, closure: Any = None) -> Any:
        return closure()


def test_an_optimizer_without_a_learning_rate_is_a_run_without_that_fact() -> None:
    monitor = LayerRotationMonitor(report=False)
    run = fit(monitor, module=Net(lambda m: WithoutRate(m.parameters())))
    assert run.state.finished
    assert monitor.history.facts["optimizer"] == "WithoutRate"
    assert "learning_rate" not in monitor.history.facts


@pytest.mark.contract("C11")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("boom")], ids=["Ctrl-C", "exception"])
def test_an_interrupted_training_still_reports(tmp_path: Path, error: Any) -> None:
    class Interrupts(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if args[-1] == 5:
                raise error

    monitor = LayerRotationMonitor()
    with pytest.raises((SystemExit, RuntimeError), match=r"1|boom"):
        fit(monitor, Interrupts(), default_root_dir=tmp_path)
    assert RotationHistory.load(tmp_path / "layer_rotation.jsonl").steps == [1, 2, 3, 4, 5]
    assert (tmp_path / "layer_rotation.html").stat().st_size > 10_000


def test_the_report_stands_next_to_the_logs_and_holds_the_history(tmp_path: Path, capsys: Any) -> None:
    monitor = LayerRotationMonitor()
    fit(monitor, logger=CSVLogger(tmp_path, name="run"), module=Net(lambda m: layca_optimizers(m, lr=0.05)))
    folder = tmp_path / "run" / "version_0"
    assert RotationHistory.load(folder / "layer_rotation.jsonl") == monitor.history
    printed = capsys.readouterr().out
    assert "Layer rotation after 8 steps" in printed
    assert "body.0" in printed
    assert "6 × 7" in printed
    facts = monitor.history.facts
    assert (facts["optimizer"], facts["learning_rate"], facts["devices"]) == ("Layca(SGD)", 0.05, 1)


class KilledAt(pl.Callback):
    """What is on the disk after so many steps, as a killed process would leave it."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder, self.text = step, folder, b""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.text = next(self.folder.rglob("layer_rotation.jsonl")).read_bytes()


def test_the_file_holds_all_readings_while_training_goes_on(tmp_path: Path) -> None:
    monitor, killed = LayerRotationMonitor(every_n_steps=1), KilledAt(5, tmp_path)
    fit(monitor, killed, default_root_dir=tmp_path)
    (tmp_path / "left.jsonl").write_bytes(killed.text)
    left = RotationHistory.load(tmp_path / "left.jsonl")
    assert left.steps == [1, 2, 3, 4, 5]
    assert torch.equal(left.values("rotation"), monitor.history.values("rotation")[:5])
    assert RotationHistory.load(next(tmp_path.rglob("layer_rotation.jsonl"))) == monitor.history


@pytest.mark.contract("C9", "C10")
@pytest.mark.parametrize(
    "option", [{"fast_dev_run": True}, {"barebones": True}, {"limit_train_batches": 0}, {"max_steps": 0}]
)
def test_trainings_that_write_nothing(tmp_path: Path, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"logger": None, "enable_checkpointing": None, "log_every_n_steps": None, **option}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fit(LayerRotationMonitor(), **options)
    assert run.state.finished
    assert list(tmp_path.rglob("layer_rotation*")) == []


@pytest.mark.contract("C7")
def test_other_loops_are_left_alone(tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(report=False)
    run = trainer(monitor, logger=CSVLogger(tmp_path))
    module = Net()
    run.validate(module, batches(), verbose=False)
    assert monitor.state_dict() == {}
    run.fit(module, batches())
    steps = list(monitor.history.steps)
    run.validate(module, batches(), verbose=False)
    assert monitor.history.steps == steps


@pytest.mark.contract("C26")
def test_measuring_leaves_training_as_it_is() -> None:
    def weights(*callbacks: pl.Callback) -> list[torch.Tensor]:
        module = Net(lambda m: layca_optimizers(m, lr=0.05, momentum=0.9))
        pl.seed_everything(7, verbose=False)
        fit(*callbacks, module=module)
        return [*module.parameters(), torch.rand(1)]

    monitored, alone = weights(LayerRotationMonitor(report=False)), weights()
    assert all(torch.equal(a, b) for a, b in zip(monitored, alone, strict=True))


@pytest.mark.contract("C29")
def test_a_module_without_layers_trains_on_with_one_warning() -> None:
    class NoLayers(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Identity(), nn.LayerNorm(7)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int = 0) -> torch.Tensor:
            return self(batch[0]).square().mean()

    with pytest.warns(UserWarning, match="NoLayers has no layers to measure"):
        run = fit(LayerRotationMonitor(), module=NoLayers())
    assert run.state.finished


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


@pytest.mark.contract("C23")
def test_lazy_layers_are_measured_from_their_first_weights() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body[0], self.head = nn.LazyLinear(6), nn.LazyLinear(3)

    monitor = LayerRotationMonitor(report=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(uninitialized|Lazy modules)")
        fit(monitor, module=Lazy())
    assert monitor.history.layer_names == ["body.0", "head"]
    assert (monitor.history.values("rotation")[0] > 1e-5).all()


@pytest.mark.contract("C25")
def test_weights_that_averaging_puts_in_are_never_measured() -> None:
    finals = []
    for callbacks in ([], [EMAWeightAveraging(decay=0.5)]):
        for order in (1, -1):
            monitor = LayerRotationMonitor(report=False)
            run = trainer(*[monitor, *callbacks][::order], max_epochs=2)
            run.fit(Net(), batches(), batches())
            finals.append(monitor.history.final())
    assert all(final == finals[0] for final in finals)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1 or None, got 0"),
        ({"every_n_steps": 2.5}, "`every_n_steps` must be an integer of at least 1 or None, got 2.5"),
        ({"log_quantities": ["speed"]}, r"`log_quantities` must be a list out of rotation, .* got \['speed'\]"),
        ({"log_quantities": "rotation"}, "must be a list out of rotation, .* got 'rotation'"),
    ],
)
def test_bad_options_are_named_with_their_mend(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        LayerRotationMonitor(**options)


def test_a_pattern_that_matches_nothing_stops_before_the_first_step() -> None:
    with pytest.raises(MisconfigurationException, match=r"got 'heads', which matches none\. Similar names: 'head'"):
        fit(LayerRotationMonitor(include="heads"))


@pytest.mark.contract("C28")
def test_hostile_layer_names_keep_their_curves(tmp_path: Path) -> None:
    class Hostile(Net):
        def __init__(self) -> None:
            super().__init__()
            for name in ("a/b c[0]:<b>'é", "a/b c[0]:<b>'è", "__proto__", "x" * 300):
                self.add_module(name, nn.Linear(3, 3))

    monitor = LayerRotationMonitor()
    fit(monitor, module=Hostile(), logger=CSVLogger(tmp_path))
    (row, *_) = read_csv(tmp_path)
    assert len([key for key in row if key.startswith("layer_rotation/")]) == 6
    assert RotationHistory.load(next(tmp_path.rglob("*.jsonl"))).layer_names == monitor.history.layer_names
