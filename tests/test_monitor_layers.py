"""The monitor on layers that start at zero, are frozen, lazy, late or oddly named, and where there are none."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from contract.monitored import distance, fit
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from traces import SavedWeights, by_hand, read_csv

from pl_layer_rotation import LayerRotationMonitor, RotationHistory
from pl_layer_rotation._log_keys import log_keys


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
    monitor, saved = LayerRotationMonitor(report=False), SavedWeights()
    fit(monitor, saved, module=module)
    body, _ = by_hand(saved.snapshots)["rotation"][-1]
    assert body > 1e-3
    assert monitor.history.final() == {"body.0": pytest.approx(body, rel=1e-4), "head": 0.0}
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
    *_, row = read_csv(tmp_path)
    logged = {key: float(value) for key, value in row.items() if key.startswith("layer_rotation/")}
    final = list(monitor.history.final().values())
    assert [logged[key] for key in log_keys(monitor.history.layer_names, "rotation")] == pytest.approx(final)
    assert (len(logged), len(set(final))) == (6, 3)  # four of the layers take no part
    assert RotationHistory.load(next(tmp_path.rglob("*.jsonl"))).layer_names == monitor.history.layer_names
