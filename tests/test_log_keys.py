"""The keys under which loggers get each layer: short, plain, unique and in depth order."""

import re

import pytest
from histories import HOSTILE_NAMES

from pl_layer_rotation._log_keys import log_keys


def test_keys_hold_depth_and_a_plain_form_of_the_name() -> None:
    assert log_keys(["stem.conv", "a/b [0]", "é", ""], "norm_ratio") == [
        "layer_norm_ratio/000_stem_conv",
        "layer_norm_ratio/001_a_b_0_",
        "layer_norm_ratio/002__",
        "layer_norm_ratio/003_",
    ]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:20])
def test_keys_of_hostile_names_are_short_plain_and_unique(name: str) -> None:
    keys = log_keys([name, f"{name}!", f"{name}?", f"?{name}"])
    assert len(set(keys)) == 4
    assert all(re.fullmatch(r"layer_rotation/\d{3}_[0-9A-Za-z_]{0,100}", key) for key in keys)


@pytest.mark.parametrize(
    ("count", "last"),
    [(1, "000"), (1000, "999"), (1001, "1000"), (12_345, "12344")],
    ids="{} layers".format,
)
def test_alphabetical_order_of_keys_is_depth_order(count: int, last: str) -> None:
    keys = log_keys(["same"] * count)
    assert keys == sorted(keys)
    assert keys[-1] == f"layer_rotation/{last}_same"
    assert len(set(keys)) == count


def test_no_layers_have_no_keys() -> None:
    assert log_keys([]) == []
