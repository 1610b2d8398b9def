"""Which bases and options Layca takes, and which options and tensors it refuses."""

import functools
import math
from typing import Any

import pytest
import torch
from contract.cases import angle, give_gradients
from layca_cases import layers, network, train
from torch import nn

from pl_layer_rotation import Layca


def base_from_a_function(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, betas=(0.8, 0.99))


def test_the_base_may_be_a_class_a_name_or_a_function() -> None:
    results = []
    for base, options in (
        (torch.optim.Adam, {"betas": (0.8, 0.99)}),
        ("Adam", {"betas": (0.8, 0.99)}),
        (base_from_a_function, {}),
        (functools.partial(torch.optim.Adam, betas=(0.8, 0.99)), {}),
    ):
        net = network()
        train(net, Layca(net.parameters(), base=base, **options), 0, 3)
        results.append(net[0].weight.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


class NeedsTheWeights(torch.optim.SGD):
    """Multiplicative updates: each weight moves in proportion to its size."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.abs() * parameter.grad, alpha=-group["lr"])


@pytest.mark.contract("O14", "O42")
@pytest.mark.parametrize("base", [NeedsTheWeights, torch.optim.LBFGS, torch.optim.SparseAdam])
def test_a_base_that_needs_more_than_gradients_is_refused_by_name(base: Any) -> None:
    message = f"`base` must give a direction that depends on gradients alone, got {base.__name__}, which needs"
    with pytest.raises(ValueError, match=message):
        Layca(layers(), base=base)


OTHER_BASES = ["NAdam", "RAdam", "Adadelta", "Adamax", "ASGD", "Rprop", "Adafactor"]


@pytest.mark.parametrize("base", OTHER_BASES)
def test_the_other_optimizers_of_torch_are_taken(base: str) -> None:
    (weight,) = layers()[1:2]
    before = weight.detach().clone()
    give_gradients([weight], 0)
    Layca([weight], lr=0.1, base=base).step()
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-5)


@pytest.mark.contract("O14")
@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, "fast", None])
def test_a_bad_lr_is_refused(lr: Any) -> None:
    message = rf"`lr` must be a finite number of at least 0, got {lr!r}\. Try 3\*\*-3, an angle of 2\.1 degrees\."
    with pytest.raises(ValueError, match=message):
        Layca(layers(), lr=lr)
    with pytest.raises(ValueError, match=message):
        Layca([{"params": layers(), "lr": lr}])


@pytest.mark.contract("O14")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"base": "AdamX"},
            ValueError,
            r"`base` must name an optimizer of torch\.optim, got 'AdamX'\. Similar names: 'Adam",
        ),
        ({"base": 3}, TypeError, r"`base` must be an optimizer class, its name or a function .*, got 3\. Pass"),
        ({"base": lambda params: None}, TypeError, r"`base` must make a torch optimizer, got None"),
        (
            {"speed": 1},
            TypeError,
            r"`speed` must be an option of the base optimizer SGD, got speed=1\. Its options are momentum",
        ),
        (
            {"weight_decay": 0.1},
            ValueError,
            r"`weight_decay` must be 0 in a rotating group, got 0\.1: the norm of a rotating",
        ),
        ({"differentiable": True}, ValueError, r"`differentiable` must be False, got True\."),
        ({"momentum": -1.0}, ValueError, "Invalid momentum value"),
    ],
)
def test_bad_options_are_named_with_their_mend(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layca(layers(), **options)


@pytest.mark.contract("O14")
def test_weight_decay_acts_in_plain_groups_only() -> None:
    rotating, plain = layers()[:2]
    groups = [{"params": [rotating]}, {"params": [plain], "rotate": False, "weight_decay": 0.2}]
    optimizer = Layca(groups, base="AdamW")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2]
    with pytest.raises(ValueError, match=r"`weight_decay` must be 0 in a rotating group, got 0\.3"):
        Layca([{"params": [rotating], "weight_decay": 0.3}], base="AdamW")


@pytest.mark.contract("O14")
def test_parameters_are_refused_as_torch_refuses_them() -> None:
    weight = layers()[0]
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        Layca(weight)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        Layca([])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        Layca([{"params": [weight]}, {"params": [weight]}])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        Layca([weight * 2])


@pytest.mark.contract("O7")
def test_a_layer_of_zeros_is_refused_by_name() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "lora_b": nn.Linear(3, 2, bias=False)})
    nn.init.zeros_(net["lora_b"].weight)
    optimizer = Layca(net.named_parameters())
    net["lora_b"](net["a"](torch.ones(1, 3))).sum().backward()
    with pytest.raises(
        RuntimeError,
        match=r"`params` with `rotate=True` must not be all zeros, got 'lora_b.weight': a layer of zeros has no "
        r"direction to turn. Put it into a group with `rotate=False`, as `layca_optimizers` does, or initialize it.",
    ):
        optimizer.step()


def test_tensors_that_fsdp1_flattened_are_refused() -> None:
    weight = nn.Parameter(torch.ones(12))
    weight._fsdp_flattened = True  # type: ignore[attr-defined]  # as FSDP1 marks them
    weight.grad = torch.ones(12)
    optimizer = Layca([weight])
    for _ in range(2):  # a second try is no plain step either
        with pytest.raises(
            RuntimeError, match=r"`params` must keep their shape, got parameter 0 .*, flattened by FSDP1"
        ):
            optimizer.step()
    assert torch.equal(weight, torch.ones(12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotate": "False"}, "`rotate` must be True or False, got 'False'"),
        ({"tangential": 0}, "`tangential` must be True or False, got 0"),
    ],
)
def test_a_switch_is_no_text(options: dict[str, Any], message: str) -> None:
    weight = nn.Parameter(torch.eye(2))
    with pytest.raises(TypeError, match=message):
        Layca([weight], **options)
    with pytest.raises(TypeError, match=message):
        Layca([{"params": [weight], **options}])
    with pytest.raises(TypeError, match=message):
        Layca([weight]).add_param_group({"params": [nn.Parameter(torch.eye(3))], **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": True}, "`lr` must be a finite number of at least 0, got True"),
        ({"leading_dims": True}, "`leading_dims` must be an integer of at least 0, got True"),
        ({"momentum": math.nan}, "`momentum` must be a number, got nan. Leave it out for the default of SGD"),
        ({"base": "adamw"}, "got 'adamw'. Similar names: 'AdamW'"),
        ({"weight_decay": 0.1}, "`weight_decay` must be 0 in a rotating group, got 0.1: .* or in a `plain_base`"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_value_that_only_looks_right_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layca([nn.Parameter(torch.ones(2, 3))], **options)


def test_tensors_and_groups_are_not_mixed() -> None:
    with pytest.raises(TypeError, match="param_group must be a dict"):
        Layca([{"params": [nn.Parameter(torch.eye(2))]}, nn.Parameter(torch.eye(2))])
