"""Which weights LayerRotation may measure from: those at its construction, a state dict, a mapping."""

import re
from collections.abc import Callable

import pytest
import torch
from readings import assert_reads, distances, move, network, weights
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pl_layer_rotation import LayerRotation, select_layers

REFERENCES: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "state dict": lambda module: module.state_dict(),
    "state dict with more entries": lambda module: {**module.state_dict(), "head.weight": torch.ones(7)},
    "by layer name": lambda module: {"3": module[3].weight, "0": module[0].weight},
    "in float64": lambda module: {key: value.double() for key, value in module.state_dict().items()},
    "transposed in memory": lambda module: {"0": module[0].weight, "3": module[3].weight.T.contiguous().T},
}


@pytest.mark.parametrize("make", REFERENCES.values(), ids=REFERENCES)
def test_rotation_can_be_measured_from_other_weights(make: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    module, pretrained = network(), network()
    move(pretrained, seed=2, size=0.5)
    rotation = LayerRotation(module, reference=make(pretrained))
    assert_reads(rotation(module), distances(weights(module), weights(pretrained)))


def test_the_reference_is_a_copy() -> None:
    module = network()
    reference = module.state_dict()
    start, rotation = weights(module), LayerRotation(module, reference=reference)
    move(module)
    for tensor in reference.values():
        tensor.zero_()
    module.load_state_dict(
        {k: torch.full_like(v, 0.3) + torch.arange(v.numel()).view(v.shape) for k, v in reference.items()}
    )
    assert_reads(rotation(module), distances(weights(module), start))


REWRITTEN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": lambda module: nn.Sequential(parametrizations.weight_norm(module[0])),
    "spectral_norm": lambda module: nn.Sequential(parametrizations.spectral_norm(module[0])),
    "pruned": lambda module: nn.Sequential(prune.l1_unstructured(module[0], "weight", amount=0.5)),
    "compiled": torch.compile,
}


@pytest.mark.parametrize("rewrite", REWRITTEN.values(), ids=REWRITTEN)
def test_the_modules_own_state_dict_is_a_reference(rewrite: Callable[[nn.Module], nn.Module]) -> None:
    module = rewrite(network())
    reading = LayerRotation(module, reference=module.state_dict())(module)
    assert_reads(reading, dict.fromkeys(select_layers(module), 0.0))


def test_a_reference_that_lacks_a_layer_is_an_error() -> None:
    text = (
        "`reference` must hold every measured layer, got none for 3 (3, 16). "
        "Leave these layers out with `exclude`, or pass the state dict of this module."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        LayerRotation(network(), reference={"0.weight": torch.ones(4, 1, 3, 3)})


def test_a_reference_of_another_shape_is_an_error() -> None:
    text = (
        "`reference` must have the shape of the layer, (3, 16) for '3', got (16, 3). "
        "Pass weights of the same architecture, sharded as the module is."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        LayerRotation(network(), include="3", reference={"3.weight": torch.ones(16, 3)})
