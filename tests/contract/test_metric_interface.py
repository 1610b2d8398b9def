"""The contract of the metric in one process: what users of torchmetrics take for granted, with values."""

import copy
import math
import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from layer_pairs import exact_distance, turned
from nets import Net, batches, trainer
from readings import assert_reads, distances, move, network, weights
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from pl_layer_rotation import LayerRotation, layer_rotation
from pl_layer_rotation import _geometry as geometry

# --- values ---

# Cosine distances, and the dtypes that can hold weights so near to each other.
DISTANCES = [
    *((distance, torch.float64) for distance in (1e-11, 1e-10, 1e-6, 0.1, 1.0, 1.999, 2 - 1e-9)),
    *((distance, torch.float32) for distance in (1e-10, 1e-6, 0.1, 1.0, 1.999)),
    *((distance, dtype) for distance in (1e-2, 1.0, 1.999) for dtype in (torch.float16, torch.bfloat16)),
]


@pytest.mark.parametrize(("distance", "dtype"), DISTANCES, ids=str)
@pytest.mark.contract("M3")
def test_distances_of_all_sizes_are_right_to_three_digits(distance: float, dtype: torch.dtype) -> None:
    pair = turned(1000, 2 * math.asin(math.sqrt(distance / 2)), 1.5, dtype)
    reading = float(layer_rotation(*pair))
    assert reading == pytest.approx(exact_distance(*pair), rel=1e-3, abs=0)
    assert 0 < reading <= 2


@pytest.mark.parametrize("angle", [1e-4, 1.0], ids="angle {:g}".format)
@pytest.mark.contract("M3")
def test_forty_million_weights_are_read_as_exactly_as_few(angle: float) -> None:
    """Repeated, a pair of tensors keeps its distance."""
    pair = turned(1000, angle, 1.5)
    large = (tensor.repeat(40_000) for tensor in pair)
    assert float(layer_rotation(*large)) == pytest.approx(exact_distance(*pair), rel=1e-4, abs=0)


@pytest.mark.contract("M2")
def test_three_readings_on_end_read_the_last_one() -> None:
    """The case that a summed state got wrong."""
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    for seed in range(3):
        move(module, seed)
        assert_reads(rotation(module), distances(weights(module), start))
    rotation.update(module)
    assert_reads(rotation.compute(), distances(weights(module), start))


class Twins(nn.Module):
    """Names of wrappers are left out of layers' names, so that the three of them would meet."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self._orig_mod = nn.ModuleDict({"fc": nn.Linear(3, 2)})
        self._forward_module = nn.ModuleDict({"fc": nn.Linear(3, 2)})


@pytest.mark.contract("M5")
def test_two_layers_never_share_a_name() -> None:
    module = Twins()
    rotation = LayerRotation(module)
    with torch.no_grad():
        module.fc.weight.neg_()
    assert_reads(rotation(module), {"fc": 2.0, "fc.weight": 0.0, "fc.weight.2": 0.0})


# --- state ---


@pytest.mark.contract("M7")
def test_copies_have_hashes_and_options_of_their_own() -> None:
    rotation = LayerRotation(network(), include="Linear", sync_on_compute=False)
    other = copy.deepcopy(rotation)
    assert hash(other) != hash(rotation)
    assert (other.layer_names, other.sync_on_compute) == (["3"], False)


@pytest.mark.contract("M8")
def test_the_state_of_other_layers_is_refused_at_the_load() -> None:
    rotation, other = LayerRotation(network()), LayerRotation(network()[:1])
    rotation.persistent(True)
    text = (
        "`state_dict` must hold a reading of the same layers, 0 (4, 1, 3, 3), got one of 2 others. "
        "Load it into a metric of the module that it was of."
    )
    with pytest.raises(RuntimeError, match=re.escape(text)):
        other.load_state_dict(rotation.state_dict())


@pytest.mark.contract("M6")
def test_reset_gives_back_the_state_of_a_new_metric_and_keeps_no_reading() -> None:
    module = network()
    rotation = LayerRotation(module)
    fresh = rotation.reading
    move(module)
    rotation(module)
    rotation.reset()
    assert torch.equal(rotation.reading.nan_to_num(-1), fresh.nan_to_num(-1))
    assert (rotation.update_count, rotation._forward_cache, rotation._computed) == (0, None, None)


@pytest.mark.contract("M6", "M15")
def test_a_metric_that_is_in_sync_refuses_a_reading() -> None:
    """As torchmetrics' own: what was added up over processes would be lost, or added up again."""
    module = network()
    start, rotation = weights(module), LayerRotation(module, distributed_available_fn=lambda: True)
    rotation.dist_sync_fn = lambda state, group: [state, state]
    rotation.update(module)
    rotation.sync(rotation.dist_sync_fn)
    move(module)
    with pytest.raises(TorchMetricsUserError, match="shouldn't be synced when performing ``forward``"):
        rotation(module)
    rotation.unsync()
    assert_reads(rotation.compute(), {"0": 0, "3": 0})
    assert_reads(rotation(module), distances(weights(module), start))


