"""What layer_rotation and LayerRotation read against numpy (how exactly: test_geometry_distance), what they refuse."""

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from readings import assert_reads, distances, move, network, weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pl_layer_rotation import LayerRotation, layca_optimizers, layca_param_groups, layer_rotation, select_layers

# --- the function ---


def test_function_gives_a_float64_scalar_without_gradient() -> None:
    distance = layer_rotation(torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor([1.0, 1.0]))
    assert float(distance) == pytest.approx(1 - np.sqrt(0.5), rel=1e-7, abs=0)
    assert (distance.dtype, distance.shape, distance.requires_grad) == (torch.float64, (), False)


@pytest.mark.contract("M5")
def test_function_refuses_different_shapes() -> None:
    text = (
        "`weights` and `reference` must have the same shape, got (2, 3) and (3, 2). Pass the same layer at two times."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        layer_rotation(torch.ones(2, 3), torch.ones(3, 2))


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=["sharded", "replicated"])
@pytest.mark.contract("M18")
def test_function_reads_distributed_tensors(placement: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    now, start = torch.randn(6, 4), torch.randn(6, 4)
    expected = layer_rotation(now, start)
    assert torch.equal(layer_rotation(*(distribute_tensor(t, mesh, [placement]) for t in (now, start))), expected)


# --- readings ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-2, 1.0], ids="moved by {:g}".format)
@pytest.mark.contract("M1")
def test_a_reading_is_the_distance_from_the_weights_at_construction(dtype: torch.dtype, size: float) -> None:
    module = network(dtype)
    start, rotation = weights(module), LayerRotation(module)
    move(module, size=size)
    rel = 1e-9 if dtype == torch.float64 else 1e-5
    assert_reads(rotation(module), distances(weights(module), start), rel)


@pytest.mark.contract("M3")
def test_unmoved_weights_read_exactly_zero() -> None:
    module = network()
    assert LayerRotation(module)(module) == {"0": 0, "3": 0}


@pytest.mark.contract("M9")
def test_values_are_float64_scalars_without_gradient() -> None:
    module = network()
    reading = LayerRotation(module)(module)
    assert {(v.dtype, v.shape, v.requires_grad) for v in reading.values()} == {(torch.float64, (), False)}


@pytest.mark.contract("M2")
def test_an_update_replaces_the_last_reading() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    for seed in range(3):
        move(module, seed)
        rotation.update(module)
    assert_reads(rotation.compute(), distances(weights(module), start))


@pytest.mark.contract("M6")
def test_forward_update_and_compute_agree_and_count_updates() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    move(module)
    expected = distances(weights(module), start)
    assert_reads(rotation(module), expected)
    assert_reads(rotation.compute(), expected)
    rotation.update(module)
    assert_reads(rotation.compute(), expected)
    assert rotation.update_count == 2


@pytest.mark.contract("M6")
def test_an_update_after_compute_changes_the_value() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    assert_reads(rotation(module), {"0": 0, "3": 0})
    move(module)
    assert_reads(rotation.compute(), {"0": 0, "3": 0})
    rotation.update(module)
    assert_reads(rotation.compute(), distances(weights(module), start))


@pytest.mark.contract("M6")
def test_compute_before_update_warns_and_knows_nothing() -> None:
    rotation = LayerRotation(network())
    with pytest.warns(UserWarning, match="``compute`` method of metric LayerRotation was called before the ``update``"):
        reading = rotation.compute()
    assert all(value.isnan() for value in reading.values())


@pytest.mark.contract("M6")
def test_reset_forgets_the_reading_but_not_the_reference() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    move(module)
    rotation.update(module)
    rotation.reset()
    assert (rotation.update_called, rotation.sums.any()) == (False, False)
    assert_reads(rotation(module), distances(weights(module), start))


@pytest.mark.contract("M4")
def test_a_layer_with_nan_reads_nan_and_the_others_are_right() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    move(module)
    with torch.no_grad():
        module[0].weight[0, 0, 0, 0] = torch.nan
    reading = rotation(module)
    assert reading["0"].isnan()
    assert float(reading["3"]) == pytest.approx(distances(weights(module), start)["3"], rel=1e-6, abs=0)


@pytest.mark.contract("M4")
def test_a_layer_that_starts_at_zero_reads_nan_for_good() -> None:
    module = network()
    nn.init.zeros_(module[3].weight)
    rotation = LayerRotation(module)
    for seed in range(20):
        move(module, seed)
        assert rotation(module)["3"].isnan()


@pytest.mark.contract("M21")
def test_ten_thousand_layers_are_one_state() -> None:
    module = nn.ParameterList([torch.eye(2) for _ in range(10_000)])
    rotation = LayerRotation(module)
    with torch.no_grad():
        module[7_000].copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    reading = rotation(module)
    assert rotation.sums.shape == (10_000, 4)
    assert float(reading.pop("7000")) == pytest.approx(1 - np.sqrt(0.5), rel=1e-6, abs=0)
    assert set(map(float, reading.values())) == {0}


@pytest.mark.parametrize(
    ("options", "names"),
    [({"include": "Linear"}, ["3"]), ({"exclude": ["3"]}, ["0"]), ({"include": ["0", "3"]}, ["0", "3"])],
    ids=["include", "exclude", "both by name"],
)
def test_patterns_choose_the_measured_layers(options: dict[str, Any], names: list[str]) -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module, **options)
    move(module)
    expected = distances(weights(module), start)
    assert_reads(rotation(module), {name: expected[name] for name in names})


