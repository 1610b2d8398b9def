"""Layca through Lightning's Trainer, strategy by strategy: the weights of one process, also across checkpoints.

The table of what was seen: ``pytest tests/distributed/test_layca_strategies.py -k table``.
"""

import functools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cpu_fsdp import DEPRECATIONS, CPUFSDPStrategy
from nets import trainer
from processes import launch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from pl_layer_rotation import layca_optimizers

# float32, and sums in another order.
SAME = 1e-6
Weights = list[list[float]]


def adamw_in_two_groups(module: nn.Module) -> Optimizer:
    """What Layca is compared with where Lightning cannot do a thing: the usual two groups, with and without decay."""
    decayed = [p for name, p in module.named_parameters() if name.endswith("weight")]
    rest = [p for name, p in module.named_parameters() if not name.endswith("weight")]
    return torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.01)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "Layca over SGD with momentum": lambda module: layca_optimizers(module, lr=0.05, plain_lr=0.02, momentum=0.9),
    "Layca over AdamW": lambda module: layca_optimizers(module, lr=0.05, base="AdamW"),
    "torch's AdamW": adamw_in_two_groups,
}
LAYCA = tuple(name for name in OPTIMIZERS if name.startswith("Layca"))


class Net(pl.LightningModule):
    """Rows of 8, 5 and 1: uneven over two and four processes, and the last layer smaller than their number."""

    def __init__(self, strategy: str, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.strategy, self.optimizer = strategy, optimizer
        self.body = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5))
        self.head = nn.Linear(5, 1)

    def configure_model(self) -> None:
        if self.strategy in ("TP", "FSDP2 × TP"):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.body, self.device_mesh["tensor_parallel"], plan)
        if self.strategy in ("FSDP2", "HSDP", "FSDP2 × TP"):
            mesh = self.device_mesh if self.strategy == "HSDP" else self.device_mesh["data_parallel"]
            for module in (self.body[0], self.body[2], self.head, self):
                fully_shard(module, mesh=mesh)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self)


def fsdp1(kind: str, wrap: bool = False) -> Callable[[int], CPUFSDPStrategy]:
    options: dict[str, Any] = {"auto_wrap_policy": {nn.Linear}} if wrap else {}
    mesh = (2, 2) if kind == "HYBRID_SHARD" else None
    return lambda world: CPUFSDPStrategy(sharding_strategy=kind, device_mesh=mesh, timeout=TIMEOUT, **options)