# --- devices ---


@pytest.mark.contract("M10")
def test_without_float64_the_state_falls_back_to_fp32_and_small_rotations_keep_four_digits() -> None:
    """The rule of MPS on a CPU: no float64 anywhere."""
    assert geometry.wide_dtype(torch.device("mps")) == torch.float32
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    with mock.patch.object(geometry, "wide_dtype", return_value=torch.float32):
        rotation.cpu()
        move(module, size=1e-4)
        reading = rotation(module)
    assert rotation.reading.dtype == torch.float32
    assert_reads(reading, distances(weights(module), start), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.contract("M10")
def test_the_reference_keeps_its_dtype_where_float64_is_missing(dtype: torch.dtype) -> None:
    rotation = LayerRotation(network(dtype))
    with mock.patch.object(geometry, "wide_dtype", return_value=torch.float32):
        rotation.cpu()
    kept = torch.float32 if dtype == torch.float64 else dtype
    assert {reference.dtype for reference in rotation._references} == {kept}


# --- merging ---


@pytest.mark.parametrize("as_state", [False, True], ids=["metric", "state"])
@pytest.mark.contract("M11")
def test_merging_two_readings_of_the_same_weights_changes_nothing(as_state: bool) -> None:
    module = network()
    start, (first, second) = weights(module), (LayerRotation(module), LayerRotation(module))
    move(module)
    for metric in (first, second):
        metric.update(module)
    first.merge_state(second.metric_state if as_state else second)
    assert_reads(first.compute(), distances(weights(module), start))
    move(module, 2)
    assert_reads(first(module), distances(weights(module), start))


@pytest.mark.contract("M11")
def test_merging_into_an_empty_metric_gives_the_others_reading() -> None:
    module = network()
    start, (empty, full) = weights(module), (LayerRotation(module), LayerRotation(module))
    move(module)
    full.update(module)
    empty.merge_state(full)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert_reads(empty.compute(), distances(weights(module), start))
    assert_reads(full.compute(), distances(weights(module), start))


@pytest.mark.parametrize(
    "make",
    [lambda: network()[:1], lambda: nn.ModuleDict({"0": nn.Linear(2, 2), "3": nn.Linear(16, 3)})],
    ids=["fewer", "another shape"],
)
@pytest.mark.contract("M11")
def test_merging_a_reading_of_other_layers_is_an_error(make: Callable[[], nn.Module]) -> None:
    other = LayerRotation(make())
    text = (
        "`incoming_state` must be a reading of the same layers, 0 (4, 1, 3, 3), 3 (3, 16), got one of "
        f"{len(other.layer_names)} others. Merge what processes read of one module."
    )
    for incoming in (other, other.metric_state):
        with pytest.raises(ValueError, match=re.escape(text)):
            LayerRotation(network()).merge_state(incoming)


@pytest.mark.contract("M11")
def test_merging_what_is_no_reading_is_torchmetrics_error() -> None:
    with pytest.raises(ValueError, match="Expected state variable reading to be present in incoming state"):
        LayerRotation(network()).merge_state({})
    with pytest.raises(ValueError, match="Expected incoming state to be a dict or an instance of Metric"):
        LayerRotation(network()).merge_state(torch.ones(2))


# --- collections and arithmetic ---


@pytest.mark.contract("M12")
def test_references_a_short_way_apart_stay_apart_in_a_collection() -> None:
    """So short that the sums are equal by the tolerance of collections, which merge what is equal at first."""
    module = network()
    before = {"first": weights(module)}
    metrics = {"first": LayerRotation(module)}
    move(module, size=1e-6)
    before["second"] = weights(module)
    collection = MetricCollection({**metrics, "second": LayerRotation(module)})
    for seed, size in ((2, 1e-6), (3, 1e-6)):
        move(module, seed, size)
        collection.update(module)
    reading = collection.compute()
    for name, start in before.items():
        for layer, expected in distances(weights(module), start).items():
            assert float(reading[f"{name}_{layer}"]) == pytest.approx(expected, rel=1e-3, abs=0)


@pytest.mark.contract("M12")
def test_single_layers_take_part_in_arithmetic() -> None:
    module = network()
    start, rotation = weights(module), LayerRotation(module)
    mean = (rotation["0"] + rotation["3"]) / 2
    move(module)
    expected = distances(weights(module), start)
    rotation.update(module)
    assert float(mean.compute()) == pytest.approx(sum(expected.values()) / 2, rel=1e-6, abs=0)
    assert float((1 - rotation["3"]).compute()) == pytest.approx(1 - expected["3"], rel=1e-6, abs=0)


# --- Lightning, plots ---


class Logs(Net):
    """Logs what the function makes of the metric."""

    def __init__(self, logged: Callable[[LayerRotation], Metric]) -> None:
        super().__init__()
        self.logged = logged

    def on_train_start(self) -> None:
        self.metric = self.logged(LayerRotation(self))

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        self.last = self.metric(self)
        self.log("head", self.metric)
        return super().training_step(batch, batch_idx)


@pytest.mark.contract("M19")
def test_logging_the_metric_itself_is_lightnings_error_and_one_layer_of_it_is_logged() -> None:
    """Its result is a dictionary: `log_dict` is the way, which the docstring shows."""
    with pytest.raises(ValueError, match=r"return of the metric logged as 'head' must be a tensor\. Found \{'body\.0'"):
        trainer().fit(Logs(lambda rotation: rotation), batches())
    assert "self.log_dict(self.rotation(self))" in str(LayerRotation.__doc__)
    module, run = Logs(lambda rotation: rotation["head"]), trainer()
    run.fit(module, batches())
    assert float(run.callback_metrics["head"]) == float(module.last) > 1e-4


@pytest.mark.contract("M20")
def test_a_plot_without_matplotlib_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.utilities.plot._MATPLOTLIB_AVAILABLE", False)
    module = network()
    rotation = LayerRotation(module)
    rotation(module)
    with pytest.raises(ModuleNotFoundError, match="Plot function expects `matplotlib` to be installed"):
        rotation.plot()


# --- cost ---


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.contract("M21")
def test_many_layers_cost_one_state_and_no_collective_before_compute() -> None:
    module = nn.ParameterList([torch.eye(2) for _ in range(1000)])
    rotation = LayerRotation(module, distributed_available_fn=lambda: True)
    with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathered:
        rotation.update(module)
        assert gathered.call_count == 0
        rotation.compute()
    assert (gathered.call_count, len(rotation.metric_state)) == (2, 1)
