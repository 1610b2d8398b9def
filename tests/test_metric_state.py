"""What LayerRotation keeps: memory, copies, results that were handed out, its state dict, dtypes and devices."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from readings import Reading, assert_reads, distances, move, network, weights
from torch import nn

from pl_layer_rotation import LayerRotation

# --- what a metric keeps ---


@pytest.mark.contract("M16", "M18")
def test_the_module_is_neither_changed_nor_kept_alive() -> None:
    module = network()
    before = {name: (p._version, p.detach().clone()) for name, p in module.named_parameters()}
    rotation = LayerRotation(module)
    rotation(module)
    assert all(
        p._version == before[name][0] and torch.equal(p, before[name][1]) for name, p in module.named_parameters()
    )
    alive = [weakref.ref(module), weakref.ref(module[0]), weakref.ref(module[0].weight)]
    del module
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


@pytest.mark.contract("M16")
def test_memory_does_not_grow_with_readings() -> None:
    module = network()
    rotation = LayerRotation(module)
    rotation(module)
    size = len(pickle.dumps(rotation))
    for seed in range(50):
        move(module, seed)
        rotation(module)
    assert len(pickle.dumps(rotation)) <= size + 100


COPIES: dict[str, Callable[[LayerRotation], LayerRotation]] = {
    "clone": lambda metric: metric.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda metric: pickle.loads(pickle.dumps(metric)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("updates", [0, 2], ids=["before", "after updates"])
@pytest.mark.contract("M7")
def test_copies_are_equal_and_independent(copied: Callable[[LayerRotation], LayerRotation], updates: int) -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    for seed in range(updates):
        move(module, seed)
        rotation.update(module)
    other = copied(rotation)
    assert (other.update_count, torch.equal(other.sums, rotation.sums)) == (updates, True)
    move(module, 9)
    assert_reads(other(module), distances(weights(module), start))
    assert rotation.update_count == updates
    assert_reads(rotation(module), distances(weights(module), start))


@pytest.mark.contract("M7")
def test_two_metrics_have_different_hashes_and_a_name() -> None:
    module = network()
    first, second = LayerRotation(module), LayerRotation(module)
    assert hash(first) != hash(second)
    assert repr(first) == "LayerRotation()"


@pytest.mark.parametrize("edit", [lambda r: r["0"].fill_(7), lambda r: r.clear()], ids=["a value", "the dictionary"])
@pytest.mark.contract("M6")
def test_editing_a_result_does_not_change_the_next_one(edit: Callable[[Reading], object]) -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    move(module)
    rotation.update(module)
    edit(rotation.compute())
    assert_reads(rotation.compute(), distances(weights(module), start))


def test_editing_the_result_of_forward_does_not_change_the_state() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module, compute_with_cache=False)
    move(module)
    rotation(module)["0"].fill_(7)
    assert_reads(rotation.compute(), distances(weights(module), start))


@pytest.mark.contract("M6")
def test_earlier_results_stay_as_they_were() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    move(module)
    expected = distances(weights(module), start)
    results = [rotation(module), rotation.compute()]
    move(module, 2)
    rotation(module)
    rotation.reset()
    for result in results:
        assert_reads(result, expected)


@pytest.mark.contract("M8")
def test_state_dict_is_empty_by_default() -> None:
    module = network()
    rotation = LayerRotation(module)
    rotation(module)
    assert rotation.state_dict() == {}


@pytest.mark.contract("M8")
def test_a_persistent_state_survives_a_file() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    rotation.persistent(True)
    move(module)
    rotation.update(module)
    file = io.BytesIO()
    torch.save(rotation.state_dict(), file)
    file.seek(0)
    other = LayerRotation(module)
    other.persistent(True)
    other.load_state_dict(torch.load(file, weights_only=True))
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert_reads(other.compute(), distances(weights(module), start))


@pytest.mark.contract("M9")
def test_the_constants_of_the_metric_are_fixed() -> None:
    rotation = LayerRotation(network())
    assert (rotation.is_differentiable, rotation.higher_is_better) == (False, None)
    with pytest.raises(RuntimeError, match="Can't change const `higher_is_better`"):
        rotation.higher_is_better = True


# --- dtypes and devices ---


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "to bfloat16": lambda module: module.to(torch.bfloat16),
    "to another tensor's dtype": lambda module: module.to(torch.ones(1, dtype=torch.float16)),
    "cpu": lambda module: module.cpu(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
@pytest.mark.contract("M10")
def test_a_cast_of_the_parent_module_rounds_neither_state_nor_reference(
    cast: Callable[[nn.Module], object], dtype: torch.dtype
) -> None:
    measured = network(dtype)
    parent = nn.ModuleDict({"rotation": LayerRotation(measured)})
    start, rotation = weights(measured), parent["rotation"]
    cast(parent)
    move(measured, size=1e-4)
    assert_reads(rotation(measured), distances(weights(measured), start), rel=1e-4)
    assert rotation.sums.dtype == torch.float64


@pytest.mark.contract("M10")
def test_a_module_turned_to_bfloat16_is_measured_from_its_unrounded_start() -> None:
    module = network()
    start = weights(module)
    module.add_module("rotation", LayerRotation(module))
    module.to(torch.bfloat16)
    assert_reads(module.rotation(module), distances(weights(module), start), rel=1e-4)
    assert float(module.rotation.compute()["3"]) > 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.contract("M10")
def test_set_dtype_is_harmless(dtype: torch.dtype) -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    rotation.set_dtype(dtype)
    move(module, size=1e-4)
    assert_reads(rotation(module), distances(weights(module), start), rel=1e-4)


@pytest.mark.contract("M10")
def test_state_and_reference_move_with_the_parent() -> None:
    rotation = LayerRotation(network())
    nn.ModuleDict({"rotation": rotation}).to("meta")
    assert {tensor.device.type for tensor in (rotation.sums, *rotation._references)} == {"meta"}


@pytest.mark.contract("M17")
def test_inference_mode_leaves_a_usable_metric_behind() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    with torch.inference_mode():
        rotation(module)
        rotation.reset()
        other = rotation.clone()
    move(module)
    for metric in (rotation, other):
        assert_reads(metric(module), distances(weights(module), start))
        metric.reset()
        metric.update(module)
        assert_reads(metric.compute(), distances(weights(module), start))


@pytest.mark.contract("M17")
def test_a_metric_made_in_inference_mode_works_outside() -> None:
    module = network()
    start = weights(module)
    with torch.inference_mode():
        rotation = LayerRotation(module)
    move(module)
    assert_reads(copy.deepcopy(rotation)(module), distances(weights(module), start))
    assert_reads(rotation(module), distances(weights(module), start))
