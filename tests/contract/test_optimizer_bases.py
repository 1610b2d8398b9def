"""Contract O42: which optimizers may give the direction, those of torch and those that others published."""

import copy
import functools
import inspect
import io
import math
from typing import Any

import pytest
import pytorch_optimizer as published
import torch
from contract.cases import angle, copy_weights, flat, give_gradients, layers, needs_muon, same, take_steps
from torch import Tensor, nn

from pl_layer_rotation import Layca

TORCH_OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
PUBLISHED = ["Lion", "Lamb", "Adan", "AdEMAMix"]


def turn_of(optimizer: Layca, weight: Tensor, seed: int) -> float:
    before = weight.detach().clone()
    take_steps(optimizer, seed, seed + 1)
    return angle(before, weight)


@pytest.mark.contract("O42")
@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_every_optimizer_of_torch_turns_by_the_angle_or_is_refused_by_name(name: str) -> None:
    (weight,) = layers(shapes=[(12, 8)])
    try:
        optimizer = Layca([weight], lr=0.1, base=name)
    except ValueError as error:
        assert f"`base` must give a direction that depends on gradients alone, got {name}, which needs" in str(error)  # noqa: PT017  # the others must turn
        assert name in ("LBFGS", "SparseAdam")
        return
    for seed in range(3):
        assert turn_of(optimizer, weight, seed) == pytest.approx(math.atan(0.1), rel=1e-5)


def no_decay(kind: type[torch.optim.Optimizer]) -> dict[str, float]:
    return {"weight_decay": 0.0} if "weight_decay" in inspect.signature(kind).parameters else {}


def across(step: Tensor, weight: Tensor) -> Tensor:
    """What is left of a step without its part along the weights, as a unit vector."""
    rest = step - (step @ weight) / (weight @ weight) * weight
    return rest / rest.norm()


@pytest.mark.contract("O42")
@pytest.mark.parametrize(
    "kind",
    [getattr(torch.optim, name) for name in TORCH_OPTIMIZERS if name not in ("LBFGS", "SparseAdam")]
    + [getattr(published, name) for name in PUBLISHED],
    ids=lambda kind: f"{kind.__module__.split('.')[0]}.{kind.__name__}",
)
def test_the_direction_is_that_of_the_base_on_weights_of_its_own(kind: type[torch.optim.Optimizer]) -> None:
    (weight,), (free,) = layers(torch.float64, [(6, 4)]), layers(torch.float64, [(6, 4)])
    optimizer, base = Layca([weight], lr=0.1, base=kind), kind([free], lr=1e-3, **no_decay(kind))  # type: ignore[call-arg]
    for seed in range(8):
        before, start = flat(weight).clone(), flat(free).clone()
        give_gradients([weight, free], seed)
        free.grad = weight.grad.clone()
        optimizer.step()
        base.step()
        expected = across(flat(free) - start, before)
        assert 2 * math.asin(float((across(flat(weight) - before, before) - expected).norm()) / 2) < 1e-4


@pytest.mark.contract("O42")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_optimizers_turn_by_the_angle_and_resume_bit_by_bit(name: str) -> None:
    kind = getattr(published, name)
    tensors, others = layers(shapes=[(5, 4), (4,)]), layers(shapes=[(5, 4), (4,)])
    optimizer, resumed = Layca(tensors, lr=0.1, base=kind), Layca(others, lr=0.7, base=kind)
    for seed in range(3):
        assert turn_of(optimizer, tensors[0], seed) == pytest.approx(math.atan(0.1), rel=1e-5)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    copy_weights(tensors, others)
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, resumed, copied):
        take_steps(one, 3, 6)
    assert same(tensors, others)
    assert same(tensors, copied.param_groups[0]["params"])


# What they need besides gradients: averages of the weights (schedule-free, MADGRAD), how far these have come
# (D-Adaptation, Prodigy), their size (LARS, Adafactor with relative steps, Nero).
NEED_WEIGHTS = [
    *("ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "MADGRAD"),
    *("DAdaptAdam", "DAdaptSGD", "DAdaptAdaGrad", "Prodigy", "LARS", "AdaFactor", "Nero"),
]


@pytest.mark.contract("O42")
@pytest.mark.parametrize("name", NEED_WEIGHTS)
def test_published_optimizers_that_need_the_weights_are_refused_by_name(name: str) -> None:
    message = f"`base` must give a direction that depends on gradients alone, got {name}, which needs"
    with pytest.raises(ValueError, match=message):
        Layca(layers(), base=getattr(published, name))


@pytest.mark.contract("O14", "O42")
@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("SAM", functools.partial(published.SAM, base_optimizer=torch.optim.SGD, lr=0.1)),
        ("AliG", published.AliG),
    ],
    ids=["SAM", "AliG"],
)
def test_published_optimizers_that_need_a_closure_are_refused_by_name(name: str, base: Any) -> None:
    with pytest.raises(ValueError, match=f"`base` must give a direction .*, got {name}, which needs"):
        Layca(layers(), base=base)


@pytest.mark.contract("O42")
def test_the_average_of_asgd_is_not_one_of_the_weights() -> None:
    (weight,) = layers(shapes=[(5, 4)])
    optimizer = Layca([weight], lr=0.1, base="ASGD")
    take_steps(optimizer, 0, 1)
    torch.testing.assert_close(optimizer.state[weight]["ax"], -weight.grad, rtol=1e-6, atol=0.0)


@needs_muon
@pytest.mark.contract("O42")
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8}], ids=str)
def test_muon_turns_matrices_while_another_base_steps_the_rest(options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    twin = copy.deepcopy(net)
    matrices, rest = (
        [p for p in net.parameters() if p.dim() == 2],
        [p for p in net.parameters() if p.dim() < 2],
    )
    groups = [{"params": matrices}, {"params": rest, "rotate": False, "lr": 0.01}]
    optimizer = Layca(groups, lr=0.1, base="Muon", plain_base="AdamW", **options)
    others = [p for p in twin.parameters() if p.dim() < 2]
    plain = torch.optim.AdamW(others, lr=0.01)
    for seed in range(3):
        before = matrices[0].detach().clone()
        take_steps(optimizer, seed, seed + 1)
        for parameter, other in zip(rest, others, strict=True):
            other.grad = parameter.grad.clone()
        plain.step()
        assert angle(before, matrices[0]) == pytest.approx(math.atan(0.1), rel=1e-5)
    for parameter, other in zip(rest, others, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)