def model_parallel(data: int, tensor: int) -> Callable[[int], ModelParallelStrategy]:
    """Sizes of the mesh; 0 is all the rest."""
    return lambda world: ModelParallelStrategy(data or world // tensor, tensor or world // data, timeout=TIMEOUT)


TIMEOUT = timedelta(seconds=20)
STRATEGIES: dict[str, Callable[[int], Any]] = {
    "one process": lambda world: "auto",
    "DDP": lambda world: DDPStrategy(timeout=TIMEOUT),
    "FSDP1 FULL_SHARD": fsdp1("FULL_SHARD"),
    "FSDP1 FULL_SHARD by layer": fsdp1("FULL_SHARD", wrap=True),
    "FSDP1 SHARD_GRAD_OP": fsdp1("SHARD_GRAD_OP"),
    "FSDP1 NO_SHARD": fsdp1("NO_SHARD"),
    "FSDP1 HYBRID_SHARD": fsdp1("HYBRID_SHARD", wrap=True),
    "FSDP2": model_parallel(0, 1),
    "TP": model_parallel(1, 0),
    "FSDP2 × TP": model_parallel(2, 0),
    "HSDP": model_parallel(2, 0),
}
WORLDS = {"one process": 1, "FSDP1 HYBRID_SHARD": 4, "FSDP2 × TP": 4, "HSDP": 4}
# Strategies whose checkpoints are one file, or a folder with a file of each process.
FORMS = {name: (False,) if name in ("one process", "DDP") else (False, True) for name in STRATEGIES}


class SaveHalf(pl.Callback):
    """Checkpoints after the first of two epochs: a file, and a folder where the strategy has both."""

    def __init__(self, paths: dict[bool, str]) -> None:
        self.paths = paths

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            for sharded, path in self.paths.items():
                # What `save_distributed_checkpoint` and `state_dict_type` set: one training serves both forms.
                trainer.strategy._save_distributed_checkpoint = sharded
                trainer.strategy._state_dict_type = "sharded" if sharded else "full"
                trainer.save_checkpoint(path)


def train(module: pl.LightningModule, strategy: str, world: int, *callbacks: pl.Callback, resume: str | None) -> Any:
    """Two epochs of three steps; every process sees the same batches."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(*(torch.randn(12, width, generator=generator) for width in (7, 1)))
    run = trainer(
        *callbacks,
        devices=world,
        strategy=STRATEGIES[strategy](world),
        max_epochs=2,
        use_distributed_sampler=False,
    )
    run.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume, weights_only=False if resume else None)
    run.strategy.barrier()
    return run


def fit(
    strategy: str,
    world: int,
    optimizer: str,
    save: dict[bool, str] | None = None,
    resume: str | None = None,
    net: type[Net] = Net,
) -> Weights:
    """Weights after a training, or after one that goes on from a checkpoint."""
    module = net(strategy, optimizer)
    run = train(module, strategy, world, SaveHalf(save or {}), resume=resume)
    assert run.global_step == 6
    if isinstance(run.strategy.model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(run.strategy.model):
            return [p.detach().flatten().tolist() for p in module.parameters()]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return [weight.detach().flatten().tolist() for weight in whole]


def file(folder: str, strategy: str, world: int, optimizer: str, sharded: bool) -> str:
    return f"{folder}/{strategy}, {world}, {optimizer}, {'sharded' if sharded else 'full'}.ckpt"


def fit_and_resume(
    rank: int, strategy: str, world: int, folder: str, optimizers: tuple[str, ...]
) -> dict[str, tuple[Weights, dict[bool, Weights]]]:
    """Weights of an uninterrupted training, and of one resumed from each form of its checkpoint."""
    results = {}
    for optimizer in optimizers:
        paths = {sharded: file(folder, strategy, world, optimizer, sharded) for sharded in FORMS[strategy]}
        straight = fit(strategy, world, optimizer, save=paths)
        # torch's optimizers only show what Lightning cannot do with their checkpoints.
        forms = paths if optimizer in LAYCA else {}
        results[optimizer] = (
            straight,
            {form: fit(strategy, world, optimizer, resume=path) for form, path in forms.items()},
        )
    return results


def only_resume(rank: int, paths: dict[str, str], strategy: str, world: int) -> dict[str, Weights]:
    return {optimizer: fit(strategy, world, optimizer, resume=path) for optimizer, path in paths.items()}


def deviation(ours: Weights, expected: Weights) -> float:
    pairs = zip(ours, expected, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


class Runs:
    """Trainings by strategy, each done once, with their checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.straight = functools.cache(self._straight)
        self.resharded = functools.cache(self._resharded)

    def _straight(self, strategy: str, world: int, optimizers: tuple[str, ...]) -> list[Any]:
        return launch(fit_and_resume, strategy, world, self.folder, optimizers, world=world, timeout=60)

    def expected(self, optimizer: str) -> Weights:
        """The weights that one process reaches."""
        optimizers = LAYCA if optimizer in LAYCA else (optimizer,)
        weights: Weights = self.straight("one process", 1, optimizers)[0][optimizer][0]
        return weights

    def values(self, strategy: str) -> float:
        """Largest deviation of any process's weights from those of one process."""
        results = self.straight(strategy, WORLDS.get(strategy, 2), LAYCA)
        return max(deviation(result[o][0], self.expected(o)) for result in results for o in LAYCA)

    def resume(self, strategy: str, sharded: bool) -> float:
        """Largest deviation of a resumed training from the uninterrupted one under the same strategy."""
        results = self.straight(strategy, WORLDS.get(strategy, 2), LAYCA)
        return max(deviation(result[o][1][sharded], result[o][0]) for result in results for o in LAYCA)

    def _resharded(self, route: "Route", optimizers: tuple[str, ...]) -> float:
        """Largest deviation from one process of a training that goes on under another strategy."""
        source, first, target, second, sharded = route
        self.straight(source, first, LAYCA if optimizers[0] in LAYCA else optimizers)
        paths = {o: file(self.folder, source, first, o, sharded) for o in optimizers}
        results = launch(only_resume, paths, target, second, world=second, timeout=30)
        return max(deviation(result[o], self.expected(o)) for result in results for o in optimizers)


# Strategy and number of processes that save, and that go on; whether the checkpoint is a folder.
Route = tuple[str, int, str, int, bool]
ROUTES: list[Route] = [
    ("one process", 1, "DDP", 2, False),
    ("DDP", 2, "one process", 1, False),
    ("FSDP1 FULL_SHARD by layer", 2, "one process", 1, False),
    ("FSDP1 FULL_SHARD by layer", 2, "FSDP1 FULL_SHARD by layer", 4, False),
    ("FSDP1 FULL_SHARD by layer", 2, "FSDP1 FULL_SHARD by layer", 4, True),
    ("FSDP1 FULL_SHARD by layer", 2, "FSDP1 FULL_SHARD", 2, True),
    ("FSDP1 SHARD_GRAD_OP", 2, "DDP", 2, False),
    ("FSDP1 NO_SHARD", 2, "FSDP1 FULL_SHARD", 2, True),
    ("FSDP1 HYBRID_SHARD", 4, "FSDP1 FULL_SHARD by layer", 2, False),
    ("FSDP1 FULL_SHARD", 2, "FSDP2", 2, False),
    ("FSDP2", 2, "one process", 1, False),
    ("FSDP2", 2, "FSDP2", 4, False),
    ("FSDP2", 2, "FSDP2", 4, True),
    ("FSDP2", 2, "FSDP1 FULL_SHARD", 2, False),
    ("TP", 2, "TP", 4, True),
    ("TP", 2, "one process", 1, False),
    ("FSDP2 × TP", 4, "FSDP2", 2, True),
    ("FSDP2 × TP", 4, "one process", 1, False),
    ("HSDP", 4, "FSDP2", 2, True),
    ("HSDP", 4, "FSDP2", 2, False),
]
NUMBERED = "Lightning takes an optimizer's numbers of parameters for places in the module, which groups do not keep to"
FOLDERS = "one process cannot read a folder"
HYBRID = "torch reads a sharded optimizer state by the group of all processes, not by that which shares the weights"
IMPOSSIBLE: dict[Route, str] = {
    ("one process", 1, "FSDP1 FULL_SHARD", 2, False): NUMBERED,
    ("one process", 1, "FSDP2", 2, False): NUMBERED,
    ("FSDP1 FULL_SHARD by layer", 2, "one process", 1, True): FOLDERS,
    ("FSDP2", 2, "one process", 1, True): FOLDERS,
    ("FSDP1 HYBRID_SHARD", 4, "FSDP1 HYBRID_SHARD", 4, True): HYBRID,
}
# What is seen; where nothing is raised, the numbers are other ones.
SYMPTOMS = {NUMBERED: r"size of tensor|index out of range|shape", FOLDERS: "IsADirectoryError", HYBRID: None}

pytestmark = [
    pytest.mark.filterwarnings(*DEPRECATIONS),
    # Advice on an in-place operation that no module here does.
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"),
    pytest.mark.timeout(240),  # the first test of a strategy trains it
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("strategies"))


def describe(route: Route) -> str:
    source, first, target, second, sharded = route
    return f"{source} ({first}) to {target} ({second}), {'folder' if sharded else 'file'}"


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "one process"])
def test_weights_equal_those_of_one_process(runs: Runs, strategy: str) -> None:
    assert runs.values(strategy) < SAME


