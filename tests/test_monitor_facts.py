"""What the monitor notes about a training besides the curves: rates, momentum, length, layers before a norm."""

from typing import Any

import pytest
import torch
from contract.monitored import fit
from nets import Net
from torch import nn

from pl_layer_rotation import LayerRotationMonitor, layca_optimizers


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
