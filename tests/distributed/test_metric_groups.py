"""The metric on real processes: groups of its own, orders of layers, merging, and what it says to the others."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cpu_fsdp import DEPRECATIONS
from processes import launch
from test_fsdp1 import PIECES, WRAPS, Net, processes, wrapped
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from pl_layer_rotation import LayerRotation, layer_rotation, select_layers

pytestmark = pytest.mark.filterwarnings(*DEPRECATIONS)

SHAPES = {"cut": (5, 4), "columns": (3, 6), "one_row": (1, 7), "whole": (2, 3), "plain": (4, 3)}
PLACEMENTS: dict[str, Any] = {"cut": Shard(0), "columns": Shard(1), "one_row": Shard(0), "whole": Replicate()}


def randn(name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + sorted(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def layers(mesh: Any, names: Any = tuple(SHAPES)) -> nn.ParameterDict:
    """Layers of all kinds over a mesh; every dimension of it but the last holds replicas."""

    def spread(name: str) -> Tensor:
        if name not in PLACEMENTS:
            return randn(name)
        return distribute_tensor(randn(name), mesh, [*[Replicate()] * (mesh.ndim - 1), PLACEMENTS[name]])

    return nn.ParameterDict({name: nn.Parameter(spread(name)) for name in names})


def move(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(parameter.square(), alpha=0.1)


def expected(name: str) -> float:
    w, o = ((randn(name) + moved * randn(name).square()).flatten().numpy() for moved in (0.1, 0))
    chord = w / np.linalg.norm(w) - o / np.linalg.norm(o)
    return float(chord @ chord / 2)


def values(reading: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in reading.items()}


EXPECTED = {name: pytest.approx(expected(name), rel=1e-9, abs=0) for name in SHAPES}


# --- synchronization ---


def every_option(rank: int) -> list[dict[str, float]]:
    dist.init_process_group("gloo")
    module = layers(init_device_mesh("cpu", (2,)))
    options: list[dict[str, Any]] = [{}, {"dist_sync_on_step": True}, {"compute_on_cpu": True}]
    metrics = [LayerRotation(module, **option) for option in options]
    move(module)
    return [values(reading) for metric in metrics for reading in (metric(module), metric.compute())]


@pytest.mark.contract("M1", "M15")
def test_both_ways_of_synchronization_read_the_whole_layers() -> None:
    for readings in launch(every_option):
        assert readings == [EXPECTED] * 6


def sync_and_unsync(rank: int) -> tuple[bool, bool]:
    dist.init_process_group("gloo")
    module = layers(init_device_mesh("cpu", (2,)))
    rotation = LayerRotation(module)
    move(module)
    rotation.update(module)
    before = rotation.sums
    rotation.sync()
    gathered = [torch.empty_like(before) for _ in range(2)]
    dist.all_gather(gathered, before)
    summed = torch.equal(rotation.sums, gathered[0] + gathered[1])
    rotation.unsync()
    return summed, torch.equal(rotation.sums, before)


@pytest.mark.contract("M15")
def test_sync_adds_up_and_unsync_gives_the_local_sums_back() -> None:
    assert launch(sync_and_unsync) == [(True, True)] * 2


def read_without_sync(rank: int) -> tuple[dict[str, float], list[list[float]]]:
    dist.init_process_group("gloo")
    module = layers(init_device_mesh("cpu", (2,)))
    rotation = LayerRotation(module, sync_on_compute=False)
    move(module)
    with mock.patch.object(dist, "all_gather", side_effect=AssertionError("a collective")):
        return values(rotation(module)), rotation.reading.tolist()


@pytest.mark.contract("M11", "M13")
def test_without_synchronization_pieces_are_read_and_merging_them_reads_the_whole() -> None:
    (first, state), (_, other) = launch(read_without_sync)
    assert {name: first[name] for name in ("whole", "plain")} == {name: EXPECTED[name] for name in ("whole", "plain")}
    start = randn("cut")[:3]
    assert first["cut"] == pytest.approx(float(layer_rotation(start + 0.1 * start.square(), start)), rel=1e-9)
    module = nn.ParameterDict({name: nn.Parameter(randn(name)) for name in SHAPES})
    merged = LayerRotation(module)
    for reading in (state, other):
        merged.merge_state({"reading": torch.tensor(reading, dtype=torch.float64)})
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert values(merged.compute()) == EXPECTED


def read_in_two_groups(rank: int) -> dict[str, float]:
    """Each half of the processes holds its own copy of the layers and reads it alone; the halves move differently."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    module = layers(mesh["shard"])
    rotation = LayerRotation(module, process_group=mesh["shard"].get_group())
    if rank < 2:
        move(module)
    reading = values(rotation(module))
    # One half may be ahead of the other: nobody waits for it.
    return reading if rank < 2 else values(rotation(module))


