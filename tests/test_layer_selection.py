"""Which tensors are layers, what they are called, and that wrapping a module changes neither."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

from pl_layer_rotation import select_layers

NAMES = ["stem", "block.conv", "block.fc", "head"]


def network() -> nn.ModuleDict:
    block = nn.ModuleDict({"norm": nn.LayerNorm([4, 4]), "conv": nn.Conv2d(2, 2, 3), "fc": nn.Linear(4, 4)})
    return nn.ModuleDict({"stem": nn.Conv2d(1, 2, 3), "bn": nn.BatchNorm2d(2), "block": block, "head": nn.Linear(4, 3)})


def holder(**parameters: Tensor) -> nn.Module:
    """A module with these bare parameters."""
    module = nn.Module()
    for name, tensor in parameters.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return module


def shapes(module: nn.Module, **options: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in select_layers(module, **options).items()}


def names(module: nn.Module, **options: Any) -> list[str]:
    return list(select_layers(module, **options))


# --- wrapping ---


def with_wrapped_block(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.ModuleDict], nn.Module]:
    def wrapped(module: nn.ModuleDict) -> nn.Module:
        module["block"] = wrap(module["block"])
        return module

    return wrapped


WRAPPINGS: dict[str, Callable[[nn.ModuleDict], nn.Module]] = {
    "plain": lambda module: module,
    "compiled": torch.compile,
    "block compiled": with_wrapped_block(torch.compile),
    "block checkpointed": with_wrapped_block(checkpoint_wrapper),
    "block checkpointed and compiled": with_wrapped_block(lambda block: torch.compile(checkpoint_wrapper(block))),
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp, then compiled": lambda module: torch.compile(nn.parallel.DistributedDataParallel(module)),
    "compiled, then ddp": lambda module: nn.parallel.DistributedDataParallel(torch.compile(module)),
    "fabric": lambda module: Fabric(accelerator="cpu", devices=1).setup(module),
    "fabric over compiled": lambda module: Fabric(accelerator="cpu", devices=1).setup(torch.compile(module)),
}


@pytest.mark.contract("H12")
@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_wrapping_changes_neither_names_nor_order_nor_tensors(wrap: Callable[[nn.ModuleDict], nn.Module]) -> None:
    module = network()
    before = select_layers(module)
    after = select_layers(wrap(module))
    assert list(after) == NAMES
    assert all(after[name] is before[name] for name in NAMES)


@pytest.mark.contract("H12")
@pytest.mark.usefixtures("single_process_group")
def test_sharding_keeps_names_order_and_whole_shapes() -> None:
    module, mesh = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Linear(4, 4))), init_device_mesh("cpu", (1,))
    before = shapes(module)
    fully_shard(module[1], mesh=mesh)
    fully_shard(module, mesh=mesh)
    assert list(shapes(module).items()) == list(before.items())


def fsdp1(module: nn.Module, use_orig_params: bool) -> nn.Module:
    return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


# Cut in pieces: tests/distributed/test_fsdp1.py.
@pytest.mark.usefixtures("single_process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # with one process
@pytest.mark.parametrize("what", ["all", "a block", "both"])
def test_fsdp1_keeps_names_order_and_whole_shapes(what: str) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)))
    before = shapes(module)
    if what != "all":
        module[1] = fsdp1(module[1], use_orig_params=True)
    after = fsdp1(module, use_orig_params=True) if what != "a block" else module
    assert list(shapes(after).items()) == list(before.items()) == [("0", (2, 1, 3, 3)), ("1.1", (4, 4))]


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # with one process
def test_parameters_that_fsdp1_put_into_one_are_an_error() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    module[1] = fsdp1(module[1], use_orig_params=False)
    text = (
        "`module` must keep its parameters apart, got Sequential with '1._flat_param', all of them in one tensor. Use "
        "FSDPStrategy with `use_orig_params=True`, Lightning's default, or ModelParallelStrategy with `fully_shard` "
        "(FSDP2)."
    )
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        select_layers(module)


def test_a_piece_of_which_no_wrapper_is_in_sight_is_an_error() -> None:
    module = holder(piece=torch.ones(3))
    module.piece._fsdp_flattened = True  # as FSDP1 marks it
    with pytest.raises(MisconfigurationException, match=r"must hold the FSDP wrapper .* got Module with 'piece'"):
        select_layers(module)


@pytest.mark.contract("H12")
def test_a_deep_copy_has_the_same_names_and_tensors_of_its_own() -> None:
    module = network()
    before, after = select_layers(module), select_layers(copy.deepcopy(module))
    assert list(after) == NAMES
    assert all(torch.equal(after[name], before[name]) and after[name] is not before[name] for name in NAMES)


def test_a_submodule_called_module_keeps_its_name() -> None:
    assert names(nn.ModuleDict({"module": nn.Linear(2, 2)})) == ["module"]


# --- which tensors are layers ---


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


@pytest.mark.contract("H11")
def test_subclass_of_rms_norm_is_no_layer() -> None:
    assert select_layers(Gain([4, 4])) == {}


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


# --- parametrizations and pruning ---


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


REWRITTEN: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "older weight_norm": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "older spectral_norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "pruned twice": lambda layer: prune.random_unstructured(
        prune.l1_unstructured(layer, "weight", amount=0.5), "weight", amount=0.5
    ),
    "pruned at the bias": lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
}


@pytest.mark.contract("H9")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("rewrite", REWRITTEN.values(), ids=REWRITTEN)
@pytest.mark.parametrize("name", ["block.fc", "head"])
def test_a_rewritten_weight_is_one_layer_with_its_name_and_shape(
    name: str, rewrite: Callable[[nn.Module], object]
) -> None:
    module = network()
    before = shapes(module)
    rewrite(module.get_submodule(name))
    assert list(shapes(module).items()) == list(before.items())
    assert select_layers(module)[name].requires_grad


@pytest.mark.contract("H9")
@pytest.mark.parametrize("rewrite", [parametrizations.weight_norm, old_weight_norm], ids=["new", "older"])
def test_the_gain_of_weight_norm_is_no_layer_even_where_it_is_all_there_is_to_include(
    rewrite: Callable[[nn.Module], nn.Module],
) -> None:
    layer = rewrite(nn.Linear(3, 2))
    assert shapes(layer, include="*") == {"weight": (2, 3)}


def test_patterns_find_a_parametrized_layer_by_the_type_that_it_was_written_with() -> None:
    module = network()
    parametrizations.weight_norm(module["head"])
    assert names(module, include="Linear") == ["block.fc", "head"]


class LowRank(nn.Module):
    """A LoRA-like parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.ones(1, 4))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.down


