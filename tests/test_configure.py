"""layca_optimizers in real trainings: groups, rates, schedules and bases."""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from contract.cases import angle, give_gradients, needs_muon, snapshot
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger

from pl_layer_rotation import Layca, LayerRotationMonitor, layca_optimizers


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def adamw_of_ones_own(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=7.0, weight_decay=0.3)


@pytest.mark.parametrize(
    ("base", "plain_base", "plain"),
    [
        (torch.optim.SGD, None, 0.1),
        ("SGD", None, 0.1),
        (torch.optim.AdamW, None, 0.01),
        ("RMSprop", None, 0.01),
        (torch.optim.Adagrad, None, 0.01),
        (functools.partial(torch.optim.SGD, momentum=0.9), None, 0.1),
        ("SGD", "AdamW", 0.01),
        ("AdamW", torch.optim.SGD, 0.1),
        ("SGD", adamw_of_ones_own, 0.01),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)).partition("(")[0],
)
def test_plain_tensors_get_the_rate_that_suits_what_steps_them(base: Any, plain_base: Any, plain: float) -> None:
    optimizer = layca_optimizers(Net(), lr=0.02, base=base, plain_base=plain_base)["optimizer"]
    assert isinstance(optimizer, Layca)
    assert rates(optimizer) == {"rotating": 0.02, "plain": plain}
    given = layca_optimizers(Net(), lr=0.02, base=base, plain_base=plain_base, plain_lr=0.5)["optimizer"]
    assert rates(given) == {"rotating": 0.02, "plain": 0.5}


def test_the_plain_base_keeps_its_options_and_rotating_groups_have_no_decay() -> None:
    made = layca_optimizers(Net(), base="AdamW", plain_base=adamw_of_ones_own)["optimizer"]
    assert [group["weight_decay"] for group in made.param_groups] == [0, 0.3]


@pytest.mark.contract("H15")
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