@pytest.mark.contract("M13")
def test_a_group_of_its_own_is_what_pieces_are_added_up_over() -> None:
    first, second, *still = launch(read_in_two_groups, world=4)
    assert first == second == EXPECTED
    assert still == [dict.fromkeys(SHAPES, 0.0)] * 2


def weights_of_shares(rank: int) -> dict[str, float]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    module = layers(mesh["shard"])
    rotation = LayerRotation(module, process_group=mesh["shard"].get_group())
    rotation.update(module)
    rotation.sync()
    return dict(zip(sorted(SHAPES), rotation.sums[:, 2].tolist(), strict=True))


@pytest.mark.contract("M13")
def test_synchronized_sums_are_those_of_the_layer_once() -> None:
    """A wrong number of processes in the shares would cancel in every reading."""
    squares = {name: pytest.approx(float(randn(name).square().sum()), rel=1e-12) for name in SHAPES}
    assert launch(weights_of_shares, world=4) == [squares] * 4


def read_in_a_group_without_all_pieces(rank: int) -> str:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    module = layers(mesh)
    rotation = LayerRotation(module, process_group=mesh["copy"].get_group())
    with pytest.raises(ValueError, match="must hold every piece") as error:
        rotation(module)
    return str(error.value)


@pytest.mark.contract("M13")
def test_a_group_that_lacks_pieces_of_a_layer_is_an_error() -> None:
    text = (
        "`process_group` must hold every piece of a layer equally often, got one of 2 processes, which does not for "
        "'columns', cut in 2. Leave it out, or pass the group of the layer's device mesh."
    )
    assert launch(read_in_a_group_without_all_pieces, world=4) == [text] * 4


def read_in_the_group_of_another(rank: int) -> str:
    dist.init_process_group("gloo")
    group = dist.new_group([0])
    module = nn.Linear(2, 3)
    rotation = LayerRotation(module, process_group=group)
    if rank == 0:
        return str(values(rotation(module)))
    with pytest.raises(ValueError, match="must be one that this process is in") as error:
        rotation(module)
    return str(error.value)


@pytest.mark.contract("M13")
def test_a_process_outside_of_the_group_has_no_reading() -> None:
    text = (
        "`process_group` must be one that this process is in, got one of others. Read the module on its members only."
    )
    assert launch(read_in_the_group_of_another) == ["{'weight': 0.0}", text]


def read_in_another_order(rank: int) -> tuple[list[str], dict[str, float]]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    module = layers(mesh)
    turned = nn.ParameterDict([(name, module[name]) for name in (reversed(SHAPES) if rank else SHAPES)])
    rotation = LayerRotation(turned)
    move(module)
    return [*rotation.metric_state], values(rotation(turned))


@pytest.mark.contract("M13")
def test_processes_may_register_their_layers_in_any_order() -> None:
    (keys, first), (other_keys, second) = launch(read_in_another_order)
    assert keys == other_keys == ["reading"]
    assert (first, second) == (EXPECTED, EXPECTED)
    assert list(second) == list(reversed(first))


def read_other_layers(rank: int, names: list[list[str]]) -> str:
    dist.init_process_group("gloo")
    module = nn.ParameterDict({name: nn.Parameter(randn(name)) for name in names[rank]})
    rotation = LayerRotation(module)
    with pytest.raises((ValueError, RuntimeError), match=r"same layers|equal size") as error:
        rotation(module)
    return str(error.value)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            [["cut", "whole"], ["cut", "plain"]],
            "`process_group` must be of processes with the same layers, got one with other names or shapes. Pass",
        ),
        ([["cut"], ["cut", "plain"]], "stack expects each tensor to be equal size"),
    ],
    ids=["other names", "more layers"],
)
@pytest.mark.contract("M13")
def test_processes_with_other_layers_are_an_error_on_all_of_them(names: list[list[str]], text: str) -> None:
    for message in launch(read_other_layers, names):
        assert message.startswith(text)


