"""The examples do what their docstrings say: run as users run them, for an epoch."""

import argparse
import importlib.util
import logging
import math
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from processes import launch

from pl_layer_rotation import Layca, LayerRotationMonitor, RotationHistory

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports an example by its file's name, gone again after the test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield load
    for name in [name for name, module in sys.modules.items() if is_example(module)]:
        del sys.modules[name]


def is_example(module: ModuleType) -> bool:
    return Path(getattr(module, "__file__", None) or "/").parent == EXAMPLES


def run(*command: str, cwd: Path, timeout: int = 100) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fit_cli(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def fit(config: str, *arguments: str) -> pl.Trainer:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["cli.py"])
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        return (
            example("cli")
            .main(["fit", f"--config={EXAMPLES / config}", "--trainer.max_epochs=1", *quiet, *arguments])
            .trainer
        )

    return fit


def angles(trainer: pl.Trainer) -> torch.Tensor:
    """Angular updates in the steps 5, 10, 15 and 20; the reading after the last step, 21, has none."""
    (monitor,) = [callback for callback in trainer.callbacks if isinstance(callback, LayerRotationMonitor)]
    assert monitor.history.layer_names == ["fc1", "fc2", "fc3"]
    assert monitor.history.steps == [5, 10, 15, 20, 21]
    return monitor.history.values("angular_update")[:4]


def test_cli_with_the_optimizer_in_the_yaml(fit_cli: Any, tmp_path: Path) -> None:
    trainer = fit_cli("cli.yaml")
    (optimizer,) = trainer.optimizers
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, Layca)
    assert (optimizer.base_class, group["momentum"]) == (torch.optim.SGD, 0.9)
    assert all("momentum_buffer" in state for state in optimizer.state.values())
    torch.testing.assert_close(angles(trainer), torch.full((4, 3), math.atan(0.037)).double(), rtol=1e-5, atol=0.0)
    assert group["lr"] == pytest.approx(0.037 * 0.5 * (1 + math.cos(math.pi / 20)))  # one epoch of twenty is over
    assert (tmp_path / "lightning_logs" / "version_0" / "layer_rotation.html").is_file()


def test_cli_with_layca_optimizers_in_the_module(fit_cli: Any) -> None:
    trainer = fit_cli("cli_module.yaml", "--model.init_args.rate=0.1")
    rotating, plain = trainer.optimizers[0].param_groups
    assert (rotating["name"], rotating["momentum"], plain["name"], plain["momentum"]) == ("rotating", 0.9, "plain", 0.9)
    rates = [0.05 * (1 + math.cos(math.pi * (step - 1) / 21)) for step in (5, 10, 15, 20)]
    expected = torch.tensor(rates, dtype=torch.float64).atan()[:, None].expand(-1, 3)
    torch.testing.assert_close(angles(trainer), expected, rtol=1e-4, atol=0.0)


def test_cli_as_its_docstring_says(tmp_path: Path) -> None:
    output = run(
        str(EXAMPLES / "cli.py"), "fit", f"--config={EXAMPLES / 'cli.yaml'}", "--trainer.max_epochs=1", cwd=tmp_path
    )
    assert "Layer rotation after 21 steps" in output