def test_parameters_of_a_parametrization_have_clean_names_too() -> None:
    module = network()
    parametrize.register_parametrization(module["block"]["fc"], "weight", LowRank())
    assert "block.fc" in names(module)
    assert not any("parametrizations" in name for name in names(module))


@pytest.mark.parametrize("pair", [("scale", "scale_orig"), ("weight", "weight_orig")], ids=" and ".join)
def test_a_parameter_and_its_original_are_two_layers(pair: tuple[str, str]) -> None:
    module = holder(**{name: torch.ones(2, 3) for name in pair})
    assert len(select_layers(module)) == 2


def test_projections_called_g_and_v_are_two_layers() -> None:
    module = holder(**{name: torch.ones(2, 3) for name in ("W_q", "W_k", "W_v", "W_g")})
    assert names(module) == ["W_q", "W_k", "W_v", "W_g"]


def test_equal_clean_names_stay_apart() -> None:
    block = nn.Linear(2, 2)
    block.register_parameter("weight_orig", nn.Parameter(torch.ones(2, 2)))
    assert len(select_layers(nn.ModuleDict({"fc": block}))) == 2


# --- include and exclude ---


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


HOSTILE = ["a/b", "a b", "a[0]", "x:y", '"quoted"', "<b>", "é", "层", "__proto__", "n" * 300, "*", "?", "weight", "\n"]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_hostile_names_stay_as_they_are(name: str) -> None:
    module = nn.Module()
    module.add_module(name, nn.Linear(2, 2))
    module.add_module("other", nn.Linear(2, 2))
    assert names(module) == [name, "other"]


@pytest.mark.contract("H8")
def test_a_literal_bracket_is_written_as_a_set_of_one() -> None:
    module = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2)})
    assert names(module, include="a[0]") == ["a0"]
    assert names(module, include="a[[]0]") == ["a[0]"]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_selecting_leaves_the_module_alone(name: str) -> None:
    module = nn.Module()
    module.add_module(name, nn.Linear(2, 2).eval())
    before = {key: (id(p), p._version, p.requires_grad) for key, p in module.named_parameters()}
    select_layers(module)
    assert {key: (id(p), p._version, p.requires_grad) for key, p in module.named_parameters()} == before