def test_a_copy_of_the_module_can_be_read() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    other = copy.deepcopy(module)
    move(other)
    assert_reads(rotation(torch.compile(other)), distances(weights(other), start))


# --- errors ---


@pytest.mark.contract("M5")
@pytest.mark.parametrize(
    ("module", "options"),
    [(nn.BatchNorm1d(3), {}), (nn.Embedding(3, 2), {}), (nn.LazyLinear(3), {}), (nn.Linear(3, 2), {"include": []})],
    ids=["normalization", "embedding", "lazy", "no pattern"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_module_without_layers_is_an_error(module: nn.Module, options: dict[str, Any]) -> None:
    text = f"`module` must have a layer to measure, got {type(module).__name__}, of whose parameters none is selected"
    with pytest.raises(ValueError, match=text):
        LayerRotation(module, **options)


def test_patterns_may_be_read_once_only() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    rotation = LayerRotation(module, include=(name for name in ["1"]))  # type: ignore[arg-type]
    assert list(rotation(module)) == list(rotation(module)) == ["1"]


def test_weights_in_the_place_of_patterns_are_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(MisconfigurationException, match=r"`include` must hold patterns as strings, got \{'0': tensor"):
        LayerRotation(module, {"0": module[0].weight.detach()})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "kind"), [(nn.Linear(2, 2).parameters(), "generator"), ({}, "dict"), (None, "None")]
)
def test_what_is_no_module_is_refused(module: Any, kind: str) -> None:
    takers: list[Any] = [LayerRotation, select_layers, layca_optimizers, layca_param_groups]
    for take in takers:
        with pytest.raises(TypeError, match=f"`module` must be an nn.Module, got {kind}.*Pass the module itself"):
            take(module)


def test_a_reading_has_no_gradient() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    assert not layer_rotation(weight, torch.tensor([[2.0, 1.0]])).requires_grad


@pytest.mark.parametrize(
    ("make", "described"),
    [
        (lambda: nn.Linear(2, 2), "weight (2, 2)"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.ReLU(), nn.Linear(16, 3)),
            "0 (4, 1, 5, 5), 3 (3, 16)",
        ),
        (lambda: network()[:3], "0 (4, 1, 3, 3)"),
        (nn.ReLU, ""),
    ],
    ids=["other names", "another shape", "a layer is missing", "no layers"],
)
@pytest.mark.contract("M5")
def test_reading_another_module_is_an_error(make: Callable[[], nn.Module], described: str) -> None:
    text = (
        "`module` must have the layers that this metric was made for, 0 (4, 1, 3, 3), 3 (3, 16), "
        f"got {described}. Make a new LayerRotation for this module."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        LayerRotation(network()).update(make())


def test_errors_about_many_layers_stay_readable() -> None:
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11)))
    with pytest.raises(ValueError, match=re.escape("7 (1, 1) and 3 more, got weight (1, 1).")):
        LayerRotation(module).update(nn.Linear(1, 1))


def test_a_reading_that_fails_leaves_the_last_one() -> None:
    module = network()
    rotation = LayerRotation(module, compute_with_cache=False)
    move(module)
    before = rotation(module)
    with pytest.raises(ValueError, match="must have the layers that this metric was made for"):
        rotation.update(nn.Linear(2, 2))
    assert_reads(rotation.compute(), {name: float(value) for name, value in before.items()})


@pytest.mark.contract("M5")
def test_unknown_metric_options_are_an_error() -> None:
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `reduction`"):
        LayerRotation(network(), reduction="mean")
