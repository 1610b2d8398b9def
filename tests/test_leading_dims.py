"""leading_dims: layers that one tensor stacks are groups by how many dimensions count them."""

import re
from typing import Any

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from param_groups import Groups, assert_partition, by_name, params, rates
from torch import nn

from pl_layer_rotation import layca_param_groups


class Attention(nn.Module):
    """A fused projection, stacked experts and an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.ones(3, 4, 4))
        self.experts = nn.ParameterDict({"up": torch.ones(2, 5, 4), "down": torch.ones(2, 4, 5)})
        self.out = nn.Linear(4, 4)


def stacked(groups: Groups) -> dict[str, tuple[int, list[tuple[int, ...]]]]:
    """Leading dimensions and shapes by group."""
    return {
        name: (group["leading_dims"], [tuple(p.shape) for p in group["params"]])
        for name, group in by_name(groups).items()
        if group["rotate"]
    }


EXPERTS = [(2, 5, 4), (2, 4, 5)]


@pytest.mark.parametrize(
    ("leading_dims", "expected"),
    [
        (0, {"rotating": (0, [(3, 4, 4), (4, 4), *EXPERTS])}),
        (1, {"rotating/leading_dims=1": (1, [(3, 4, 4), (4, 4), *EXPERTS])}),
        ({}, {"rotating": (0, [(3, 4, 4), (4, 4), *EXPERTS])}),
        ({"qkv": 1}, {"rotating": (0, [(4, 4), *EXPERTS]), "rotating/leading_dims=1": (1, [(3, 4, 4)])}),
        (
            {"qkv": 1, "experts.*": 2, "Linear": 0},
            {
                "rotating": (0, [(4, 4)]),
                "rotating/leading_dims=1": (1, [(3, 4, 4)]),
                "rotating/leading_dims=2": (2, EXPERTS),
            },
        ),
        (
            {"*": 1, "experts.up": 2, "out": 0},
            {
                "rotating": (0, [(4, 4)]),
                "rotating/leading_dims=1": (1, [(3, 4, 4), (2, 4, 5)]),
                "rotating/leading_dims=2": (2, [(2, 5, 4)]),
            },
        ),
    ],
    ids=str,
)
def test_stacked_layers_are_groups_by_their_leading_dimensions(leading_dims: Any, expected: dict[str, Any]) -> None:
    module = Attention()
    groups = layca_param_groups(module, leading_dims=leading_dims)
    found = stacked(groups)
    assert {name: (count, sorted(shapes)) for name, (count, shapes) in found.items()} == {
        name: (count, sorted(shapes)) for name, (count, shapes) in expected.items()
    }
    assert_partition(groups, module)


def test_stacked_layers_share_the_rate_and_keep_their_multiplier() -> None:
    module = Attention()
    assert set(rates(layca_param_groups(module, lr=0.1, plain_lr=0.3, leading_dims={"qkv": 1})).items()) == {
        ("rotating", 0.1),
        ("rotating/leading_dims=1", 0.1),
        ("plain", 0.3),
    }
    groups = layca_param_groups(module, lr=0.1, layer_multipliers={"qkv": 0.5}, leading_dims={"qkv": 1})
    assert stacked(groups)["rotating/qkv"] == (1, [(3, 4, 4)])
    assert stacked(groups)["rotating/out"] == (0, [(4, 4)])
    assert rates(groups)["rotating/qkv"] == 0.05


def test_a_stack_in_which_one_layer_is_zeros_takes_plain_steps() -> None:
    module = Attention()
    with torch.no_grad():
        module.experts["up"][1] = 0
    assert params(layca_param_groups(module), "rotating").count(id(module.experts["up"])) == 1
    with pytest.warns(UserWarning, match=r"^Layers of zeros have no direction .* plain steps: experts\.up\.$"):
        groups = layca_param_groups(module, leading_dims={"experts.*": 1})
    assert id(module.experts["up"]) in params(groups, "plain")
    assert params(groups, "rotating/leading_dims=1") == [id(module.experts["down"])]


def test_stacks_without_values_are_not_taken_for_zeros() -> None:
    with torch.device("meta"):
        module = Attention()
    found = stacked(layca_param_groups(module, leading_dims=1))
    assert {name: (count, len(shapes)) for name, (count, shapes) in found.items()} == {
        "rotating/leading_dims=1": (1, 4)
    }


@pytest.mark.parametrize(
    ("leading_dims", "text"),
    [
        (2, "a whole number from 0 to 1 for layer 'out' of shape (4, 4), got 2. Give numbers by pattern"),
        ({"qkv": 3}, "a whole number from 0 to 2 for layer 'qkv' of shape (3, 4, 4), got 3."),
        ({"qkv": -1}, "a whole number from 0 to 2 for layer 'qkv' of shape (3, 4, 4), got -1."),
        ({"qkv": 1.0}, "a whole number from 0 to 2 for layer 'qkv' of shape (3, 4, 4), got 1.0."),
        ({"qkv": True}, "a whole number from 0 to 2 for layer 'qkv' of shape (3, 4, 4), got True."),
    ],
    ids=str,
)
def test_leading_dimensions_must_leave_a_layer(leading_dims: Any, text: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(f"`leading_dims` must be {text}")):
        layca_param_groups(Attention(), leading_dims=leading_dims)


def test_patterns_of_leading_dimensions_must_match_a_layer_that_rotates() -> None:
    text = (
        "`leading_dims` patterns must match a layer's name or module type, got 'qvk', which matches none. "
        "Similar names: 'qkv'."
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        layca_param_groups(Attention(), leading_dims={"qvk": 1})
    text = (
        "`leading_dims` patterns must match a rotating layer, got 'qkv', which matches only qkv. "
        "The rotating layers are ["
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        layca_param_groups(Attention(), exclude="qkv", leading_dims={"qkv": 1})
