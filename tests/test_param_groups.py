"""Parameter groups for Layca: every trainable parameter once, and each layer at its rate."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrizations, prune

from pl_layer_rotation import Layca, layca_param_groups

Groups = list[dict[str, Any]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm([3, 3]), nn.Linear(3, 3), nn.Embedding(5, 2), nn.Linear(3, 2))


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


def by_name(groups: Groups) -> dict[str, dict[str, Any]]:
    assert len({group["name"] for group in groups}) == len(groups)
    return {group["name"]: group for group in groups}


def rates(groups: Groups) -> dict[str, float]:
    return {name: group["lr"] for name, group in by_name(groups).items()}


def params(groups: Groups, name: str) -> list[int]:
    return [id(parameter) for parameter in by_name(groups)[name]["params"]]


def assert_partition(groups: Groups, module: nn.Module) -> None:
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert counts == dict.fromkeys([id(p) for p in module.parameters() if p.requires_grad], 1)


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


@pytest.mark.contract("H16")
def test_disjoint_patterns_give_disjoint_groups_for_two_optimizers() -> None:
    module = nn.ModuleDict({"generator": nn.Linear(3, 3), "critic": nn.Linear(3, 3)})
    groups = [layca_param_groups(module[name])[0]["params"] for name in ("generator", "critic")]
    assert [[id(p) for p in group] for group in groups] == [[id(module[n].weight)] for n in ("generator", "critic")]


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


# --- multipliers ---


@pytest.mark.parametrize("alpha", [0.6, 0.1, 0.99], ids="alpha {:g}".format)
def test_a_positive_alpha_slows_early_layers(alpha: float) -> None:
    found = rates(layca_param_groups(network(), lr=0.1, layer_multipliers=alpha))
    expected = [0.1 * (1 - alpha) ** power for power in (5, 2.5, 0)]
    assert list(found)[:3] == ["rotating/0", "rotating/2", "rotating/4"]
    assert list(found.values())[:3] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("alpha", [-0.6, -0.1, -0.99], ids="alpha {:g}".format)
def test_a_negative_alpha_slows_late_layers(alpha: float) -> None:
    found = rates(layca_param_groups(network(), lr=0.1, layer_multipliers=alpha))
    expected = [0.1 * (1 + alpha) ** power for power in (0, 2.5, 5)]
    assert list(found.values())[:3] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("alpha", [0, 0.0, {}], ids=repr)
def test_an_alpha_of_zero_and_an_empty_mapping_turn_all_alike(alpha: Any) -> None:
    found = rates(layca_param_groups(network(), lr=0.1, plain_lr=0.3, layer_multipliers=alpha))
    assert found == {"rotating/0": 0.1, "rotating/2": 0.1, "rotating/4": 0.1, "plain": 0.3}


@pytest.mark.parametrize("alpha", [0.6, -0.6])
def test_a_single_layer_keeps_a_rate_that_is_not_zero(alpha: float) -> None:
    rate = rates(layca_param_groups(nn.Linear(2, 2), lr=0.1, layer_multipliers=alpha))["rotating/weight"]
    assert rate == pytest.approx(0.1 * (1 - alpha) ** 5 if alpha > 0 else 0.1, rel=1e-12, abs=0)


def test_a_mapping_gives_factors_by_name_and_one_to_the_others() -> None:
    found = rates(layca_param_groups(network(), lr=0.1, layer_multipliers={"4": 0.5, "0": 0}))
    assert found == pytest.approx(
        {"rotating/0": 0, "rotating/2": 0.1, "rotating/4": 0.05, "plain": 0.1}, rel=1e-12, abs=0
    )


def test_with_multipliers_each_layer_is_a_rotating_group_and_the_rest_one_plain_group() -> None:
    module = network()
    groups = layca_param_groups(module, layer_multipliers=0.5)
    assert [group["rotate"] for group in groups] == [True, True, True, False]
    assert [params(groups, f"rotating/{i}") for i in (0, 2, 4)] == [[id(module[i].weight)] for i in (0, 2, 4)]


def test_alpha_counts_only_layers_that_rotate() -> None:
    found = rates(layca_param_groups(network(), lr=0.1, layer_multipliers=0.5, exclude="2"))
    assert found == pytest.approx({"rotating/0": 0.1 * 0.5**5, "rotating/4": 0.1, "plain": 0.1}, rel=1e-12, abs=0)


# --- layers that one tensor stacks ---


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


# --- errors ---


@pytest.mark.parametrize("alpha", [1, -1, 1.5, math.nan, math.inf], ids=repr)
def test_alpha_must_be_between_minus_one_and_one(alpha: float) -> None:
    text = (
        f"`layer_multipliers` must be an alpha between -1 and 1 (not included), got {alpha!r}. "
        "Positive values slow early layers, negative values late ones; 0 turns all alike."
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        layca_param_groups(network(), layer_multipliers=alpha)


@pytest.mark.parametrize("factor", [-0.1, math.nan, math.inf], ids=repr)
def test_factors_must_be_finite_and_not_negative(factor: float) -> None:
    text = (
        f"`layer_multipliers` must be finite and at least 0, got {factor!r} for '2'. "
        "Leave a layer out of the rotation with `exclude`."
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        layca_param_groups(network(), layer_multipliers={"2": factor})


@pytest.mark.parametrize("name", ["1", "2.weight", "nowhere"], ids=["a normalization", "a parameter", "nothing"])
def test_factors_for_what_does_not_rotate_are_an_error(name: str) -> None:
    text = f"`layer_multipliers` must name rotating layers, got ['{name}']. The layers are ['0', '2', '4']."
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        layca_param_groups(network(), layer_multipliers={"0": 0.5, name: 0.5})


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
