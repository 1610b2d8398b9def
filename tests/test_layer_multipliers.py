"""layer_multipliers: each layer is a group with its rate, by an alpha or by name."""

import math
import re
from typing import Any

import pytest
from lightning_fabric.utilities.exceptions import MisconfigurationException
from param_groups import network, params, rates
from torch import nn

from pl_layer_rotation import layca_param_groups


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
