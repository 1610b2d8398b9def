"""layca_optimizers in real trainings: groups, schedules, what Lightning's own callbacks and CLI make of it."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import LightningCLI, OptimizerCallable
from pytorch_lightning.loggers import CSVLogger

from pl_layer_rotation import Layca, LayerRotationMonitor, layca_optimizers


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("base", "plain"),
    [(torch.optim.SGD, 0.1), ("SGD", 0.1), (torch.optim.AdamW, 0.01), ("RMSprop", 0.01), (torch.optim.Adagrad, 0.01)],
)
def test_plain_tensors_get_the_rate_that_suits_the_base(base: Any, plain: float) -> None:
    optimizer = layca_optimizers(Net(), lr=0.02, base=base)["optimizer"]
    assert isinstance(optimizer, Layca)
    assert rates(optimizer) == {"rotating": 0.02, "plain": plain}


def test_calling_twice_shares_nothing() -> None:
    module = Net()
    first, second = (layca_optimizers(module)["optimizer"] for _ in range(2))
    first.param_groups[0]["lr"] = 1.0
    assert second.param_groups[0]["lr"] == 3**-3
    assert first.param_groups[0]["params"] == second.param_groups[0]["params"]


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(tuple(rates(optimizer).values()))


def test_the_cosine_schedule_falls_to_zero_over_the_trainers_steps() -> None:
    seen = Rates()
    run = trainer(seen, max_epochs=2)
    run.fit(Net(lambda m: layca_optimizers(m, lr=0.02, plain_lr=0.2, schedule="cosine")), batches())
    expected = [0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert [rate for rate, _ in seen.seen] == pytest.approx([0.02 * share for share in expected], rel=1e-6)
    assert [plain for _, plain in seen.seen] == pytest.approx([0.2 * share for share in expected], rel=1e-6)


def test_a_schedule_of_ones_own_steps_with_the_optimizer() -> None:
    seen = Rates()
    make = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)  # noqa: E731
    trainer(seen).fit(Net(lambda m: layca_optimizers(m, lr=0.02, schedule=make)), batches())
    assert [rate for rate, _ in seen.seen] == pytest.approx([0.02] * 4 + [0.002] * 4)


def test_learning_rate_monitor_logs_both_groups(tmp_path: Path) -> None:
    run = trainer(LearningRateMonitor(log_momentum=True), logger=CSVLogger(tmp_path))
    run.fit(Net(lambda m: layca_optimizers(m, lr=0.02, momentum=0.8, schedule="constant")), batches())
    logged = {key: value.item() for key, value in run.callback_metrics.items()}
    assert logged["lr-Layca/rotating"] == pytest.approx(0.02)
    assert logged["lr-Layca/plain"] == pytest.approx(0.1)
    assert logged["lr-Layca/rotating-momentum"] == pytest.approx(0.8)


def test_multipliers_turn_each_layer_by_its_own_angle() -> None:
    monitor = LayerRotationMonitor(report=False)
    make = lambda m: layca_optimizers(m, lr=0.1, layer_multipliers={"head": 0.25})  # noqa: E731
    trainer(monitor).fit(Net(make), batches())
    expected = torch.tensor([math.atan(0.1), math.atan(0.025)], dtype=torch.float64).expand(8, 2)
    torch.testing.assert_close(monitor.history.values("angular_update"), expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_precisions(precision: Any) -> None:
    monitor = LayerRotationMonitor(report=False)
    trainer(monitor, precision=precision).fit(Net(lambda m: layca_optimizers(m, lr=0.05, base="AdamW")), batches())
    torch.testing.assert_close(
        monitor.history.values("angular_update"), torch.full((8, 2), math.atan(0.05)).double(), rtol=1e-5, atol=0.0
    )


def test_gradient_clipping_and_accumulation_leave_the_angle_as_it_is() -> None:
    monitor = LayerRotationMonitor(report=False)
    run = trainer(monitor, gradient_clip_val=1e-3, accumulate_grad_batches=4)
    run.fit(Net(lambda m: layca_optimizers(m, lr=0.05)), batches())
    assert monitor.history.values("angular_update").flatten().tolist() == pytest.approx([math.atan(0.05)] * 4, rel=1e-5)


def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def make(module: pl.LightningModule) -> Any:
        step = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)  # noqa: E731
        return layca_optimizers(module, lr=0.05, base="Adam", schedule=step)

    data = batches(identical=True)
    whole, first, second = Net(make), Net(make), Net(make)
    trainer(max_epochs=2).fit(whole, data)
    run = trainer()
    run.fit(first, data)
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(max_epochs=2).fit(second, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"schedule": "linear"},
            MisconfigurationException,
            r"`schedule` must be 'constant', 'cosine' or a function .*, got 'linear'\.",
        ),
        (
            {"schedule": "cosine"},
            MisconfigurationException,
            r"`schedule='cosine'` must know how long the training is, got a module without a trainer\.",
        ),
        ({"plain_lr": math.nan}, ValueError, r"`plain_lr` must be a finite number of at least 0, got nan\."),
        ({"lr": -1.0}, ValueError, r"`lr` must be a finite number of at least 0, got -1\.0\."),
        (
            {"exclude": "*"},
            MisconfigurationException,
            "`module` must have a trainable layer to rotate, got Net with 6 trainable parameters",
        ),
        ({"include": "heads"}, MisconfigurationException, "got 'heads', which matches none. Similar names: 'head'"),
        ({"weight_decay": 0.1}, ValueError, r"`weight_decay` must be 0 in a rotating group, got 0\.1"),
        (
            {"layer_multipliers": 1.5},
            MisconfigurationException,
            r"`layer_multipliers` must be an alpha between -1 and 1 .*, got 1\.5",
        ),
    ],
)
def test_bad_options_are_named_with_their_mend(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layca_optimizers(Net(), **options)


def test_the_cosine_schedule_refuses_a_training_without_end() -> None:
    with pytest.raises(
        MisconfigurationException, match="must know how long the training is, got inf steps from the trainer"
    ):
        trainer(max_epochs=-1).fit(Net(lambda m: layca_optimizers(m, schedule="cosine")), batches())


class WithHyperparameters(Net):
    """What the documentation recommends for LightningCLI: the base as a callable, everything else as numbers."""

    def __init__(self, rate: float = 0.1, base: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__()
        self.rate, self.base = rate, base

    def configure_optimizers(self) -> Any:
        return layca_optimizers(self, lr=self.rate, base=self.base)

    def train_dataloader(self) -> Any:
        return batches()


CLI_OPTIONS = [
    "--seed_everything=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.logger=false",
    "--trainer.max_epochs=1",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]


def run_cli(module: type[pl.LightningModule], arguments: list[str]) -> pl.Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py"])
        return LightningCLI(module, args=["fit", *CLI_OPTIONS, *arguments], save_config_callback=None).trainer


def test_cli_takes_monitor_and_hyperparameters() -> None:
    run = run_cli(
        WithHyperparameters,
        [
            "--model.rate=0.05",
            "--trainer.callbacks+=pl_layer_rotation.LayerRotationMonitor",
            "--trainer.callbacks.every_n_steps=2",
            "--trainer.callbacks.report=false",
        ],
    )
    (monitor,) = [c for c in run.callbacks if isinstance(c, LayerRotationMonitor)]
    assert monitor.history.steps == [2, 4, 6, 8]
    assert rates(run.optimizers[0]) == {"rotating": 0.05, "plain": 0.1}


class WithoutOptimizer(Net):
    configure_optimizers = pl.LightningModule.configure_optimizers

    def train_dataloader(self) -> Any:
        return batches()


OPTIMIZER_YAML = """\
optimizer:
  class_path: pl_layer_rotation.Layca
  init_args:
    lr: 0.05
    base:
      class_path: torch.optim.SGD
      init_args: {momentum: 0.7}
