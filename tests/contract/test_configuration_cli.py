"""Contract H13, H14 and H17: monitor, optimizer and a whole recipe from LightningCLI, its YAML and its help."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import pytorch_lightning as pl
import torch
from nets import Net, batches
from noted_rates import rates
from pytorch_lightning.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable, SaveConfigCallback

from pl_layer_rotation import Layca, LayerRotationMonitor, layca_optimizers


class WithHyperparameters(Net):
    """What the documentation recommends for LightningCLI: bases as callables, everything else as plain values."""

    def __init__(
        self,
        rate: float | Literal["auto"] = 0.1,
        base: OptimizerCallable = torch.optim.SGD,
        plain_base: OptimizerCallable | None = None,
        schedule: Literal["constant", "cosine", "steps"] | LRSchedulerCallable | None = None,
        layer_multipliers: float | dict[str, float] | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "lr": rate,
            "base": base,
            "plain_base": plain_base,
            "schedule": schedule,
            "layer_multipliers": layer_multipliers,
            "warmup_steps": warmup_steps,
        }

    def configure_optimizers(self) -> Any:
        return layca_optimizers(self, **self.options)

    def train_dataloader(self) -> Any:
        return batches()


class WithoutOptimizer(Net):
    configure_optimizers = pl.LightningModule.configure_optimizers

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


def run_cli(module: type[pl.LightningModule], arguments: list[str], **options: Any) -> pl.Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py"])
        return LightningCLI(
            module, args=["fit", *CLI_OPTIONS, *arguments], **{"save_config_callback": None, **options}
        ).trainer


@pytest.fixture
def run_yaml(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def run(module: type[pl.LightningModule], text: str) -> pl.Trainer:
        config = tmp_path / "config.yaml"
        config.write_text(text, encoding="utf-8")
        return run_cli(module, [f"--config={config}"])

    return run


@pytest.mark.contract("H14")
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


RECIPE_YAML = """\
model:
  rate: 0.05
  base:
    class_path: torch.optim.SGD
    init_args: {lr: 7.0, momentum: 0.7}
  plain_base:
    class_path: torch.optim.AdamW
    init_args: {weight_decay: 0.3}
  schedule: cosine
  warmup_steps: 2
  layer_multipliers: {head: 0.5}
"""


@pytest.mark.contract("H13", "H17")
def test_cli_takes_the_whole_recipe_from_yaml(run_yaml: Callable[..., pl.Trainer]) -> None:
    (optimizer,) = run_yaml(WithHyperparameters, RECIPE_YAML).optimizers
    body, head, plain = optimizer.param_groups
    assert [group["name"] for group in optimizer.param_groups] == ["rotating/body.0", "rotating/head", "plain"]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.05, 0.025, 0.01]
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0, 0]
    assert (body["momentum"], head["momentum"], plain["weight_decay"]) == (0.7, 0.7, 0.3)


ALPHA_YAML = """\
model:
  rate: auto
  layer_multipliers: 0.5
  schedule:
    class_path: torch.optim.lr_scheduler.StepLR
    init_args: {step_size: 1, gamma: 0.5}
"""


@pytest.mark.contract("H17")
def test_cli_takes_an_alpha_and_a_scheduler_of_torch_from_yaml(run_yaml: Callable[..., pl.Trainer]) -> None:
    (optimizer,) = run_yaml(WithHyperparameters, ALPHA_YAML).optimizers
    expected = {"rotating/body.0": 0.5**5 / 9, "rotating/head": 1 / 9, "plain": 0.1}
    assert rates(optimizer) == pytest.approx({name: rate * 0.5**8 for name, rate in expected.items()})


OPTIMIZER_YAML = """\
optimizer:
  class_path: pl_layer_rotation.Layca
  init_args:
    lr: 0.05
    base:
      class_path: torch.optim.SGD
      init_args: {momentum: 0.7}
"""


@pytest.mark.contract("H13", "H14")
def test_cli_takes_the_optimizer_by_class_path_and_the_momentum_of_its_base_arrives(
    run_yaml: Callable[..., pl.Trainer],
) -> None:
    (group,) = run_yaml(WithoutOptimizer, OPTIMIZER_YAML).optimizers[0].param_groups
    assert (group["lr"], group["momentum"], group["rotate"]) == (0.05, 0.7, True)


DICT_KWARGS_YAML = """\
optimizer:
  class_path: pl_layer_rotation.Layca
  init_args: {lr: 0.05}
  dict_kwargs: {momentum: 0.7}
