"""Contract C21 to C29: the monitor on models that change, in every precision, and beside Lightning's own callbacks."""

import warnings
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from contract.monitored import STATISTICS, Memory, Weights, assert_true, by_hand, distance, fit, ours, quiet
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
)
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils import prune

from pl_layer_rotation import LayerRotationMonitor

NAMES = ["body.0", "head"]


def curve(monitor: LayerRotationMonitor, name: str, quantity: str = "rotation") -> Tensor:
    return monitor.history.values(quantity)[:, monitor.history.layer_names.index(name)]


class ThawsAt(pl.Callback):
    """Freezes the head from the start, and thaws it before the batch of this number."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.head.requires_grad_(False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if args[-1] == self.batch:
            pl_module.head.requires_grad_(True)


@pytest.mark.contract("C21")
@pytest.mark.parametrize("batch", [None, 4])
def test_frozen_layers_are_at_zero_and_measured_from_the_start_once_thawed(batch: int | None) -> None:
    monitor, saved = quiet(), Weights()
    fit(monitor, saved, ThawsAt(batch))
    assert monitor.history.layer_names == NAMES
    assert curve(monitor, "head").eq(0).tolist() == [step <= (8 if batch is None else batch) for step in range(1, 9)]
    assert_true(monitor.history, saved)


@pytest.mark.contract("C21", "C24")
def test_a_backbone_is_measured_from_the_start_also_while_lightning_freezes_it() -> None:
    class WithBackbone(Net):
        @property
        def backbone(self) -> nn.Module:
            return self.body

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    monitor, saved = quiet(), Weights()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05, lambda_func=lambda _: 1.0)
    fit(finetuning, monitor, saved, module=WithBackbone(), max_epochs=2)
    assert curve(monitor, "body.0").gt(0).tolist() == [False] * 8 + [True] * 8
    assert_true(monitor.history, saved)


class Changes(Net):
    """Replaces or removes a layer before a batch of the second epoch."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.middle, self.change = nn.Linear(6, 6), change

    def forward(self, inputs: Tensor) -> Tensor:
        middle = getattr(self, "middle", None)
        return self.head(self.body(inputs) if middle is None else middle(self.body(inputs)))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 1 and batch_idx == 3:
            self.change(self)


def grow(module: nn.Module) -> None:
    """Another number of units in the middle; new parameters, which the optimizer gets."""
    module.middle = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))
    module.optimizers().add_param_group({"params": list(module.middle.parameters())})


def resize(module: nn.Module) -> None:
    module.body[0], module.middle = nn.Linear(7, 9), nn.Linear(9, 6)
    module.body[1] = nn.LayerNorm(9)
    module.optimizers().add_param_group({"params": [*module.middle.parameters(), *module.body.parameters()]})


def remove(module: nn.Module) -> None:
    del module.middle


@pytest.mark.contract("C22")
@pytest.mark.parametrize(("change", "new"), [(grow, ["middle.0", "middle.1"]), (remove, [])], ids=["grow", "remove"])
def test_layers_that_come_and_go_in_training_have_curves_of_their_own(change: Any, new: list[str]) -> None:
    monitor, saved = quiet(), Weights()
    run = fit(monitor, saved, module=Changes(change), max_epochs=2)
    assert run.state.finished
    assert set(monitor.history.layer_names) == {*NAMES, "middle", *new}
    assert curve(monitor, "middle").isnan().tolist() == [False] * 11 + [True] * 5
    for name in new:
        assert curve(monitor, name).isnan().tolist() == [True] * 11 + [False] * 5
    expected = by_hand(saved, NAMES, monitor.history.steps)["rotation"]
    for name, values in zip(NAMES, expected.T, strict=True):
        np.testing.assert_allclose(curve(monitor, name).numpy(), values, rtol=1e-6, atol=1e-13)


class FirstSight(pl.Callback):
    """The weights of the middle right before the first step that could change them."""

    def __init__(self) -> None:
        self.weights: dict[str, np.ndarray] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        for name, layer in pl_module.middle.named_children():
            self.weights.setdefault(name, layer.weight.detach().double().flatten().numpy().copy())


