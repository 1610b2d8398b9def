"""Which tensors are layers, in which order, and that tied ones count once."""

from collections.abc import Callable

import pytest
import torch
from selected import NAMES, holder, names, network, shapes
from torch import nn

from pl_layer_rotation import select_layers


class Scale(nn.LayerNorm):
    """A normalization whose name does not say so."""


class RMSNorm2d(nn.Module):
    """A normalization that inherits from none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, 1))


class Gain(nn.RMSNorm):
    """A root-mean-square normalization whose name does not say so."""


class Tokens(nn.Embedding):
    """An embedding whose name does not say so."""


class RotaryEmbedding(nn.Module):
    """An embedding that inherits from none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 2))


NO_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "no parameters": nn.ReLU,
    "an empty container": nn.Sequential,
    "batch norm": lambda: nn.BatchNorm3d(4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm with a matrix": lambda: nn.LayerNorm([4, 4]),
    "rms norm with a matrix": lambda: nn.RMSNorm([4, 4]),
    "subclass of layer norm": lambda: Scale([4, 4]),
    "subclass of rms norm": lambda: Gain([4, 4]),
    "norm by class name": RMSNorm2d,
    "embedding": lambda: nn.Embedding(5, 3),
    "embedding bag": lambda: nn.EmbeddingBag(5, 3),
    "subclass of embedding": lambda: Tokens(5, 3),
    "embedding by class name": RotaryEmbedding,
    "vectors and scalars": lambda: holder(vector=torch.ones(3), scalar=torch.tensor(1.0)),
    "integers": lambda: holder(quantized=torch.ones(3, 3, dtype=torch.int8)),
    "booleans": lambda: holder(mask=torch.ones(3, 3, dtype=torch.bool)),
}


@pytest.mark.contract("H11")
@pytest.mark.parametrize("make", NO_LAYERS.values(), ids=NO_LAYERS)
def test_is_no_layer(make: Callable[[], nn.Module]) -> None:
    assert select_layers(make()) == {}


def test_buffers_are_no_layers() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("running", torch.ones(2, 2))
    assert names(module) == ["weight"]


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "a module that is one layer": (lambda: nn.Linear(3, 2), {"weight": (2, 3)}),
    "attention": (
        lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}),
        {"attn.in_proj_weight": (12, 4), "attn.out_proj": (4, 4)},
    ),
    "attention with other keys": (
        lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, kdim=3, vdim=5)}),
        {
            "attn.q_proj_weight": (4, 4),
            "attn.k_proj_weight": (4, 3),
            "attn.v_proj_weight": (4, 5),
            "attn.out_proj": (4, 4),
        },
    ),
    "lstm": (
        lambda: nn.ModuleDict({"rnn": nn.LSTM(3, 4, num_layers=2)}),
        {
            "rnn.weight_ih_l0": (16, 3),
            "rnn.weight_hh_l0": (16, 4),
            "rnn.weight_ih_l1": (16, 4),
            "rnn.weight_hh_l1": (16, 4),
        },
    ),
    "bilinear and transposed convolution": (
        lambda: nn.Sequential(nn.Bilinear(2, 3, 4), nn.ConvTranspose1d(2, 3, 5)),
        {"0": (4, 2, 3), "1": (2, 3, 5)},
    ),
    "list of parameters": (
        lambda: nn.ModuleDict({"list": nn.ParameterList([torch.ones(2, 3), torch.ones(2), torch.ones(4, 5)])}),
        {"list.0": (2, 3), "list.2": (4, 5)},
    ),
    "dictionary of parameters": (
        lambda: nn.ModuleDict({"dict": nn.ParameterDict({"a": torch.ones(2, 3), "b": torch.ones(4, 5)})}),
        {"dict.a": (2, 3), "dict.b": (4, 5)},
    ),
    "bare parameters": (
        lambda: holder(cls_token=torch.ones(1, 1, 6), bias=torch.ones(6), position=torch.ones(1, 9, 6)),
        {"cls_token": (1, 1, 6), "position": (1, 9, 6)},
    ),
    "complex": (lambda: holder(kernel=torch.ones(3, 2, dtype=torch.complex64)), {"kernel": (3, 2)}),
}


@pytest.mark.contract("H10", "H11")
@pytest.mark.parametrize(("make", "expected"), LAYERS.values(), ids=LAYERS)
def test_layers_have_stable_names_and_their_shapes(
    make: Callable[[], nn.Module], expected: dict[str, tuple[int, ...]]
) -> None:
    assert list(shapes(make()).items()) == list(expected.items())


def test_depth_order_is_the_order_of_registration_not_of_names_or_use() -> None:
    module = nn.Module()
    for name in ("z", "b", "a10", "a9"):
        module.add_module(name, nn.Linear(2, 2))
    assert names(module) == ["z", "b", "a10", "a9"]


def test_frozen_layers_are_layers() -> None:
    assert names(network().requires_grad_(False)) == NAMES


def test_layers_on_the_meta_device_are_layers() -> None:
    with torch.device("meta"):
        assert names(network()) == NAMES


def test_the_tensors_are_the_parameters_themselves() -> None:
    module = network()
    assert select_layers(module)["block.fc"] is module["block"]["fc"].weight


def test_lazy_layers_appear_once_they_are_initialized() -> None:
    module = nn.Sequential(nn.LazyConv2d(2, 3), nn.Flatten(), nn.LazyLinear(3), nn.Linear(3, 2))
    assert names(module) == ["3"]
    module(torch.ones(1, 1, 4, 4))
    assert shapes(module) == {"0": (2, 1, 3, 3), "2": (3, 8), "3": (2, 3)}


# --- tied tensors ---


def language_model() -> nn.ModuleDict:
    module = nn.ModuleDict({"head": nn.Linear(3, 5, bias=False), "body": nn.Linear(3, 3), "tokens": nn.Embedding(5, 3)})
    module["head"].weight = module["tokens"].weight
    return module


@pytest.mark.contract("H10")
def test_a_head_tied_to_an_embedding_is_no_layer_whichever_comes_first() -> None:
    assert names(language_model()) == ["body"]


@pytest.mark.contract("H10")
def test_a_tied_embedding_can_be_asked_for_under_its_first_name() -> None:
    assert names(language_model(), include=["*", "Embedding"]) == ["head", "body"]
    assert names(language_model(), include=["head"]) == ["head"]


@pytest.mark.contract("H10")
def test_tied_layers_count_once_under_the_first_name() -> None:
    module = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3)})
    module["decoder"].weight = module["encoder"].weight
    assert names(module) == ["encoder"]


def test_a_module_that_stands_twice_counts_once() -> None:
    block = nn.Sequential(nn.Linear(3, 3))
    assert names(nn.ModuleDict({"first": block, "second": block})) == ["first.0"]