"""


def test_cli_takes_the_optimizer_by_class_path_and_the_momentum_of_its_base_arrives(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(OPTIMIZER_YAML, encoding="utf-8")
    run = run_cli(WithoutOptimizer, [f"--config={config}"])
    (group,) = run.optimizers[0].param_groups
    assert (group["lr"], group["momentum"], group["rotate"]) == (0.05, 0.7, True)


def test_cli_takes_optimizer_and_scheduler_on_the_command_line() -> None:
    scheduler = [
        "--lr_scheduler=torch.optim.lr_scheduler.StepLR",
        "--lr_scheduler.step_size=1",
        "--lr_scheduler.gamma=0.5",
    ]
    run = run_cli(
        WithoutOptimizer,
        ["--optimizer=pl_layer_rotation.Layca", "--optimizer.lr=0.1", "--optimizer.base=AdamW", *scheduler],
    )
    assert run.optimizers[0].base_class is torch.optim.AdamW
    assert rate_of(run) == pytest.approx(0.05)


def rate_of(run: pl.Trainer) -> float:
    return float(run.optimizers[0].param_groups[0]["lr"])


def test_cli_prints_a_config_that_it_reads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--optimizer=pl_layer_rotation.Layca",
        "--optimizer.lr=0.02",
        "--trainer.callbacks+=pl_layer_rotation.LayerRotationMonitor",
    ]
    with pytest.raises(SystemExit, match="0"):
        run_cli(WithoutOptimizer, [*arguments, "--print_config"])
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out, encoding="utf-8")
    run = run_cli(WithoutOptimizer, [f"--config={config}", "--trainer.callbacks.report=false"])
    assert rate_of(run) == 0.02
    assert any(isinstance(callback, LayerRotationMonitor) for callback in run.callbacks)


OTHER_NAMESPACE = """
import sys
import torch, lightning.pytorch as L
from lightning.pytorch.cli import LightningCLI
from pl_layer_rotation import LayerRotationMonitor, layca_optimizers
class Net(L.LightningModule):
    def __init__(self, rate: float = 0.1):
        super().__init__()
        self.rate, self.layer = rate, torch.nn.Linear(4, 3)
    def training_step(self, batch, index): return self.layer(batch).square().mean()
    def configure_optimizers(self): return layca_optimizers(self, lr=self.rate)
    def train_dataloader(self): return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2)
sys.argv = ["train.py"]
quiet = ["logger=false", "enable_checkpointing=false", "enable_progress_bar=false", "enable_model_summary=false"]
cli = LightningCLI(Net, save_config_callback=None, args=[
    "fit", "--seed_everything=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--model.rate=0.05",
    *(f"--trainer.{option}" for option in quiet),
    "--trainer.callbacks+=pl_layer_rotation.LayerRotationMonitor", "--trainer.callbacks.every_n_steps=1",
    "--trainer.callbacks.report=false",
])
(monitor,) = [c for c in cli.trainer.callbacks if isinstance(c, LayerRotationMonitor)]
print("steps", monitor.history.steps, round(float(monitor.history.values("angular_update")[0, 0]), 5))
"""


def test_the_cli_of_the_other_namespace_takes_the_monitor_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OTHER_NAMESPACE], capture_output=True, text=True, timeout=100, check=False
    )
    assert "steps [1, 2, 3, 4] 0.04996" in done.stdout, done.stderr