@pytest.mark.contract("C22")
def test_a_layer_that_came_later_is_measured_from_before_its_first_step() -> None:
    monitor, seen, module = quiet(), FirstSight(), Changes(grow)
    fit(monitor, seen, module=module, max_epochs=2)
    assert seen.weights.keys() == {"0", "1"}
    for name, start in seen.weights.items():
        expected = distance(module.middle[int(name)].weight.detach().double().flatten().numpy(), start)
        assert float(curve(monitor, f"middle.{name}")[-1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.contract("C22")
def test_pruning_changes_neither_the_name_nor_the_curve_of_a_layer() -> None:
    """torch then keeps the weights as `weight_orig`; what it puts in their place is no parameter."""
    monitor, saved = quiet(), Weights()
    fit(monitor, saved, module=Changes(lambda module: prune.identity(module.middle, "weight")), max_epochs=2)
    assert_true(monitor.history, saved)


@pytest.mark.contract("C22")
def test_a_layer_that_changes_its_shape_starts_again() -> None:
    monitor, module = quiet(), Changes(resize)
    run = fit(monitor, module=module, max_epochs=2)
    assert run.state.finished
    assert dict(zip(monitor.history.layer_names, monitor.history.layer_shapes, strict=True)) == {
        "body.0": (9, 7),
        "head": (3, 6),
        "middle": (6, 9),
    }
    for name in ("body.0", "middle"):
        values = curve(monitor, name)
        assert not values.isnan().any()
        assert values[11] < values[10]
        assert values[11] < values[15]


class MadeLate(Net):
    """Gets its layers in `configure_model`, on the meta device before that where asked."""

    def __init__(self, meta: bool) -> None:
        super().__init__()
        self.meta = meta
        if meta:
            self.to("meta")
        else:
            del self.body, self.head

    def configure_model(self) -> None:
        if self.meta:
            self.to_empty(device="cpu")
            torch.manual_seed(3)
            for part in (self.body[0], self.body[1], self.head):
                part.reset_parameters()
        elif not hasattr(self, "head"):
            other = Net()
            self.body, self.head = other.body, other.head


@pytest.mark.contract("C23")
@pytest.mark.parametrize("meta", [True, False], ids=["meta", "configure_model"])
def test_layers_are_measured_from_the_first_moment_that_they_have_weights(meta: bool) -> None:
    monitor, saved = quiet(), Weights()
    fit(monitor, saved, module=MadeLate(meta))
    assert monitor.history.layer_names == NAMES
    assert_true(monitor.history, saved)


AVERAGING: dict[str, Any] = {
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1),
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
}


@pytest.mark.contract("C24", "C25")
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("first", [True, False], ids=["averaging first", "monitor first"])
@pytest.mark.parametrize("kind", AVERAGING)
def test_averaged_weights_are_never_measured(kind: str, first: bool) -> None:
    monitor, saved, module = quiet(every_n_steps=2), Weights(), Net()
    callbacks = [monitor, AVERAGING[kind]()][:: -1 if first else 1]
    run = trainer(*callbacks, saved, max_epochs=4, val_check_interval=3)
    run.fit(module, batches(), batches())
    left = module.head.weight.detach().double().flatten().numpy()
    assert not np.allclose(left, saved.at[32]["head"], rtol=1e-3)
    assert monitor.history.steps == list(range(2, 33, 2))
    assert_true(monitor.history, saved)
    largest = by_hand(saved, NAMES, [32])["rotation"].max()
    assert float(run.callback_metrics["layer_rotation_stats/max"]) == pytest.approx(largest, rel=1e-6)


@pytest.mark.contract("C22", "C24")
@pytest.mark.parametrize("first", [True, False], ids=["pruning first", "monitor first"])
def test_pruning_by_lightning_trains_as_without_the_monitor_and_is_measured(first: bool) -> None:
    def weights(*others: pl.Callback) -> list[Tensor]:
        module = Net()
        pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(module.head, "weight")], amount=0.5)
        fit(*[pruning, *others][:: 1 if first else -1], module=module, max_epochs=3)
        return list(module.parameters())

    monitor, saved = quiet(), Weights()
    assert all(map(torch.equal, weights(monitor, saved), weights()))
    # Between two epochs pruning changes weights too: the angle of a step is without that.
    assert_true(monitor.history, saved, leave_out="angular_update")


PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    "32-true": ({"precision": "32-true"}, 1e-6),
    "64-true": ({"precision": "64-true"}, 1e-12),
    "bf16-true": ({"precision": "bf16-true"}, 1e-6),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 1e-6),
    "16-mixed": ({}, 1e-6),
}


@pytest.mark.contract("C26")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_hold_in_every_precision(precision: str) -> None:
    options, rtol = PRECISIONS[precision]
    if precision == "16-mixed":
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=64.0))]}
    monitor, saved = quiet(), Weights()
    run = fit(monitor, saved, **options)
    assert monitor.history.facts["precision"] == precision == run.precision
    assert_true(monitor.history, saved, rtol=rtol)


