"""What layers are called: neither wrapping a module nor rewriting a weight changes it, and odd names stay."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from selected import NAMES, holder, names, network, shapes
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

from pl_layer_rotation import select_layers

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


# --- hostile names ---


HOSTILE = ["a/b", "a b", "a[0]", "x:y", '"quoted"', "<b>", "é", "层", "__proto__", "n" * 300, "*", "?", "weight", "\n"]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_hostile_names_stay_as_they_are(name: str) -> None:
    module = nn.Module()
    module.add_module(name, nn.Linear(2, 2))
    module.add_module("other", nn.Linear(2, 2))
    assert names(module) == [name, "other"]


def test_selecting_leaves_the_module_alone() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).eval()).requires_grad_(False)
    before = {key: (id(p), p._version, p.requires_grad) for key, p in module.named_parameters()}
    select_layers(module)
    assert {key: (id(p), p._version, p.requires_grad) for key, p in module.named_parameters()} == before
    assert [layer.training for layer in module] == [True, False]