def test_any_optimizer_turns_all_layers_by_the_same_angle_under_every_base(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("any_optimizer")
    monkeypatch.setattr("sys.argv", ["any_optimizer.py", "--max-epochs=1"])
    # The level would outlive the test.
    monkeypatch.setattr(logging.getLogger("pytorch_lightning"), "setLevel", lambda level: None)
    module.main()
    output = capsys.readouterr().out
    for base in ("AdamW", "Muon", "Lion"):
        if module.missing(base):
            assert f"Skipped: Layca over {base}." in output
        else:
            assert re.search(rf"^{base} .* 0\.0370 to 0\.0370 ", output, re.MULTILINE), output


def test_any_optimizer_says_what_to_install(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("any_optimizer")
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert module.missing("AdamW") is None
    assert "`uv pip install 'torch>=2.9'`" in module.missing("Muon")
    assert "`uv pip install pytorch-optimizer`" in module.missing("Lion")


def call_main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run an example in this process."""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *arguments])
    # Levels and filters would outlive the test.
    monkeypatch.setattr(logging.getLogger("pytorch_lightning"), "setLevel", lambda level: None)
    with warnings.catch_warnings():
        module.main()


GPT_SIZE = ["--accelerator=cpu", "--max-steps=12", "--batch-size=4", "--context=16", "--width=16", "--depth=1"]


@pytest.mark.parametrize("optimizer", ["layca", "adamw"])
def test_gpt_learns_a_text_file(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ab" * 500, encoding="utf-8")
    arguments = [f"--data={text}", f"--output={tmp_path}", f"--optimizer={optimizer}", "--lr=0.05", "--heads=2"]
    call_main(example("gpt"), monkeypatch, *GPT_SIZE, *arguments)
    history = RotationHistory.load(tmp_path / "layer_rotation.jsonl")
    assert history.layer_names[:2] == ["blocks.0.query", "blocks.0.key"]
    assert history.facts["metrics"]["val_loss"] < math.log(256) / 2  # untrained it is log(256)
    assert f"Validation loss: {history.facts['metrics']['val_loss']:.3f}" in capsys.readouterr().out
    assert (tmp_path / "layer_rotation.html").is_file()


def test_gpt_reads_the_standard_library_by_default(example: Any) -> None:
    text = bytes(example("gpt").read_text(None).tolist())
    assert len(text) > 10**6
    assert text.startswith(Path(sysconfig.get_paths()["stdlib"], "__future__.py").read_bytes())


def test_gpt_refuses_a_batch_that_cannot_be_divided(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call_main(example("gpt"), monkeypatch, "--batch-size=16", "--devices=3")
    assert "--batch-size 16 must be a multiple of the 3 processes" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:LayerRotationMonitor. `reference` has no weights for 'head':UserWarning")
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_finetuning_is_measured_from_the_pretrained_weights(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = example("finetune")
    arguments = argparse.Namespace(max_epochs=2, seed=1, output=tmp_path)
    path = module.pretrain(arguments)
    pretrained = torch.load(path, weights_only=True)["state_dict"]
    frozen, _ = module.finetune("frozen at first", path, arguments)
    rotation = frozen.values("rotation")
    assert rotation.shape == (len(frozen.steps), 4)
    assert rotation[0, :3].tolist() == [0, 0, 0]  # in step 5 of 8 of the first epoch the backbone is frozen
    assert rotation[0, 3] > 0
    assert (rotation[-1] > 0).all()
    assert set(pretrained) > {f"{name}.weight" for name in frozen.layer_names}


def test_early_stopping_ends_low_rates_and_lets_a_good_one_finish(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call_main(example("early_stopping"), monkeypatch, "--lr=1e-4", "--max-epochs=10", f"--output={tmp_path}")
    rows = dict(re.findall(r"^lr (\S+) +(\d+) ", capsys.readouterr().out, re.MULTILINE))
    *stopped, last = rows.values()
    assert set(map(int, stopped)) <= {2, 4, 6, 8}
    assert (next(iter(rows)), int(last)) == ("0.0001", 10)
    assert len(list(tmp_path.glob("lr-*/epoch-*-accuracy-0.*-rotation-*.ckpt"))) == len(rows)


def test_ray_train_says_what_to_install(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    with pytest.raises(SystemExit, match=r"needs Ray .*`uv run --no-dev --extra examples --group ray examples"):
        example("ray_train")


def fit_with_ddp(rank: int, folder: str) -> dict[str, Any]:
    """What two of Ray's workers do, in two processes without Ray."""
    sys.path.insert(0, str(EXAMPLES))
    module = importlib.import_module("ray_train")
    module.pl.seed_everything(1, verbose=False)
    monitor = LayerRotationMonitor(report=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": "ddp", "log_every_n_steps": 5}
    module.pl.Trainer(callbacks=[monitor], default_root_dir=folder, **options, **quiet).fit(
        module.Net(), *module.digits(32)
    )
    return {"steps": monitor.history.steps, "rotation": monitor.history.values("rotation").tolist()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_train_gives_the_curves_of_ddp(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output = run(str(EXAMPLES / "ray_train.py"), "--max-epochs=1", f"--output={tmp_path}", cwd=tmp_path, timeout=600)
    history = RotationHistory.load(tmp_path / "layer_rotation.jsonl")
    first, second = launch(fit_with_ddp, str(tmp_path))
    assert first == second == {"steps": history.steps, "rotation": history.values("rotation").tolist()}
    assert f"layer_rotation_stats/mean: {history.values('rotation')[-1].mean():.3f}" in output
    assert (tmp_path / "layer_rotation.html").is_file()