@pytest.mark.contract("C26")
@pytest.mark.parametrize(("part", "backend"), [("module", "eager"), ("submodule", "aot_eager")])
def test_compiled_modules_have_the_names_and_values_of_others(part: str, backend: str) -> None:
    monitor, saved, module = quiet(), Weights(), Net()
    if part == "submodule":
        module.body[0] = torch.compile(module.body[0], backend=backend)
    fit(monitor, saved, module=torch.compile(module, backend=backend) if part == "module" else module)
    assert monitor.history.layer_names == NAMES
    assert_true(monitor.history, saved)


class Untouched(pl.Callback):
    """Stands before the monitor and, as its twin, after it: what a hook of the monitor finds, it leaves."""

    def __init__(self, first: "Untouched | None" = None) -> None:
        self.first, self.seen = first, None
        self.compared: set[str] = set()

    def look(self, hook: str, module: nn.Module) -> None:
        parameters = list(module.parameters())
        self.seen = {
            "weights": [parameter.detach().clone() for parameter in parameters],
            "gradients": [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters],
            "versions": [parameter._version for parameter in parameters],
            "requires_grad": [parameter.requires_grad for parameter in parameters],
            "modes": [part.training for part in module.modules()],
            "random": [torch.get_rng_state()],
        }
        if self.first is not None:
            self.compared.add(hook)
            for what, now in self.seen.items():
                for value, before in zip(now, self.first.seen[what], strict=True):
                    same = torch.equal(value, before) if isinstance(value, Tensor) else value == before
                    assert same, f"{hook} changed {what}"


HOOKS = (
    "on_train_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_train_epoch_end",
)
for _hook in HOOKS:
    setattr(Untouched, _hook, lambda self, trainer, module, *args, hook=_hook: self.look(hook, module))


@pytest.mark.contract("C26")
def test_no_hook_touches_weights_gradients_modes_or_the_random_state() -> None:
    before = Untouched()
    after = Untouched(before)
    run = trainer(before, quiet(), after, num_sanity_val_steps=0, max_epochs=2)
    run.fit(Net(), batches(), batches())
    assert after.compared == set(HOOKS)


class GrowsInValidation(Net):
    """A layer appears between a step and a validation, where everything that is made is an inference tensor."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.late = nn.Linear(3, 3)
            self.optimizers().add_param_group({"params": list(self.late.parameters())})

    def forward(self, inputs: Tensor) -> Tensor:
        return self.late(super().forward(inputs)) if hasattr(self, "late") else super().forward(inputs)


@pytest.mark.contract("C27")
def test_what_is_kept_in_a_validation_is_no_inference_tensor() -> None:
    monitor = quiet(every_n_steps=3)
    run = trainer(monitor, val_check_interval=4, num_sanity_val_steps=0)
    run.fit(GrowsInValidation(), batches(), batches())
    assert run.state.finished
    assert monitor.history.layer_names == [*NAMES, "late"]
    assert curve(monitor, "late").gt(0).tolist() == [False, True, True]
    assert not any(weight.is_inference() for weight in monitor.state_dict()["reference"].values())


class Deep(pl.LightningModule):
    """Ten thousand layers, each drawn in a direction of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(10_000))
        self.directions = torch.randn(10_000, 2, 2)

    def whole(self) -> Tensor:
        return torch.stack([layer.weight for layer in self.layers])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.whole() * self.directions).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.contract("C29")
def test_ten_thousand_layers_are_measured_and_loggers_get_aggregates_only() -> None:
    memory, module, monitor = Memory(), Deep(), quiet()
    start = module.whole().detach().double().flatten(1)
    fit(monitor, module=module, logger=memory, data=batches(1))
    now = module.whole().detach().double().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(now, start)
    torch.testing.assert_close(monitor.history.values("rotation")[0], 1 - cosine, rtol=1e-4, atol=1e-9)
    stats = {f"layer_rotation_stats/{name}" for name in STATISTICS}
    assert set(ours(memory.keys())) == {*stats, "layer_straightness_stats/median"}


@pytest.mark.contract("C29")
def test_a_module_without_layers_is_one_warning() -> None:
    class NoLayers(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.LayerNorm(7), nn.Identity()

        def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
            return self(batch[0]).square().mean()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(LayerRotationMonitor(), module=NoLayers(), max_epochs=2)
    texts = [str(warning.message) for warning in caught if "LayerRotationMonitor" in str(warning.message)]
    why = "none of its parameters is selected (two or more dimensions, no normalization, no embedding)"
    assert texts == [f"LayerRotationMonitor: NoLayers has no layers to measure: {why}."]
    assert run.state.finished
    assert ours(run.callback_metrics) == []
