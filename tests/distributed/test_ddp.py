"""DDP over real processes gives the numbers of one process."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from nets import Net, batches, trainer
from processes import launch
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from pl_layer_rotation import LayerRotation, LayerRotationMonitor, layca_optimizers, layer_rotation

OPTIMIZERS = {
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
    "layca": lambda module: layca_optimizers(module, lr=0.05, momentum=0.9),
    "layca-adamw": lambda module: layca_optimizers(module, lr=0.05, base="AdamW"),
}


def monitored_fit(rank: int, optimizer: str, world: int, folder: Any = None, **fit_options: Any) -> dict[str, Any]:
    monitor = LayerRotationMonitor(report=folder is not None)
    run = trainer(
        monitor,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=2,
        logger=CSVLogger(folder) if folder else False,
        use_distributed_sampler=False,
    )
    run.fit(Net(OPTIMIZERS[optimizer]), batches(identical=True), batches(), **fit_options)
    values = {quantity: monitor.history.values(quantity).tolist() for quantity in monitor.history.quantities}
    if fit_options == {} and folder is None:
        run.strategy.barrier()
    return {"steps": monitor.history.steps, **values, "mean": run.callback_metrics["layer_rotation_stats/mean"].item()}


@pytest.mark.contract("C1")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_processes_equal_one(optimizer: str) -> None:
    alone = monitored_fit(0, optimizer, 1)
    both = launch(monitored_fit, optimizer, 2)
    assert both[0] == both[1]
    assert both[0]["steps"] == alone["steps"] == list(range(1, 17))
    for quantity in ("rotation", "angular_update", "norm_ratio"):
        np.testing.assert_allclose(both[0][quantity], alone[quantity], rtol=1e-6, atol=1e-9)


@pytest.mark.contract("C6")
def test_only_the_first_process_logs_and_reports(tmp_path: Any) -> None:
    launch(monitored_fit, "sgd", 2, tmp_path)
    assert len(list(tmp_path.rglob("layer_rotation.html"))) == 1
    (csv,) = tmp_path.rglob("metrics.csv")
    rows = csv.read_text(encoding="utf-8").splitlines()
    assert len([row for row in rows if row.count(",,") < 2]) <= 17


def save_then_resume(rank: int, path: str, world: int, resume: bool) -> dict[str, Any]:
    monitor = LayerRotationMonitor(report=False)
    options: dict[str, Any] = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    run = trainer(monitor, max_epochs=2 if resume else 1, use_distributed_sampler=False, **options)
    arguments = {"ckpt_path": path, "weights_only": True} if resume else {}
    run.fit(Net(OPTIMIZERS["layca"]), batches(identical=True), batches(), **arguments)
    if not resume:
        run.save_checkpoint(path)
    return {"steps": monitor.history.steps, "rotation": monitor.history.values("rotation").tolist()}


@pytest.mark.contract("C15")
@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 1), (1, 2)], ids=["ddp", "ddp to single", "single to ddp"])
def test_resuming_with_another_number_of_processes_continues_the_curves(tmp_path: Any, first: int, second: int) -> None:
    path = str(tmp_path / "half.ckpt")
    whole = monitored_fit(0, "layca", 1)
    launch(save_then_resume, path, first, False, world=first)
    resumed = launch(save_then_resume, path, second, True, world=second)[0]
    assert resumed["steps"] == whole["steps"]
    np.testing.assert_allclose(resumed["rotation"], whole["rotation"], rtol=1e-6, atol=1e-9)


def unequal_gradients(rank: int) -> float:
    """Layca's processes see other data; DDP's averaged gradients must keep the replicas equal."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    net = nn.Linear(6, 4)
    model = nn.parallel.DistributedDataParallel(net)
    start = net.weight.detach().clone()
    optimizer = layca_optimizers(model, lr=0.05)["optimizer"]
    model(torch.randn(3, 6, generator=torch.Generator().manual_seed(rank))).square().mean().backward()
    optimizer.step()
    gathered = [torch.empty_like(net.weight) for _ in range(2)]
    torch.distributed.all_gather(gathered, net.weight.detach())
    assert torch.equal(*gathered)
    return float(layer_rotation(net.weight, start))


def test_replicas_stay_equal_and_turn_by_the_requested_angle() -> None:
    for distance in launch(unequal_gradients):
        assert distance == pytest.approx(1 - 1 / math.sqrt(1 + 0.05**2), rel=1e-4)


def sharded_metric(rank: int) -> dict[str, float]:
    """One layer cut over the processes, unevenly (3 rows over 2; 1 row leaves a process empty), one replicated."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    module = nn.ModuleDict({name: nn.Linear(5, rows, bias=False) for name, rows in ROWS.items()})
    for name, placement in (("cut", Shard(0)), ("one_row", Shard(0)), ("columns", Shard(1)), ("whole", Replicate())):
        generator = torch.Generator().manual_seed(ROWS[name])
        weight = distribute_tensor(torch.randn(ROWS[name], 5, generator=generator), mesh, [placement])
        module[name].weight = nn.Parameter(weight)
    module["plain"].weight.data.copy_(torch.randn(2, 5, generator=torch.Generator().manual_seed(2)))
    rotation = LayerRotation(module)
    with torch.no_grad():
        for layer in module.values():
            layer.weight.add_(layer.weight.square(), alpha=0.01)
    return {name: float(value) for name, value in rotation(module).items()}


ROWS = {"cut": 3, "one_row": 1, "columns": 4, "whole": 6, "plain": 2}


@pytest.mark.contract("M2")
def test_pieces_of_layers_count_as_the_whole() -> None:
    expected = {}
    for name, rows in ROWS.items():
        weight = torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows))
        expected[name] = float(layer_rotation(weight + 0.01 * weight.square(), weight))
    first, second = launch(sharded_metric)
    assert first == second
    assert first == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}
