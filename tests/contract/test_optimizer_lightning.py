"""Contract O4, O23, O40 and O41: Layca in the hands of Lightning's Trainer and Fabric."""

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from contract.cases import angle, norm, same, snapshot
from lightning_fabric import Fabric
from nets import batches, trainer
from pytorch_lightning.callbacks import BackboneFinetuning
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from pl_layer_rotation import Layca, layca_optimizers

TURN = math.atan(0.05)


class Matrices(pl.LightningModule):
    """Two layers without biases: all of it rotates."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.options = options
        self.backbone = nn.Linear(7, 5, bias=False)
        self.head = nn.Linear(5, 3, bias=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.head(self.backbone(batch[0]).tanh()) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Layca([p for p in self.parameters() if p.requires_grad], lr=0.05, **self.options)


@pytest.mark.contract("O4")
def test_the_gradient_clipping_of_the_trainer_changes_nothing_over_sgd() -> None:
    clipped, whole = Matrices(), Matrices()
    before = snapshot(list(whole.parameters()))
    trainer(gradient_clip_val=1e-3).fit(clipped, batches(identical=True))
    trainer().fit(whole, batches(identical=True))
    for ours, theirs, start in zip(clipped.parameters(), whole.parameters(), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert angle(start, ours) > TURN


class Angles(pl.Callback):
    """By how much each layer with a gradient turned in each step, and what the optimizer's groups are called."""

    def __init__(self) -> None:
        self.turned: list[dict[str, float]] = []
        self.names: list[list[Any]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        weights = dict(pl_module.named_parameters())
        self.turned.append({name: angle(old, weights[name]) for name, old in self.before.items()})
        self.names.append([group.get("name") for group in trainer.optimizers[0].param_groups])


class WithBackbone(Matrices):
    def configure_optimizers(self) -> Any:
        return layca_optimizers(self, lr=0.05, **self.options)


@pytest.mark.contract("O23")
def test_a_backbone_that_lightning_unfreezes_turns_by_the_rate_of_its_group() -> None:
    seen = Angles()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02, lambda_func=lambda _: 1.0)
    trainer(finetuning, seen, max_epochs=2).fit(WithBackbone(base="Adam"), batches(4))
    assert [list(turned) for turned in seen.turned] == [["head.weight"]] * 4 + [["backbone.weight", "head.weight"]] * 4
    for turned in seen.turned:
        assert turned["head.weight"] == pytest.approx(TURN, rel=1e-4)
    assert [turned["backbone.weight"] for turned in seen.turned[4:]] == pytest.approx([math.atan(0.02)] * 4, rel=1e-4)
    assert seen.names[0] == ["rotating"]
    assert len(set(seen.names[-1])) == len(seen.names[-1]) == 2


@pytest.mark.contract("O40")
def test_with_the_gradient_scaler_of_lightning_overflows_are_skipped_and_other_steps_turn() -> None:
    seen = Angles()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    module = Matrices(base="AdamW", fused=True)
    run = trainer(seen, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], limit_train_batches=3)
    start = snapshot(list(module.parameters()))
    run.fit(module, batches())
    assert scaler.get_scale() == 2.0**117
    assert same(start, list(module.parameters()))
    scaler.update(2.0)
    run = trainer(seen, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], limit_train_batches=3)
    run.fit(module, batches())
    turned = [value for step in seen.turned[3:] for value in step.values()]
    assert turned == pytest.approx([TURN] * 6, rel=1e-5)


@pytest.mark.contract("O41")
def test_fabric_steps_with_closures_and_saves_the_state() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    module, optimizer = fabric.setup(net, Layca(net.parameters(), lr=0.05, base="Adam"))
    assert isinstance(optimizer, Layca)
    before, start = net.weight.detach().clone(), module(torch.ones(2, 4)).square().mean()
    own = set(vars(optimizer))
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = module(torch.ones(2, 4)).square().mean()
        fabric.backward(loss)
        return loss

    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == pytest.approx(start.item())
    assert angle(before, net.weight) == pytest.approx(TURN, rel=1e-5)
    assert optimizer.base_class is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert set(vars(optimizer)) == own
    state = optimizer.state_dict()
    assert float(state["state"][0]["initial_norm"]) == pytest.approx(norm(before), rel=1e-6)
    optimizer.load_state_dict(state)


class Manual(Matrices):
    """Steps by hand, through the wrapper that Lightning puts around optimizers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.losses: list[float] = []
        self.seen: set[Any] = set()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(optimizer, Layca)
        own = set(vars(optimizer))

        def closure() -> Tensor:
            loss = super(Manual, self).training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        if batch_idx % 2:
            self.losses.append(optimizer.step(closure).item())
        else:
            closure()
            optimizer.step()
        assert set(vars(optimizer)) == own
        self.seen.add((optimizer.base_class, optimizer.param_groups[0]["lr"], optimizer.defaults["tangential"]))


@pytest.mark.contract("O41")
def test_manual_optimization_steps_through_lightnings_wrapper() -> None:
    seen = Angles()
    module = Manual(base="AdamW")
    run = trainer(seen)
    run.fit(module, batches())
    assert run.global_step == 8
    assert [value for step in seen.turned for value in step.values()] == pytest.approx([TURN] * 16, rel=1e-5)
    assert len(module.losses) == 4
    assert all(loss > 0 for loss in module.losses)
    assert module.seen == {(torch.optim.AdamW, 0.05, True)}


@pytest.mark.contract("O41")
def test_several_optimizers_turn_their_own_layers() -> None:
    class Two(Manual):
        def configure_optimizers(self) -> Any:
            return [Layca(self.backbone.parameters(), lr=0.05), Layca(self.head.parameters(), lr=0.02, base="Adam")]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            first, second = self.optimizers()
            before = snapshot(list(self.parameters()))
            self.manual_backward(Matrices.training_step(self, batch, batch_idx))
            first.step()
            assert angle(before[0], self.backbone.weight) == pytest.approx(TURN, rel=1e-4)
            assert torch.equal(before[1], self.head.weight)
            second.step()
            assert angle(before[1], self.head.weight) == pytest.approx(math.atan(0.02), rel=1e-4)
            first.zero_grad()
            second.zero_grad()

    run = trainer()
    run.fit(Two(), batches(4))
    assert run.global_step == 8
