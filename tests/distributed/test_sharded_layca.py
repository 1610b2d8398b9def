"""Layca over tensors cut by FSDP2, with uneven and empty shards: the numbers of one process, and checkpoints that resume."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from processes import launch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

from pl_layer_rotation import LayerRotation, layca_optimizers

BASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "adam": {"base": "Adam"},
    "adamw foreach": {"base": "AdamW", "foreach": True},
    "rmsprop": {"base": "RMSprop"},
}


def network(seed: int = 0) -> nn.Sequential:
    """Rows of 5, 3 and 1 over two processes: uneven, and one shard empty."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def sharded(net: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2,))
    for layer in (net[0], net[2], net[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        inputs = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()


def whole(tensor: Tensor) -> list[float]:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().flatten().tolist()


def weights(net: nn.Module) -> list[list[float]]:
    return [whole(parameter) for parameter in net.parameters()]


def make(net: nn.Module, options: dict[str, Any], lr: float = 0.05) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = layca_optimizers(net, lr=lr, **options)["optimizer"]
    return optimizer


def train_sharded(rank: int, options: dict[str, Any]) -> tuple[list[list[float]], dict[str, float]]:
    net = sharded(network())
    rotation = LayerRotation(net)
    train(net, make(net, options), 0, 6)
    return weights(net), {name: float(value) for name, value in rotation(net).items()}


@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_sharded_training_equals_one_process(options: dict[str, Any]) -> None:
    net = network()
    rotation = LayerRotation(net)
    train(net, make(net, options), 0, 6)
    for sharded_weights, sharded_rotation in launch(train_sharded, options):
        for ours, expected in zip(sharded_weights, weights(net), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        assert sharded_rotation == {name: pytest.approx(float(v), rel=1e-4) for name, v in rotation(net).items()}


def resume_sharded(rank: int, options: dict[str, Any], form: dict[str, Any]) -> tuple[Any, Any]:
    state_options = StateDictOptions(**form)
    net = sharded(network())
    optimizer = make(net, options)
    train(net, optimizer, 0, 3)
    model_state, optimizer_state = get_state_dict(net, optimizer, options=state_options)
    other = sharded(network(seed=1))
    resumed = make(other, options, lr=0.7)
    # A copy: loading takes over tensors of the right kind as they are, and the first network goes on with its own.
    model_state, optimizer_state = copy.deepcopy((model_state, optimizer_state))
    set_state_dict(
        other, resumed, model_state_dict=model_state, optim_state_dict=optimizer_state, options=state_options
    )
    train(net, optimizer, 3, 6)
    train(other, resumed, 3, 6)
    return weights(net), weights(other)


FORMS: dict[str, dict[str, Any]] = {"sharded": {}, "flattened": {"flatten_optimizer_state_dict": True}}


@pytest.mark.contract("O38")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("options", BASES.values(), ids=BASES)
def test_a_distributed_state_resumes_bit_by_bit(options: dict[str, Any], form: dict[str, Any]) -> None:
    for straight, resumed in launch(resume_sharded, options, form):
        assert straight == resumed