"""


@pytest.mark.contract("H13")
def test_lightning_drops_dict_kwargs_as_the_docstring_warns(run_yaml: Callable[..., pl.Trainer]) -> None:
    (group,) = run_yaml(WithoutOptimizer, DICT_KWARGS_YAML).optimizers[0].param_groups
    assert group["momentum"] == 0
    assert "Lightning drops ``dict_kwargs`` of an optimizer without a word" in " ".join((Layca.__doc__ or "").split())


@pytest.mark.contract("H13")
def test_cli_refuses_options_of_the_base_on_the_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_cli(WithoutOptimizer, ["--optimizer=pl_layer_rotation.Layca", "--optimizer.momentum=0.7"])
    assert "momentum" in capsys.readouterr().err


@pytest.mark.contract("H14")
def test_cli_takes_optimizer_and_scheduler_on_the_command_line() -> None:
    scheduler = [
        "--lr_scheduler=torch.optim.lr_scheduler.StepLR",
        "--lr_scheduler.step_size=1",
        "--lr_scheduler.gamma=0.5",
    ]
    (optimizer,) = run_cli(
        WithoutOptimizer,
        ["--optimizer=pl_layer_rotation.Layca", "--optimizer.lr=0.1", "--optimizer.base=AdamW", *scheduler],
    ).optimizers
    assert optimizer.base_class is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


OURS = [
    "--optimizer=pl_layer_rotation.Layca",
    "--optimizer.lr=0.02",
    "--trainer.callbacks+=pl_layer_rotation.LayerRotationMonitor",
    "--trainer.callbacks.report=false",
]


def assert_it_is_ours(run: pl.Trainer) -> None:
    assert run.optimizers[0].param_groups[0]["lr"] == 0.02
    assert any(isinstance(callback, LayerRotationMonitor) for callback in run.callbacks)


@pytest.mark.contract("H14")
def test_cli_prints_a_config_that_it_reads_again(
    run_yaml: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run_cli(WithoutOptimizer, [*OURS, "--print_config"])
    assert_it_is_ours(run_yaml(WithoutOptimizer, capsys.readouterr().out))


@pytest.mark.contract("H14")
def test_cli_saves_a_config_that_it_reads_again(tmp_path: Path) -> None:
    saves = {"save_config_callback": SaveConfigCallback}
    run_cli(WithoutOptimizer, [*OURS, f"--trainer.default_root_dir={tmp_path}"], **saves)
    (config,) = tmp_path.rglob("config.yaml")
    assert_it_is_ours(run_cli(WithoutOptimizer, [f"--config={config}"]))


@pytest.mark.contract("H14")
@pytest.mark.parametrize(
    ("wanted", "options"),
    [("--optimizer.help=pl_layer_rotation.Layca", ["tangential", "base"]), ("--help", ["--optimizer", "--model.rate"])],
)
def test_cli_shows_help(wanted: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run_cli(WithHyperparameters, [wanted])
    text = capsys.readouterr().out
    assert all(option in text for option in options)


OTHER_NAMESPACE = """
import sys
import torch, lightning.pytorch as L
from lightning.pytorch.cli import LightningCLI
from pl_layer_rotation import LayerRotationMonitor, layca_optimizers
class Bare(L.LightningModule):
    def __init__(self, rate: float = 0.1):
        super().__init__()
        self.rate, self.layer = rate, torch.nn.Linear(4, 3)
    def training_step(self, batch, index): return self.layer(batch).square().mean()
    def train_dataloader(self): return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2)
class Net(Bare):
    def configure_optimizers(self): return layca_optimizers(self, lr=self.rate)
sys.argv = ["train.py"]
quiet = ["logger=false", "enable_checkpointing=false", "enable_progress_bar=false", "enable_model_summary=false"]
for module, *options in [
    (Net, "--model.rate=0.05"),
    (Bare, "--optimizer=pl_layer_rotation.Layca", "--optimizer.lr=0.05", "--optimizer.base=AdamW"),
]:
    cli = LightningCLI(module, save_config_callback=None, args=[
        "fit", "--seed_everything=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=1", *options,
        *(f"--trainer.{option}" for option in quiet),
        "--trainer.callbacks+=pl_layer_rotation.LayerRotationMonitor", "--trainer.callbacks.every_n_steps=1",
        "--trainer.callbacks.report=false",
    ])
    (monitor,) = [c for c in cli.trainer.callbacks if isinstance(c, LayerRotationMonitor)]
    print(module.__name__, monitor.history.steps, round(float(monitor.history.values("angular_update")[0, 0]), 5))
"""


@pytest.mark.contract("H14")
def test_the_cli_of_the_other_namespace_takes_monitor_and_optimizer_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OTHER_NAMESPACE], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["Bare [1, 2, 3, 4] 0.04996"], done.stderr
    assert "Net [1, 2, 3, 4] 0.04996" in done.stdout
