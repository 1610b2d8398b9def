"""FSDP1 cuts weights into one-dimensional runs, some of them empty: same layers, same numbers as before wrapping."""

from typing import Any

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from processes import launch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import init_device_mesh

from pl_layer_rotation import Layca, LayerRotation, layca_param_groups, select_layers
from pl_layer_rotation._sharding import (
    are_zero,
    is_unknown_piece,
    local_piece,
    local_tensor,
    original_shape,
    shard_count,
    whole_tensor,
)

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
# Processes that share a parameter.
PIECES = {"FULL_SHARD": 2, "SHARD_GRAD_OP": 2, "NO_SHARD": 1, "HYBRID_SHARD": 2}
WRAPS = {"root": None, "blocks": ModuleWrapPolicy({nn.Conv2d, nn.MultiheadAttention})}

# A strategy that is tested here all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The `NO_SHARD` sharding strategy is deprecated:FutureWarning")


class Net(nn.Module):
    """Every kind: embedding, channels_last, packed projections, normalization, tied weights, a layer of one row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 6)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 5)
        self.tied = nn.Linear(6, 5)
        self.tied.weight = self.first.weight
        self.out = nn.Linear(5, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        hidden = self.attention(hidden, hidden, hidden)[0] + self.conv(hidden[:, None].expand(-1, 2, -1, -1)).mean()
        return self.out(self.first(hidden).tanh() + self.tied(hidden))


def wrapped(module: nn.Module, strategy: str = "FULL_SHARD", wrap: str = "root") -> FullyShardedDataParallel:
    mesh = init_device_mesh("cpu", (2, 2)) if strategy == "HYBRID_SHARD" else None
    return FullyShardedDataParallel(
        module,
        use_orig_params=True,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=WRAPS[wrap],
        device_mesh=mesh,
        device_id=torch.device("cpu"),
    )


def processes(strategy: str) -> int:
    return 4 if strategy == "HYBRID_SHARD" else 2


def same_layers_in_every_state(rank: int, strategy: str, wrap: str) -> list[int]:
    torch.distributed.init_process_group("gloo")
    module = Net()
    before = {name: weight.detach().clone() for name, weight in select_layers(module).items()}
    model = wrapped(module, strategy, wrap)

    def check(state: str, pieces: int = PIECES[strategy]) -> None:
        layers = select_layers(model)
        assert list(layers) == list(before), state
        for name, weight in layers.items():
            assert original_shape(weight) == before[name].shape, (state, name)
            assert shard_count(weight) == pieces, (state, name)
            assert not is_unknown_piece(weight)
            whole = whole_tensor(local_tensor(weight), weight)
            assert torch.equal(whole, before[name]), (state, name)
            assert torch.equal(local_piece(whole, weight), local_tensor(weight)), (state, name)

    check("wrapped")
    tokens = torch.randint(0, 5, (2, 6), generator=torch.Generator().manual_seed(1))
    model(tokens).sum().backward()
    check("after a backward pass")
    with torch.no_grad():
        model(tokens)
    # SHARD_GRAD_OP keeps the gathered weights in the modules here.
    check("after an evaluation")
    loss = model(tokens).sum()
    check("between forward and backward pass")
    loss.backward()
    with FullyShardedDataParallel.summon_full_params(model):
        check("gathered", pieces=1)
    check("in the end")
    return [weight.numel() for weight in select_layers(model).values()]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_wrapping_changes_neither_names_nor_order_nor_layers(strategy: str, wrap: str) -> None:
    sizes = launch(same_layers_in_every_state, strategy, wrap, world=processes(strategy), timeout=30)
    total = sum(weight.numel() for weight in select_layers(Net()).values())
    assert sum(map(sum, sizes)) == total * processes(strategy) // PIECES[strategy]
    if strategy == "FULL_SHARD":
        assert 0 in sizes[0]  # so that empty pieces were seen
        assert any(a and b and a != b for a, b in zip(*sizes, strict=True))  # uneven ones too


def move(module: nn.Module) -> None:
    """Turn every layer, each element by its own value, so that pieces turn alike."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(weight.square(), alpha=0.01)


def readings(rank: int, strategy: str, wrap: str, dtype: torch.dtype) -> dict[str, float]:
    torch.distributed.init_process_group("gloo")
    model = wrapped(Net().to(dtype), strategy, wrap)
    rotation = LayerRotation(model)
    move(model)
    return {name: float(distance) for name, distance in rotation(model).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("strategy", "wrap"), [(s, w) for s in STRATEGIES for w in WRAPS if s != "SHARD_GRAD_OP"])
def test_the_metric_reads_what_one_process_reads(strategy: str, wrap: str, dtype: torch.dtype) -> None:
    module = Net().to(dtype)
    rotation = LayerRotation(module)
    move(module)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    expected = {name: pytest.approx(float(value), rel=tolerance) for name, value in rotation(module).items()}
    for reading in launch(readings, strategy, wrap, dtype, world=processes(strategy), timeout=30):
        assert reading == expected


def zero_layers(rank: int) -> list[bool]:
    torch.distributed.init_process_group("gloo")
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 4))
    nn.init.zeros_(net[1].weight)
    with torch.no_grad():
        net[2].weight[:-1] = 0  # the only values that are not zero are held by one process
    return are_zero(list(select_layers(wrapped(net)).values()))


def test_a_layer_is_zero_only_if_all_its_pieces_are() -> None:
    assert launch(zero_layers, timeout=30) == [[False, True, False]] * 2


def part_of_a_wrapped_module(rank: int) -> tuple[str, list[str]]:
    torch.distributed.init_process_group("gloo")
    part = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    model = wrapped(nn.Sequential(part))
    try:
        select_layers(part)
    except MisconfigurationException as error:
        refused = str(error)
    select_layers(model)
    return refused, list(select_layers(part))


def test_a_part_is_known_once_the_whole_was_seen() -> None:
    for refused, names in launch(part_of_a_wrapped_module, timeout=30):
        assert refused == (
            "`module` must hold the FSDP wrapper that knows the shapes of its weights, got Sequential with '0.weight', "
            "a piece of a parameter. Pass the whole LightningModule (`select_layers(self)`); its parts are known from "
            "then on."
        )
        assert names == ["0", "1"]


def network() -> nn.Sequential:
    """A last layer of one row: empty on one process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(6):
        inputs = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def train_pieces(rank: int, strategy: str, options: dict[str, Any]) -> list[float]:
    torch.distributed.init_process_group("gloo")
    model = wrapped(network(), strategy)
    train(model, Layca(layca_param_groups(model, lr=0.05, plain_lr=0.01), **options))
    with FullyShardedDataParallel.summon_full_params(model):
        return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.mark.parametrize("options", [{}, {"base": "SGD", "momentum": 0.9}, {"base": "AdamW"}], ids=str)
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_layca_steps_as_in_one_process(strategy: str, options: dict[str, Any]) -> None:
    net = network()
    train(net, Layca(layca_param_groups(net, lr=0.05, plain_lr=0.01), **options))
    expected = torch.cat([p.detach().flatten() for p in net.parameters()])
    for weights in launch(train_pieces, strategy, options, timeout=30):
        torch.testing.assert_close(torch.tensor(weights), expected, rtol=1e-5, atol=1e-6)


def unknown_pieces(rank: int) -> str:
    torch.distributed.init_process_group("gloo")
    model = wrapped(network())
    optimizer = Layca(model.parameters(), lr=0.05)
    try:
        train(model, optimizer)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_layca_refuses_pieces_of_which_it_does_not_know_the_shape() -> None:
    for message in launch(unknown_pieces, timeout=30):
        assert "FSDP1" in message
