"""include and exclude: which layers patterns choose, and patterns that are errors."""

import re
from typing import Any

import pytest
from lightning_fabric.utilities.exceptions import MisconfigurationException
from selected import NAMES, names, network
from torch import nn

from pl_layer_rotation import select_layers

CHOICES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "one name as a string": ({"include": "head"}, ["head"]),
    "names, in depth order": ({"include": ["head", "stem"]}, ["stem", "head"]),
    "a pattern on names": ({"include": "block.*"}, ["block.conv", "block.fc"]),
    "one character": ({"include": "hea?"}, ["head"]),
    "a set of characters": ({"include": "[sh]*"}, ["stem", "head"]),
    "a type": ({"include": "Linear"}, ["block.fc", "head"]),
    "a base class": ({"include": "_ConvNd"}, ["stem", "block.conv"]),
    "a pattern on types": ({"include": "Conv*"}, ["stem", "block.conv"]),
    "everything": ({"include": "*"}, NAMES),
    "a normalization by name": ({"include": ["head", "block.norm"]}, ["block.norm", "head"]),
    "normalizations by type": ({"include": ["head", "LayerNorm"]}, ["block.norm", "block.norm.bias", "head"]),
    "all but a name": ({"exclude": "head"}, ["stem", "block.conv", "block.fc"]),
    "all but a type": ({"exclude": ["Conv2d"]}, ["block.fc", "head"]),
    "all but a base class": ({"exclude": "_ConvNd"}, ["block.fc", "head"]),
    "all but everything": ({"exclude": "*"}, []),
    "exclude what is left out anyway": ({"exclude": "LayerNorm"}, NAMES),
    "exclude wins over include": ({"include": "Linear", "exclude": "block.*"}, ["head"]),
    "include nothing": ({"include": []}, []),
    "exclude nothing": ({"exclude": []}, NAMES),
    "a tuple": ({"include": ("stem",), "exclude": ()}, ["stem"]),
}


@pytest.mark.parametrize(("options", "expected"), CHOICES.values(), ids=CHOICES)
def test_patterns_choose_layers_in_depth_order(options: dict[str, Any], expected: list[str]) -> None:
    assert names(network(), **options) == expected


def test_an_include_pattern_brings_embeddings_in() -> None:
    module = nn.ModuleDict({"tokens": nn.Embedding(5, 3), "body": nn.Linear(3, 3)})
    assert names(module, include="*") == ["body"]
    assert names(module, include=["*", "Embedding"]) == ["tokens", "body"]
    assert names(module, include="tokens") == ["tokens"]


@pytest.mark.contract("H8")
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_with_similar_names(argument: str) -> None:
    text = (
        f"`{argument}` patterns must match a layer's name or module type, got 'block.fd', which matches none. "
        "Similar names: 'block.fc'"
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        select_layers(network(), **{argument: ["stem", "block.fd"]})


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("Linaer", "'Linear'"),
        ("Conv2D", "'Conv2d'"),
        ("HEAD", "'stem', 'block.conv', 'block.fc'"),
        ("", "'stem'"),
    ],
    ids=["misspelt type", "wrong case of a type", "wrong case of a name", "empty"],
)
def test_the_hint_names_types_too_and_else_the_first_layers(pattern: str, hint: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(f"Similar names: {hint}")):
        select_layers(network(), include=pattern)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_on_a_module_without_layers_is_an_error_that_says_so(argument: str) -> None:
    text = "got 'fc', which matches none. The module has no layers."
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        select_layers(nn.ReLU(), **{argument: "fc"})


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", [3, None, nn.Linear], ids=["number", "None", "class"])
def test_a_pattern_that_is_no_string_is_an_error(argument: str, pattern: object) -> None:
    text = f"`{argument}` must hold patterns as strings, got {pattern!r}. Pass names such as 'encoder.*'."
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        select_layers(network(), **{argument: ["stem", pattern]})


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_patterns_leave_the_arguments_alone(argument: str) -> None:
    patterns = ["stem", "head"]
    select_layers(network(), **{argument: patterns})
    assert patterns == ["stem", "head"]


@pytest.mark.contract("H8")
def test_a_literal_bracket_is_written_as_a_set_of_one() -> None:
    module = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2)})
    assert names(module, include="a[0]") == ["a0"]
    assert names(module, include="a[[]0]") == ["a[0]"]
