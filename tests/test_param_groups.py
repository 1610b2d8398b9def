"""Parameter groups for Layca: every trainable parameter once, layers of zeros plain, nothing to rotate an error."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from param_groups import assert_partition, by_name, network, params, rates
from torch import nn
from torch.nn.utils import parametrizations, prune

from pl_layer_rotation import Layca, layca_param_groups


def tied() -> nn.Sequential:
    module = network()
    module[4].weight = module[2].weight = nn.Parameter(torch.ones(3, 3))
    return module


def rewritten() -> nn.Sequential:
    module = network()
    parametrizations.weight_norm(module[0])
    parametrizations.spectral_norm(module[2])
    prune.l1_unstructured(module[4], "weight", amount=0.5)
    return module


def partly_frozen() -> nn.Sequential:
    module = network()
    module[0].requires_grad_(False)
    module[4].bias.requires_grad_(False)
    return module


def with_zeros() -> nn.Sequential:
    module = network()
    nn.init.zeros_(module[2].weight)
    nn.init.zeros_(module[4].weight)
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": network,
    "tied": tied,
    "rewritten": rewritten,
    "partly frozen": partly_frozen,
    "layers of zeros": with_zeros,
    "compiled": lambda: torch.compile(network()),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "lstm": lambda: nn.LSTM(3, 4),
}


@pytest.mark.contract("H2", "H9")
@pytest.mark.filterwarnings("ignore:Layers of zeros:UserWarning")
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("alpha", [None, 0.5], ids=["two groups", "multipliers"])
def test_every_trainable_parameter_is_in_exactly_one_group(make: Callable[[], nn.Module], alpha: float | None) -> None:
    module = make()
    groups = layca_param_groups(module, layer_multipliers=alpha)
    assert_partition(groups, module)
    assert all(group["params"] for group in groups)
    Layca(groups)


def test_layers_rotate_in_depth_order_and_all_the_rest_is_plain() -> None:
    module = network()
    groups = layca_param_groups(module, lr=0.02, plain_lr=0.1)
    layers = [module[i].weight for i in (0, 2, 4)]
    rest = [module[0].bias, module[1].weight, module[1].bias, module[2].bias, module[3].weight, module[4].bias]
    assert params(groups, "rotating") == [id(parameter) for parameter in layers]
    assert params(groups, "plain") == [id(parameter) for parameter in rest]
    assert [(group["name"], group["lr"], group["rotate"]) for group in groups] == [
        ("rotating", 0.02, True),
        ("plain", 0.1, False),
    ]


def test_default_rates_are_the_papers_and_equal() -> None:
    assert rates(layca_param_groups(network())) == {"rotating": 3**-3, "plain": 3**-3}
    assert rates(layca_param_groups(network(), lr=0.5)) == {"rotating": 0.5, "plain": 0.5}


def test_a_plain_rate_of_zero_is_not_taken_for_none() -> None:
    assert rates(layca_param_groups(network(), lr=0.5, plain_lr=0.0))["plain"] == 0


@pytest.mark.contract("H2")
def test_a_group_that_would_be_empty_is_left_out() -> None:
    assert [group["name"] for group in layca_param_groups(nn.Linear(2, 2, bias=False))] == ["rotating"]


@pytest.mark.contract("H3")
def test_frozen_parameters_are_left_out_and_join_once_they_are_trainable() -> None:
    module = partly_frozen()
    frozen = [id(module[0].weight), id(module[0].bias), id(module[4].bias)]
    groups = layca_param_groups(module)
    assert not set(frozen) & {id(parameter) for group in groups for parameter in group["params"]}
    module.requires_grad_(True)
    groups = layca_param_groups(module)
    assert set(frozen) <= {id(parameter) for group in groups for parameter in group["params"]}


@pytest.mark.parametrize(
    ("options", "rotating"),
    [
        ({"include": "0"}, [0]),
        ({"exclude": "0"}, [2, 4]),
        ({"include": ["*", "Embedding"], "exclude": "4"}, [0, 2, 3]),
    ],
    ids=["include", "exclude", "with embeddings"],
)
def test_patterns_choose_what_rotates(options: dict[str, Any], rotating: list[int]) -> None:
    module = network()
    groups = layca_param_groups(module, **options)
    assert params(groups, "rotating") == [id(module[i].weight) for i in rotating]
    assert_partition(groups, module)


@pytest.mark.contract("H15")
def test_two_calls_give_lists_of_their_own() -> None:
    module = network()
    first = layca_param_groups(module)
    first[0]["params"].clear()
    first[0]["lr"] = 7
    assert len(layca_param_groups(module)[0]["params"]) == 3


# --- layers of zeros ---


def test_layers_of_zeros_are_plain_and_one_warning_names_them() -> None:
    module = with_zeros()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = layca_param_groups(module)
    assert [(warning.category, str(warning.message)) for warning in caught] == [
        (UserWarning, "Layers of zeros have no direction to turn and take plain steps: 2, 4.")
    ]
    assert params(groups, "rotating") == [id(module[0].weight)]
    assert {id(module[2].weight), id(module[4].weight)} <= set(params(groups, "plain"))


@pytest.mark.parametrize("value", [1e-30, math.nan], ids=["tiny", "NaN"])
def test_one_number_that_is_not_zero_is_a_direction(value: float) -> None:
    module = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(module.weight)
    with torch.no_grad():
        module.weight[1, 2] = value
    assert [group["name"] for group in layca_param_groups(module)] == ["rotating"]


def test_frozen_and_excluded_layers_of_zeros_are_not_warned_about() -> None:
    module = with_zeros()
    module[2].requires_grad_(False)
    assert params(layca_param_groups(module, exclude="4"), "rotating") == [id(module[0].weight)]


def test_weights_without_values_are_not_taken_for_zeros() -> None:
    with torch.device("meta"):
        module = network()
    assert len(by_name(layca_param_groups(module))["rotating"]["params"]) == 3


# --- errors ---


def without_layers() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(3), nn.Embedding(5, 3))


def all_zeros() -> nn.Module:
    module = nn.Linear(3, 3)
    nn.init.zeros_(module.weight)
    return nn.Sequential(module)


@pytest.mark.contract("H2")
@pytest.mark.parametrize(
    ("make", "trainable"),
    [(lambda: network().requires_grad_(False), 0), (without_layers, 3), (all_zeros, 2), (nn.Sequential, 0)],
    ids=["all frozen", "no layers", "all zeros", "no parameters"],
)
def test_nothing_to_rotate_is_an_error(make: Callable[[], nn.Module], trainable: int) -> None:
    text = (
        f"`module` must have a trainable layer to rotate, got Sequential with {trainable} trainable parameters, "
        "none of them a layer that is not all zeros. "
        "Use a torch optimizer for it, or select other layers with `include`."
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        layca_param_groups(make())


@pytest.mark.contract("H8")
def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match="`exclude` patterns must match a layer's name or module type"):
        layca_param_groups(network(), exclude="head")
