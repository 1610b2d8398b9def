"""Contract H: what Lightning, its callbacks and its Tuner make of layca_optimizers."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from contract.cases import angle
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer
from noted_rates import rates
from processes import launch
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from pl_layer_rotation import Layca, LayerRotationMonitor, layca_optimizers, layca_param_groups, select_layers

# --- what Lightning takes ---


@pytest.mark.contract("H1")
@pytest.mark.parametrize(
    ("options", "interval"),
    [
        ({}, None),
        ({"schedule": "constant"}, None),
        ({"warmup_steps": 2}, "step"),
        ({"schedule": "cosine"}, "step"),
        ({"schedule": "steps"}, "step"),
        ({"schedule": lambda o: OneCycleLR(o, max_lr=[0.05, 0.3], total_steps=9, cycle_momentum=False)}, "step"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_lightning_takes_the_result_without_a_word(options: dict[str, Any], interval: str | None) -> None:
    run = trainer()
    run.fit(Net(lambda m: layca_optimizers(m, **options)), batches())  # warnings are errors here
    assert isinstance(run.optimizers[0], Layca)
    assert [config.interval for config in run.lr_scheduler_configs] == ([interval] if interval else [])


@pytest.mark.contract("H1")
def test_a_plateau_needs_a_metric_to_monitor_and_works_once_it_has_one() -> None:
    def configure(module: Net) -> Any:
        return layca_optimizers(module, lr=0.0, schedule=lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5))

    def with_monitor(module: Net) -> Any:
        configuration = configure(module)
        configuration["lr_scheduler"].update({"monitor": "val_loss", "interval": "epoch"})
        configuration["optimizer"].param_groups[1]["lr"] = 1e-12
        return configuration

    with pytest.raises(MisconfigurationException, match="must include a monitor when a `ReduceLROnPlateau`"):
        trainer().fit(Net(configure), batches())
    run = trainer(max_epochs=3)
    run.fit(Net(with_monitor), batches(), batches())
    assert rates(run.optimizers[0])["plain"] == pytest.approx(1e-12 * 0.25, rel=1e-6)


@pytest.mark.contract("H2")
def test_loggers_refuse_two_groups_of_one_name_and_ours_never_share_one(tmp_path: Path) -> None:
    for options in ({}, {"layer_multipliers": 0.5}, {"leading_dims": {"head": 1}}):
        run = trainer(LearningRateMonitor(), logger=CSVLogger(tmp_path), max_steps=1)
        run.fit(Net(lambda m, options=options: layca_optimizers(m, **options)), batches())
        names = [group["name"] for group in run.optimizers[0].param_groups]
        assert {f"lr-Layca/{name}" for name in names} <= set(run.callback_metrics)
        assert len(set(names)) == len(names)


# --- the automatic rate on several devices ---


def first_rates(rank: int, world: int) -> dict[str, float]:
    """The rates of the first step of a training of 500 epochs of 8 batches, of which each process takes its part."""
    found: list[dict[str, float]] = []

    class Stop(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            found.append(rates(optimizer))
            trainer.should_stop = True

    run = trainer(Stop(), max_epochs=500, devices=world, strategy="ddp" if world > 1 else "auto")
    run.fit(Net(lambda m: layca_optimizers(m, lr="auto")), batches())
    return found[0]


@pytest.mark.contract("H6")
def test_the_automatic_rate_counts_the_steps_that_several_devices_leave() -> None:
    alone, both = first_rates(0, 1), launch(first_rates, 2)
    assert alone["rotating"] == pytest.approx((1000 / 4000) ** (1 / 3) / 9)
    assert [one["rotating"] for one in both] == pytest.approx([(1000 / 2000) ** (1 / 3) / 9] * 2)


# --- frozen parameters ---


class WithBackbone(Net):
    """Lightning's BackboneFinetuning looks for a `backbone`."""

    def __init__(self, make_optimizer: Any = None) -> None:
        super().__init__(make_optimizer)
        self.backbone = nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.backbone(inputs))


