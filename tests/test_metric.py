"""LayerRotation as a torchmetrics metric: readings against float64 numpy, and what users of metrics take for granted.

How exact the distance itself is, is tested in `test_geometry`.
"""

import copy
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from nets import Net, batches, trainer
from readings import Reading, assert_reads, distances, move, network, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrizations, prune
from torchmetrics import Metric, MetricCollection

from pl_layer_rotation import LayerRotation, layer_rotation, select_layers

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


# --- the reference ---


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


# --- errors ---


@pytest.mark.contract("M5")
def test_a_module_without_layers_is_an_error() -> None:
    text = (
        "`module` must have a layer to measure, got BatchNorm1d without a parameter of two or more dimensions. "
        "Pass the module that holds the network."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        LayerRotation(nn.BatchNorm1d(3))


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


# --- together with the rest of torchmetrics and Lightning ---


@pytest.mark.contract("M12")
def test_a_collection_puts_its_prefix_in_front_of_every_layer() -> None:
    module = network()
    start = weights(module)
    metrics = MetricCollection([LayerRotation(module)], prefix="rotation/")
    move(module)
    expected = {f"rotation/{name}": value for name, value in distances(weights(module), start).items()}
    assert_reads(metrics(module), expected)
    assert_reads(metrics.compute(), expected)


@pytest.mark.contract("M12")
def test_metrics_with_different_references_stay_apart_in_a_collection() -> None:
    module = network()
    start, metrics = weights(module), {"init": LayerRotation(module)}
    move(module)
    middle = weights(module)
    collection = MetricCollection({**metrics, "epoch": LayerRotation(module)})
    for seed in (2, 3):
        move(module, seed)
        collection.update(module)
    expected = {"init": distances(weights(module), start), "epoch": distances(weights(module), middle)}
    assert_reads(collection.compute(), {f"{k}_{n}": v for k in ("epoch", "init") for n, v in expected[k].items()})


@pytest.mark.contract("M12")
def test_metrics_on_twins_that_start_equal_stay_apart_in_a_collection() -> None:
    module = nn.ModuleDict({"student": nn.Linear(4, 3), "teacher": nn.Linear(4, 3)})
    module["teacher"].load_state_dict(module["student"].state_dict())
    collection = MetricCollection({name: LayerRotation(module, include=name) for name in ("student", "teacher")})
    collection.update(module)
    move(module["student"])
    collection.update(module)
    reading = collection.compute()
    assert float(reading["teacher"]) == 0
    assert float(reading["student"]) > 0


@pytest.mark.contract("M20")
def test_plot_returns_a_figure_and_its_axes() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("matplotlib.pyplot").switch_backend("Agg")
    module = network()
    rotation = LayerRotation(module)
    rotation(module)
    figure, axes = rotation.plot()
    matplotlib.pyplot.close(figure)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert axes.get_ylim()[0] <= 0


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:FutureWarning", "ignore:This property will be removed:DeprecationWarning"
)
@pytest.mark.contract("M14")
def test_the_metric_can_be_scripted() -> None:
    assert torch.jit.script(LayerRotation(network())) is not None


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sync in forward": {"dist_sync_on_step": True},
    "no sync": {"sync_on_compute": False},
    "compute on cpu": {"compute_on_cpu": True},
    "no cache": {"compute_with_cache": False},
}


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("placement", [None, Shard(0), Replicate()], ids=["plain", "sharded", "replicated"])
@pytest.mark.contract("M1", "M15")
def test_one_process_of_a_group_reads_all_kinds_of_tensors(placement: Any, options: dict[str, Any]) -> None:
    module = network()
    start = weights(module)
    if placement is not None:
        layer = distribute_tensor(module[3].weight.detach(), init_device_mesh("cpu", (1,)), [placement])
        module[3].weight = nn.Parameter(layer)
    rotation = LayerRotation(module, **options)
    with torch.no_grad():
        module[3].weight.mul_(1.5).sub_(0.25)
    now = {**start, "3": start["3"] * 1.5 - 0.25}
    expected = {"0": 0.0, "3": distances(now, start)["3"]}
    assert_reads(rotation(module), expected)
    assert_reads(rotation.compute(), expected)


class Measured(Net):
    """The lines that the docstring shows for a LightningModule."""

    rotation: Metric

    def on_train_start(self) -> None:
        self.rotation = LayerRotation(self)

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        self.log_dict(self.rotation(self))
        return super().training_step(batch, batch_idx)


@pytest.mark.contract("M19")
def test_a_lightning_module_logs_the_rotation_of_its_layers() -> None:
    module = Measured()
    states: list[dict[str, Tensor]] = []

    class Save(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            states.append(copy.deepcopy(module.state_dict()))

    fitted = trainer(Save())
    fitted.fit(module, batches())
    expected = {
        n: float(layer_rotation(states[-1][f"{n}.weight"], states[0][f"{n}.weight"])) for n in ("body.0", "head")
    }
    logged = {name: float(value) for name, value in fitted.callback_metrics.items()}
    assert logged == pytest.approx(expected, rel=1e-5, abs=0)
    assert min(logged.values()) > 1e-4