def count_collectives(rank: int) -> tuple[int, int, int]:
    dist.init_process_group("gloo")
    module = nn.ParameterList([torch.eye(2) for _ in range(1000)])
    rotation = LayerRotation(module)
    with mock.patch.multiple(dist, all_gather=mock.DEFAULT, barrier=mock.DEFAULT, all_reduce=mock.DEFAULT) as calls:
        rotation.update(module)
    quiet = sum(call.call_count for call in calls.values())
    with (
        mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathered,
        mock.patch.object(dist, "barrier", wraps=dist.barrier) as waited,
    ):
        rotation.compute()
    return quiet, gathered.call_count, waited.call_count


@pytest.mark.contract("M21")
def test_a_reading_of_many_layers_costs_two_gathers() -> None:
    """Shape and values of the one state; that of a single layer costs the same."""
    assert launch(count_collectives) == [(0, 2, 1)] * 2


# --- references ---


def references(rank: int) -> tuple[dict[str, float], str, str]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    module = layers(mesh)
    start = {name: weight.detach().clone() for name, weight in module.items()}
    move(module)
    reading = values(LayerRotation(module, reference=start)(module))
    # Of the same local shapes, but not the same weights: each process would have read something else.
    partial = DTensor.from_local(start["whole"].to_local(), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="must be sharded as the module is") as error:
        LayerRotation(module, include="whole", reference={"whole": partial})
    with pytest.raises(ValueError, match="must be sharded alike") as function_error:
        layer_rotation(module["cut"], distribute_tensor(randn("cut"), mesh, [Replicate()]))
    return reading, str(error.value), str(function_error.value)


@pytest.mark.contract("M2")
def test_a_reference_must_be_sharded_as_the_weights_are() -> None:
    for reading, text, function_text in launch(references):
        assert reading == EXPECTED
        assert text == (
            "`reference` must be sharded as the module is, got placements (Shard(dim=0),) for 'whole', whose weights "
            "have (Replicate(),). Distribute it as the module's parameters are."
        )
        assert function_text == (
            "`weights` and `reference` must be sharded alike, got placements (Shard(dim=0),) and (Replicate(),). "
            "Distribute the reference as the weights are."
        )


# --- FSDP1 ---


def read_under_fsdp1(rank: int, strategy: str, wrap: str) -> list[tuple[float, float]]:
    """Readings, and what float64 gives for the whole weights, after three steps."""
    dist.init_process_group("gloo")
    model = wrapped(Net().double(), strategy, wrap)

    def whole() -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(model):
            return {name: weight.detach().clone() for name, weight in select_layers(model).items()}

    start, rotation = whole(), LayerRotation(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        model(torch.randint(0, 5, (2, 6), generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    reading = rotation(model)
    return [(float(reading[name]), float(layer_rotation(now, start[name]))) for name, now in whole().items()]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("strategy", PIECES)
@pytest.mark.contract("M2")
def test_fsdp1_in_float64_reads_the_whole_weights(strategy: str, wrap: str) -> None:
    for pairs in launch(read_under_fsdp1, strategy, wrap, world=processes(strategy)):
        ours, theirs = zip(*pairs, strict=True)
        assert ours == pytest.approx(theirs, rel=0, abs=1e-9)
        assert max(ours) > 1e-4


def fsdp1_in_groups(rank: int) -> tuple[bool, str]:
    dist.init_process_group("gloo")
    model = wrapped(Net(), "HYBRID_SHARD", "root")
    # FSDP1 of two by two processes: 0 and 1 share the weights, as 2 and 3 do.
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    mine = LayerRotation(model, process_group=groups[rank // 2])
    before = LayerRotation(model)(model)
    with pytest.raises(ValueError, match="must hold every piece of a layer equally often") as error:
        LayerRotation(model, process_group=groups[2 + rank % 2]).update(model)
    return values(mine(model)) == values(before), str(error.value)


@pytest.mark.contract("M13")
def test_the_group_of_fsdp1_is_known() -> None:
    for same, text in launch(fsdp1_in_groups, world=4):
        assert same
        assert "got one of 2 processes, which does not for 'attention.in_proj_weight', cut in 2" in text