RESUMES = [(name, sharded) for name in STRATEGIES for sharded in FORMS[name]]
RESUMES.remove(("FSDP1 HYBRID_SHARD", True))


@pytest.mark.parametrize(("strategy", "sharded"), RESUMES, ids=lambda value: str(value))
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(runs: Runs, strategy: str, sharded: bool) -> None:
    assert runs.resume(strategy, sharded) == 0


@pytest.mark.parametrize("route", ROUTES, ids=describe)
def test_a_training_goes_on_under_another_strategy(runs: Runs, route: Route) -> None:
    assert runs.resharded(route, LAYCA) < SAME


@pytest.mark.parametrize("route", IMPOSSIBLE, ids=describe)
@pytest.mark.parametrize("optimizer", ["torch's AdamW", "Layca over AdamW"])
def test_what_lightning_cannot_do_with_any_optimizer(runs: Runs, route: Route, optimizer: str) -> None:
    symptom = SYMPTOMS[IMPOSSIBLE[route]]
    if symptom is None:
        assert runs.resharded(route, (optimizer,)) > 1e-3
    else:
        with pytest.raises(AssertionError, match=symptom):
            runs.resharded(route, (optimizer,))


class NumberedByTheModule(Net):
    """The way around Lightning's numbers: the module saves the optimizer's states under its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        place = {id(parameter): number for number, parameter in enumerate(self.parameters())}
        for state, optimizer in zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True):
            stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = {number: place[id(parameter)] for number, parameter in enumerate(stepped)}
            state["state"] = {numbers[number]: entry for number, entry in state["state"].items()}
            for group in state["param_groups"]:
                group["params"] = [numbers[number] for number in group["params"]]


def save_by_the_module(rank: int, path: str) -> Weights:
    return fit("one process", 1, "Layca over AdamW", save={False: path}, net=NumberedByTheModule)


@pytest.mark.parametrize("strategy", ["one process", "FSDP1 FULL_SHARD", "FSDP2"])
def test_a_checkpoint_of_one_process_goes_on_if_the_module_numbers_it(tmp_path: Path, strategy: str) -> None:
    path = str(tmp_path / "half.ckpt")
    (expected,) = launch(save_by_the_module, path, world=1, timeout=30)
    world = WORLDS.get(strategy, 2)
    for resumed in launch(only_resume, {"Layca over AdamW": path}, strategy, world, world=world, timeout=30):
        assert deviation(resumed["Layca over AdamW"], expected) < SAME


def test_table(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    def cell(value: float) -> str:
        return "exact" if value == 0 else f"{value:.0e}"

    lines = [f"{'':27}  {'values':>8}  {'resume, file':>12}  {'resume, folder':>14}"]
    for name, world in ((name, WORLDS.get(name, 2)) for name in STRATEGIES):
        resumed = [
            "no (1)" if (name, world, name, world, sharded) in IMPOSSIBLE else cell(runs.resume(name, sharded))
            for sharded in FORMS[name]
        ]
        lines.append(f"{name:27}  {cell(runs.values(name)):>8}  {resumed[0]:>12}  {(*resumed, '')[1]:>14}")
    lines += ["", f"(1) not possible in Lightning: {HYBRID}", "", "resharded"]
    lines += [f"{describe(route):70}  {cell(runs.resharded(route, LAYCA)):>8}" for route in ROUTES]
    lines += [f"{describe(route):70}  not possible in Lightning: {reason}" for route, reason in IMPOSSIBLE.items()]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