class At(pl.Callback):
    """Do something after an optimizer step."""

    def __init__(self, step: int, act: Callable[[pl.Trainer, pl.LightningModule], Any]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act(trainer, pl_module)


def rates_of_steps(
    make: Any, *callbacks: pl.Callback, ckpt_path: Path | None = None, **options: Any
) -> list[tuple[float, ...]]:
    """The rates of the groups in every optimizer step of a training."""
    seen = Rates()
    run = trainer(*callbacks, seen, **options)
    run.fit(Net(make), batches(), ckpt_path=ckpt_path, weights_only=ckpt_path is not None)
    return seen.seen


def rates_by_torch(schedule: Any, steps: int) -> list[float]:
    """The rates of a scheduler of torch over SGD at 0.02."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.02)
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def assert_both_follow(found: list[tuple[float, ...]], expected: list[float]) -> None:
    assert [rate for rate, _ in found] == pytest.approx(expected, rel=1e-6, abs=0)
    assert [plain for _, plain in found] == pytest.approx([10 * rate for rate in expected], rel=1e-6, abs=0)


def recipe(**options: Any) -> Any:
    return lambda module: layca_optimizers(module, lr=0.02, plain_lr=0.2, **options)


def test_the_cosine_schedule_falls_to_zero_over_the_trainers_steps() -> None:
    expected = [0.02 * 0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert_both_follow(rates_of_steps(recipe(schedule="cosine"), max_epochs=2), expected)


def test_the_schedule_in_steps_is_the_papers() -> None:
    expected = [0.02] * 80 + [0.02 * 0.2] * 10 + [0.02 * 0.2**2] * 7 + [0.02 * 0.2**3] * 3
    assert_both_follow(rates_of_steps(recipe(schedule="steps"), max_epochs=-1, max_steps=100), expected)


def test_warm_up_rises_as_torchs_and_hands_over_to_the_schedule() -> None:
    def by_hand(optimizer: torch.optim.Optimizer) -> Any:
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 6, total_iters=5)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 11)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [5])

    found = rates_of_steps(recipe(schedule="cosine", warmup_steps=5), max_epochs=2)
    assert_both_follow(found, rates_by_torch(by_hand, 16))


@pytest.mark.parametrize("schedule", [None, "constant", "steps"])
def test_warm_up_starts_above_zero_and_reaches_the_rate(schedule: Any) -> None:
    found = rates_of_steps(recipe(schedule=schedule, warmup_steps=3))
    late = [1.0] * 4 if schedule != "steps" else [1.0, 1.0, 1.0, 0.2]
    assert_both_follow(found, [0.02 * share for share in (1 / 4, 2 / 4, 3 / 4, 1.0, *late)])


def test_warm_up_without_a_schedule_needs_no_trainer_and_no_end() -> None:
    found = layca_optimizers(Net(), lr=0.02, warmup_steps=3)
    assert rates(found["optimizer"]) == pytest.approx({"rotating": 0.005, "plain": 0.025})
    found = rates_of_steps(
        recipe(warmup_steps=7), At(9, lambda run, _: setattr(run, "should_stop", True)), max_epochs=-1
    )
    assert_both_follow(found, [*(0.02 * step / 8 for step in range(1, 9)), 0.02])


def test_schedules_step_once_an_optimizer_step_under_accumulation() -> None:
    found = rates_of_steps(recipe(schedule="cosine", warmup_steps=1), accumulate_grad_batches=3)
    assert_both_follow(found, [0.01, 0.02, 0.01])


def test_a_short_trial_does_not_mind_a_long_warm_up() -> None:
    found = rates_of_steps(recipe(schedule="cosine", warmup_steps=9), fast_dev_run=2)
    assert_both_follow(found, [0.002, 0.004])


@pytest.mark.parametrize("schedule", [None, "cosine", "steps"])
@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_steps": 0}], ids=str)
def test_a_training_of_no_steps_is_no_error(options: Any, schedule: Any) -> None:
    run = trainer(**options)
    run.fit(Net(lambda m: layca_optimizers(m, lr="auto", schedule=schedule, warmup_steps=9)), batches())
    assert run.global_step == 0


@pytest.mark.parametrize("schedule", [None, "cosine", "steps"])
def test_a_warm_up_that_outlasts_the_training_is_an_error(schedule: Any) -> None:
    with pytest.raises(
        MisconfigurationException,
        match="`warmup_steps` must be below the 8 optimizer steps of the training, got 8",
    ):
        rates_of_steps(recipe(schedule=schedule, warmup_steps=8))


@pytest.mark.contract("H17")
@pytest.mark.parametrize("schedule", ["constant", "cosine", "steps"])
@pytest.mark.parametrize("step", [5, 8], ids=["in an epoch", "between epochs"])
def test_a_resumed_schedule_goes_on_with_exactly_the_same_rates(tmp_path: Path, schedule: Any, step: int) -> None:
    make, checkpoint = recipe(schedule=schedule, warmup_steps=11), tmp_path / "half.ckpt"
    save = At(step, lambda run, _: run.save_checkpoint(checkpoint))
    whole = rates_of_steps(make, save, max_epochs=2)
    assert rates_of_steps(make, max_epochs=2, ckpt_path=checkpoint) == whole[step:]


def test_a_training_that_was_made_longer_ends_where_its_schedule_does(tmp_path: Path) -> None:
    run = trainer()
    run.fit(Net(recipe(schedule="cosine")), batches())
    run.save_checkpoint(tmp_path / "done.ckpt")
    found = rates_of_steps(recipe(schedule="cosine"), max_epochs=3, ckpt_path=tmp_path / "done.ckpt")
    # The first rate is the 0 that the checkpoint holds.
    assert found[0] == (0, 0)
    assert_both_follow(found[1:], [0.02 * 0.5 * (1 + math.cos(math.pi * step / 24)) for step in range(9, 24)])


def test_a_schedule_of_ones_own_steps_with_the_optimizer() -> None:
    make = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)  # noqa: E731
    assert_both_follow(rates_of_steps(recipe(schedule=make)), [0.02] * 4 + [0.002] * 4)


@pytest.mark.parametrize("schedule", [None, "cosine", "steps"])
def test_groups_that_are_added_later_follow_the_schedule(schedule: Any) -> None:
    more = {"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 0.5}
    found = rates_of_steps(
        recipe(schedule=schedule, warmup_steps=2),
        At(4, lambda run, _: run.optimizers[0].add_param_group(more)),
        max_epochs=2,
    )
    rotating = [rate for rate, *_ in found]
    added = [added for _, _, added in found[4:]]
    assert added == pytest.approx([0.5 * rate / rotating[4] for rate in rotating[4:]], rel=1e-6, abs=0)


@pytest.mark.contract("H2", "H4")
@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_learning_rate_monitor_logs_both_groups(tmp_path: Path, schedule: Any) -> None:
    run = trainer(LearningRateMonitor(log_momentum=True, log_weight_decay=True), logger=CSVLogger(tmp_path))
    run.fit(Net(recipe(base="AdamW", betas=(0.8, 0.9), schedule=schedule)), batches())
    share = 0.5 * (1 + math.cos(math.pi * 7 / 8)) if schedule else 1.0
    assert {key: value.item() for key, value in run.callback_metrics.items()} == pytest.approx(
        {
            "lr-Layca/rotating": 0.02 * share,
            "lr-Layca/rotating-momentum": 0.8,
            "lr-Layca/rotating-weight_decay": 0.0,
            "lr-Layca/plain": 0.2 * share,
            "lr-Layca/plain-momentum": 0.8,
            "lr-Layca/plain-weight_decay": 0.01,
        }
    )


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


@pytest.mark.contract("H6", "H8")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"schedule": "linear"},
            MisconfigurationException,
            r"`schedule` must be 'constant', 'cosine', 'steps' or a function .*, got 'linear'\.",
        ),
        (
            {"schedule": "cosine"},
            MisconfigurationException,
            r"`schedule='cosine'` must know how long the training is, got a module without a trainer\.",
        ),
        ({"plain_lr": math.nan}, ValueError, r"`plain_lr` must be a finite number of at least 0, got nan\."),
        (
            {"warmup_steps": -1},
            MisconfigurationException,
            "`warmup_steps` must be a whole number of at least 0, got -1",
        ),
        ({"warmup_steps": 1.5}, MisconfigurationException, r"`warmup_steps` must be a whole number .*, got 1\.5\."),
        ({"warmup_steps": True}, MisconfigurationException, r"`warmup_steps` must be a whole number .*, got True\."),
        (
            {"warmup_steps": 2, "schedule": lambda optimizer: None},
            MisconfigurationException,
            "`warmup_steps` must be 0 where `schedule` is a function, got 2. Build the warm-up into that scheduler",
        ),
        (
            {"lr": "Auto"},
            MisconfigurationException,
            "`lr` must be a number or 'auto', got 'Auto'. Pass for instance `3",
        ),
        (
            {"lr": "auto"},
            MisconfigurationException,
            "`lr='auto'` must know how long the training is, got a module without a trainer. Or pass a number",
        ),
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


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.ones(7), torch.ones(3)


@pytest.mark.contract("H6")
@pytest.mark.parametrize("options", [{"lr": "auto"}, {"schedule": "cosine"}, {"schedule": "steps"}], ids=str)
@pytest.mark.parametrize(
    ("run", "data", "steps"),
    [
        ({"max_epochs": -1}, batches(), "inf"),
        ({"max_epochs": 3}, torch.utils.data.DataLoader(Endless(), batch_size=4), "-1"),
    ],
    ids=["without end", "data without length"],
)
def test_a_training_of_unknown_length_is_an_error(options: Any, run: Any, data: Any, steps: str) -> None:
    name, value = next(iter(options.items()))
    text = (
        f"`{name}={value!r}` must know how long the training is, got {steps} steps from the trainer. "
        "Set `Trainer(max_steps=...)`, or `max_epochs` with data that has a length. "
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        trainer(**run).fit(Net(lambda m: layca_optimizers(m, **options)), data)


# --- lr="auto" ---


def auto(**options: Any) -> Any:
    return lambda module: layca_optimizers(module, lr="auto", **options)


def rule(steps: int, momentum: float = 0.0) -> float:
    """The rule of the experiments, written out."""
    return (1 / 9) * min(1, (1000 / steps) ** (1 / 3)) / ((1 + momentum) / (1 - momentum)) ** 0.5


@pytest.mark.contract("H6")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 1}, 8),
        ({"max_epochs": 500}, 4000),
        ({"max_epochs": 500, "max_steps": 2000}, 2000),
        ({"max_epochs": -1, "max_steps": 5000}, 5000),
        ({"max_epochs": 1000, "accumulate_grad_batches": 3}, 3000),
        ({"max_epochs": 1000, "limit_train_batches": 2}, 2000),
    ],
    ids=str,
)
def test_the_automatic_rate_counts_the_optimizer_steps_of_the_training(options: Any, steps: int) -> None:
    stop = At(1, lambda run, _: setattr(run, "should_stop", True))
    (first, plain), *_ = rates_of_steps(auto(), stop, **options)
    assert first == pytest.approx(rule(steps), rel=1e-12, abs=0)
    assert plain == 0.1


@pytest.mark.contract("H6")
@pytest.mark.parametrize(
    ("base", "options", "momentum"),
    [
        ("SGD", {}, 0.0),
        ("SGD", {"momentum": 0.8}, 0.8),
        (functools.partial(torch.optim.SGD, momentum=0.9), {}, 0.9),
        ("AdamW", {}, 0.9),
        ("Adam", {"betas": (0.5, 0.9)}, 0.5),
        ("RMSprop", {}, 0.0),
        ("RMSprop", {"momentum": 0.9}, 0.9),
        ("Adagrad", {}, 0.0),
    ],
    ids=lambda value: str(value).partition("(")[0],
)
def test_the_automatic_rate_takes_the_momentum_of_the_base(base: Any, options: Any, momentum: float) -> None:
    ((first, _),) = rates_of_steps(auto(base=base, plain_base="AdamW", **options), max_steps=1)
    assert first == pytest.approx(rule(1, momentum), rel=1e-12, abs=0)


def test_the_automatic_rate_is_what_groups_of_later_get_and_multipliers_multiply() -> None:
    made: list[Layca] = []
    keep = At(1, lambda run, _: made.append(run.optimizers[0]))
    rates_of_steps(auto(layer_multipliers={"head": 0.25}), keep, max_steps=1)
    assert rates(made[0]) == pytest.approx({"rotating/body.0": 1 / 9, "rotating/head": 1 / 36, "plain": 0.1})
    assert made[0].defaults["lr"] == pytest.approx(1 / 9)


@pytest.mark.contract("H6")
def test_a_trial_takes_the_papers_rate() -> None:
    assert rates_of_steps(auto(base="AdamW"), fast_dev_run=True) == [(3**-3, 0.01)]


@pytest.mark.contract("H6")
@pytest.mark.parametrize("schedule", [None, "constant", "cosine"])
def test_a_resumed_training_keeps_the_automatic_rate_of_its_checkpoint(tmp_path: Path, schedule: Any) -> None:
    make, checkpoint = auto(schedule=schedule, plain_lr=0.2), tmp_path / "half.ckpt"
    first = (
        At(4, lambda run, _: run.save_checkpoint(checkpoint)),
        At(5, lambda run, _: setattr(run, "should_stop", True)),
    )
    rates_of_steps(make, *first, max_epochs=200)
    found = rates_of_steps(make, ckpt_path=checkpoint, max_epochs=1000, max_steps=6)
    share = 0.5 * (1 + math.cos(math.pi * 5 / 6)) if schedule == "cosine" else 1.0
    assert found[-1] == pytest.approx((rule(1600) * share, 0.2 * share), rel=1e-6, abs=0)


@pytest.mark.parametrize("part", [torch.nn.Embedding(5, 3), torch.nn.MultiheadAttention(4, 2)], ids=["table", "heads"])
def test_the_automatic_rate_warns_of_transformers(part: torch.nn.Module) -> None:
    def make(module: Net) -> Any:
        module.part = part.requires_grad_(False)
        return layca_optimizers(module, lr="auto")

    with pytest.warns(UserWarning, match="does not hold for transformers: on a small one the best rate was six times"):
        trainer(max_steps=1).fit(Net(make), batches())


# --- bases that take matrices only ---


class Images(Net):
    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.stem = torch.nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, inputs: Any) -> Any:
        return super().forward(self.stem(inputs[:, None])[:, 0])


MUON = {"base": "Muon", "plain_base": "AdamW", "tangential": False}


@needs_muon
def test_muon_turns_matrices_by_the_formula_of_hyperball_and_adamw_steps_the_rest() -> None:
    module = Net()
    optimizer = layca_optimizers(module, lr=0.02, plain_lr=0.2, **MUON)["optimizer"]
    layers = [module.body[0].weight, module.head.weight]
    rest = [p for p in module.parameters() if p.dim() == 1]
    muon_layers, adamw_rest = ([torch.nn.Parameter(p.detach().clone()) for p in ps] for ps in (layers, rest))
    muon = torch.optim.Muon(muon_layers, lr=1.0, weight_decay=0.0)
    adamw = torch.optim.AdamW(adamw_rest, lr=0.2)
    for seed in range(3):
        give_gradients([*layers, *rest], seed)
        give_gradients([*muon_layers, *adamw_rest], seed)
        expected = []
        muon_before = snapshot(muon_layers)
        muon.step()
        for weight, before, after in zip(snapshot(layers), muon_before, muon_layers, strict=True):
            step = before - after.detach()
            turned = weight - 0.02 * weight.norm() * step / step.norm()
            expected.append(turned * weight.norm() / turned.norm())
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(snapshot(layers), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(snapshot(rest), snapshot(adamw_rest), rtol=1e-5, atol=1e-6)


@needs_muon
def test_muon_trains_under_lightning_and_keeps_the_norms() -> None:
    monitor = LayerRotationMonitor(report=False)
    trainer(monitor, max_epochs=2).fit(Net(recipe(schedule="cosine", **MUON)), batches())
    norms = monitor.history.values("norm_ratio")
    assert norms.shape == (16, 2)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=0.0)


@needs_muon
def test_layers_that_the_base_refuses_are_named_with_the_way_out() -> None:
    text = (
        "`base` must take the shape of every rotating layer, got Muon, which refuses stem. "
        "Let these take the steps of a `plain_base` with `exclude=['stem']`."
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        layca_optimizers(Images(None), **MUON)
    assert rates(layca_optimizers(Images(None), exclude=["stem"], **MUON)["optimizer"])["plain"] == 0.01


@needs_muon
def test_plain_tensors_that_the_base_refuses_are_named_with_the_way_out() -> None:
    text = (
        "`plain_base` must take every shape, got Muon, which refuses body.0.bias, body.1.weight, body.1.bias, "
        "head.bias. Pass for instance `plain_base='AdamW'`."
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        layca_optimizers(Net(), base="Muon")


def test_a_base_that_refuses_its_options_says_so_itself() -> None:
    with pytest.raises(ValueError, match="Invalid momentum value: -1"):
        layca_optimizers(Images(None), base="SGD", momentum=-1)


# --- layers that one tensor stacks ---


class Experts(Net):
    """Two experts in one tensor, of which each sample takes both."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.experts = torch.nn.Parameter(torch.randn(2, 7, 7) * torch.tensor([1.0, 5.0])[:, None, None])

    def forward(self, inputs: Any) -> Any:
        return super().forward(torch.einsum("eio,bi->bo", self.experts, inputs))


def test_stacked_experts_turn_each_by_the_whole_angle() -> None:
    module = Experts(recipe(leading_dims={"experts": 1}))
    before = module.experts.detach().clone()
    trainer(max_steps=1).fit(module, batches())
    turned = [angle(one, other) for one, other in zip(before, module.experts, strict=True)]
    assert turned == pytest.approx([math.atan(0.02)] * 2, rel=1e-4)
