"""examples/tune.py finds a rate on a user's module as docs/tuning.md says."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("tune")
    for name in ("tune", "quickstart"):
        sys.modules.pop(name, None)


class Small(pl.LightningModule):
    """An MLP that notes the rates that it was made for, and how long each trained."""

    made: list["Small"]

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr, self.rates = lr, []
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        Small.made.append(self)

    def training_step(self, batch: Any) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders() -> tuple[DataLoader, DataLoader]:
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, validation = torch.utils.data.random_split(data, [1280, 517], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=517)


def trainer(callbacks: list[pl.Callback], epochs: int = 5) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_probes_then_two_whole_runs_and_the_better_one_is_kept(example: Any) -> None:
    Small.made = []
    tuned = example.tune(Small, trainer, *loaders(), lr=1e-4)
    *probes, first, second = Small.made
    assert {len(net.rates) for net in probes} == {10}
    assert sorted(tuned.straightness) == pytest.approx(sorted(net.lr for net in probes))
    # The schedule of the whole run, not of the probe.
    cosine = [0.5 * probes[0].lr * (1 + math.cos(math.pi * step / 100)) for step in range(10)]
    assert probes[0].rates == pytest.approx(cosine, rel=1e-6)
    valley = min(tuned.straightness, key=tuned.straightness.__getitem__)
    assert (first.lr, second.lr) == (pytest.approx(valley), pytest.approx(valley / 10))
    assert (len(first.rates), len(second.rates)) == (100, 100)
    assert list(tuned.scores) == [first.lr, second.lr]
    assert tuned.lr == tuned.module.lr == min(tuned.scores, key=tuned.scores.__getitem__)


def test_the_better_of_two_runs_is_the_larger_score_where_asked_for(example: Any) -> None:
    Small.made = []
    tuned = example.tune(Small, trainer, *loaders(), lr=1e-3, mode="max")
    assert tuned.lr == max(tuned.scores, key=tuned.scores.__getitem__)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("start", [1e-5, 1.0])
def test_on_the_quickstarts_network_it_ends_within_a_factor_3_of_the_ladders_best(example: Any, start: float) -> None:
    from quickstart import digits

    losses = example.ladder(trainer, [1e-4 * 10 ** (place / 3) for place in range(10)])
    tuned = example.tune(example.Net, trainer, *digits(), lr=start)
    best = min(losses, key=losses.__getitem__)
    assert 1 / 3 < tuned.lr / best < 3, (tuned, losses)
