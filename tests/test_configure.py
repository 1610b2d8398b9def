"""layca_optimizers in real trainings: groups, bases, angles, and options that are refused."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from contract.cases import angle, give_gradients, needs_muon, snapshot
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer
from noted_rates import rates, recipe

from pl_layer_rotation import Layca, LayerRotationMonitor, layca_optimizers, layca_param_groups


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rotate": False}, TypeError, "`rotate` must be left out, got False. .*`exclude`"),
        ({"params": []}, TypeError, r"`params` must be left out, got \[\]"),
        ({"plain_lr": "0.1"}, ValueError, "`plain_lr` must be a finite number of at least 0, got '0.1'"),
        ({"plain_lr": True}, ValueError, "`plain_lr` must be a finite number of at least 0, got True"),
        ({"lr": True}, ValueError, "`lr` must be a finite number of at least 0, got True"),
        ({"layer_multipliers": "0.5"}, MisconfigurationException, "must be an alpha between -1 and 1 .* got '0.5'"),
        ({"layer_multipliers": {"head": "1"}}, MisconfigurationException, "must be finite and at least 0, got '1'"),
        ({"schedule": lambda o: None}, MisconfigurationException, "`schedule` must make a scheduler .* got None from"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_passed_by_mistake_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layca_optimizers(Net(), **options)


@pytest.mark.parametrize("rates", [{"lr": -1.0}, {"lr": math.nan}, {"lr": None}, {"plain_lr": -0.1}])
def test_groups_have_no_impossible_rate(rates: dict[str, Any]) -> None:
    (name,) = rates
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number of at least 0, got"):
        layca_param_groups(Net(), **rates)


def test_a_misspelt_argument_is_told_its_name() -> None:
    with pytest.raises(
        TypeError, match=r"`warmup` must be an option .* SGD, got warmup=10.* Did you mean 'warmup_steps'\?"
    ):
        layca_optimizers(Net(), warmup=10)
    with pytest.raises(TypeError, match=r"`beta` must be an option of the base optimizer SGD, got beta=.* nesterov"):
        layca_optimizers(Net(), beta=0.9)
    with pytest.raises(TypeError, match=r"`base` must be an optimizer class.*torch\.optim\.AdamW`\.$"):
        layca_optimizers(Net(), base=3, betas=(0.9, 0.99))  # type: ignore[arg-type]