@pytest.mark.contract("H3")
@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_a_callback_that_unfreezes_adds_a_group_whose_layers_rotate(schedule: Any) -> None:
    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.turned: list[tuple[float, float]] = []

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            self.rate = optimizer.param_groups[-1]["lr"]
            self.before = pl_module.backbone[0].weight.detach().clone()

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            self.turned.append((angle(self.before, pl_module.backbone[0].weight), math.atan(self.rate)))

    watch = Watch()
    run = trainer(BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01), watch, max_epochs=2)
    run.fit(WithBackbone(lambda m: layca_optimizers(m, lr=0.05, schedule=schedule)), batches())
    assert [group["name"] for group in run.optimizers[0].param_groups] == ["rotating", "plain", "group2"]
    assert [found for found, _ in watch.turned[:8]] == [0] * 8
    assert [found for found, _ in watch.turned[8:]] == pytest.approx([turn for _, turn in watch.turned[8:]], rel=1e-4)
    assert watch.turned[8][1] == math.atan(0.01)


@pytest.mark.contract("H3")
def test_what_is_unfrozen_by_hand_stays_out_of_the_optimizer_until_it_is_added_by_hand() -> None:
    def configure(module: WithBackbone) -> Any:
        module.backbone.requires_grad_(False)
        configuration = layca_optimizers(module, lr=0.05)
        module.backbone.requires_grad_(True)
        return configuration

    def configure_and_add(module: WithBackbone) -> Any:
        configuration = configure(module)
        configuration["optimizer"].add_param_group({"params": [module.backbone[0].weight], "lr": 0.01})
        return configuration

    turned = []
    for make in (configure, configure_and_add):
        module = WithBackbone(make)
        before = module.backbone[0].weight.detach().clone()
        trainer(max_steps=1).fit(module, batches())
        turned.append(angle(before, module.backbone[0].weight))
    assert turned == pytest.approx([0, math.atan(0.01)], rel=1e-4)


# --- callbacks that know one rate ---


class Searched(Net):
    """A module whose rate the Tuner searches; notes the rates of all its steps."""

    def __init__(self, lr: Any = "auto") -> None:
        super().__init__(lambda module: layca_optimizers(module, lr=module.lr, plain_lr=0.2))
        self.lr = lr
        self.seen: list[dict[str, float]] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(rates(optimizer))


@pytest.mark.contract("H5", "H15")
def test_the_tuner_searches_with_one_rate_for_all_groups_and_sets_the_attribute_alone(tmp_path: Path) -> None:
    module, data = Searched(), batches(40)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer(default_root_dir=tmp_path)
    found = Tuner(run).lr_find(module, data, min_lr=1e-4, max_lr=0.1, num_training=40)
    assert found is not None
    assert all(step["rotating"] == step["plain"] for step in module.seen[1:])
    assert module.lr == found.suggestion()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.seen.clear()
    run.fit(module, data)
    assert module.seen[0] == {"rotating": module.lr, "plain": 0.2}
    assert run.optimizers[0].state[module.head.weight]["initial_norm"].item() == pytest.approx(
        before["head.weight"].norm().item()
    )


@pytest.mark.contract("H5")
def test_the_callback_that_searches_leaves_one_rate_in_all_groups(tmp_path: Path) -> None:
    finder = LearningRateFinder(min_lr=1e-4, max_lr=0.1, num_training_steps=40)
    module = Searched(0.02)
    trainer(finder, default_root_dir=tmp_path).fit(module, batches(40))
    assert module.seen[-1] == {"rotating": module.lr, "plain": module.lr}


@pytest.mark.contract("H5")
@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.3, {"rotating": 0.3, "plain": 0.3}), ([0.01, 0.3], {"rotating": 0.01, "plain": 0.3})],
    ids=["one rate", "a rate by group"],
)
def test_weight_averaging_sets_the_rate_that_it_is_given_by_group(rate: Any, expected: dict[str, float]) -> None:
    averaging = StochasticWeightAveraging(swa_lrs=rate, swa_epoch_start=1, annealing_epochs=1)
    run = trainer(averaging, max_epochs=4)
    run.fit(Net(lambda m: layca_optimizers(m, lr=0.02)), batches())
    assert rates(run.optimizers[0]) == pytest.approx(expected)


