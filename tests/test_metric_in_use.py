"""LayerRotation in collections, plots, scripts, process groups and LightningModules."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from nets import Net, batches, trainer
from readings import assert_reads, distances, move, network, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torchmetrics import Metric, MetricCollection

from pl_layer_rotation import LayerRotation, layer_rotation


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