# --- several optimizers, several calls, any module ---


@pytest.mark.contract("H15")
def test_a_second_training_starts_an_optimizer_of_its_own() -> None:
    module = Net(lambda m: layca_optimizers(m, base="AdamW", schedule="cosine"))
    optimizers = []
    for _ in range(2):
        run = trainer(max_steps=2)
        run.fit(module, batches())
        optimizers.append(run.optimizers[0])
    first, second = optimizers
    assert second.state[module.head.weight]["step"] == 2
    assert first.state[module.head.weight] is not second.state[module.head.weight]
    assert not {id(group) for group in first.param_groups} & {id(group) for group in second.param_groups}


@pytest.mark.contract("H10")
def test_bare_tables_are_layers_that_rotate_and_exclude_leaves_them_out() -> None:
    module = nn.Module()
    module.cls_token = nn.Parameter(torch.ones(1, 1, 6))
    module.head = nn.Linear(6, 3)
    assert list(select_layers(module)) == ["cls_token", "head"]
    rotating, plain = layca_optimizers(module, exclude="cls_token")["optimizer"].param_groups
    assert [id(p) for p in rotating["params"]] == [id(module.head.weight)]
    assert id(module.cls_token) in [id(p) for p in plain["params"]]


@pytest.mark.contract("H16")
def test_a_plain_module_trains_in_a_plain_loop() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = layca_optimizers(module, lr=0.05)["optimizer"]
    before = [module[i].weight.detach().clone() for i in (0, 2)]
    module(torch.ones(5, 4)).square().sum().backward()
    optimizer.step()
    assert [angle(b, module[i].weight) for b, i in zip(before, (0, 2), strict=True)] == pytest.approx(
        [math.atan(0.05)] * 2, rel=1e-5
    )


class Gan(pl.LightningModule):
    """Two networks that train against each other; each step steps both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(7, 3), nn.Linear(3, 2)

    def configure_optimizers(self) -> Any:
        return [layca_optimizers(self.generator, lr=0.02), layca_optimizers(self.critic, lr=0.03, base="AdamW")]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            self.manual_backward(sign * self.critic(self.generator(batch[0])).square().mean())
            optimizer.step()
            for parameter in self.parameters():
                parameter.grad = None


@pytest.mark.contract("H16")
def test_two_networks_have_optimizers_of_their_own() -> None:
    monitor, module = LayerRotationMonitor(report=False), Gan()
    run = trainer(monitor)
    run.fit(module, batches())
    owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in run.optimizers]
    assert owned == [{id(p) for p in part.parameters()} for part in (module.generator, module.critic)]
    expected = torch.tensor([math.atan(0.02), math.atan(0.03)], dtype=torch.float64).expand(8, 2)
    torch.testing.assert_close(monitor.history.values("angular_update"), expected, rtol=1e-3, atol=0.0)


@pytest.mark.contract("H16")
def test_disjoint_patterns_rotate_disjoint_layers() -> None:
    module = Gan()
    rotating = [layca_param_groups(module, include=name)[0]["params"] for name in ("generator", "critic")]
    assert [[id(p) for p in group] for group in rotating] == [[id(module.generator.weight)], [id(module.critic.weight)]]


# --- checkpoints ---


@pytest.mark.contract("H17")
@pytest.mark.parametrize(
    "schedule",
    ["cosine", lambda o: LambdaLR(o, lambda step: 0.5**step), lambda o: LambdaLR(o, [lambda step: 1.0] * 2)],
    ids=["ours", "a lambda", "a list of lambdas"],
)
def test_no_function_gets_into_the_checkpoint(tmp_path: Path, schedule: Any) -> None:
    run = trainer()
    make = lambda m: layca_optimizers(m, base=lambda p: torch.optim.SGD(p), schedule=schedule)  # noqa: E731
    run.fit(Net(make), batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert len(saved["lr_schedulers"]) == 1
    trainer(max_epochs=2).fit(Net(make), batches(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
