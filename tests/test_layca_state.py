"""Copies of Layca and its saved state: training goes on bit by bit, and states that do not fit are refused."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from contract.cases import angle, give_gradients
from layca_cases import every_base, layers, network, train
from torch import nn

from pl_layer_rotation import Layca


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded: dict[str, Any] = torch.load(stream, weights_only=True)
    return loaded


@pytest.mark.contract("O12", "O13", "O35")
@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_training_goes_on_bit_by_bit(
    base: Any, options: dict[str, Any], twin: Any, dtype: torch.dtype, way: str
) -> None:
    net = network(dtype)
    optimizer = Layca(net.parameters(), base=base, **options)
    train(net, optimizer, 0, 3)
    if way == "state_dict":
        other = network(dtype)
        other.load_state_dict(through_a_file(net.state_dict()))
        resumed = Layca(other.parameters(), lr=0.5, base=base, **options)
        resumed.load_state_dict(state_dict=through_a_file(optimizer.state_dict()))
    else:
        twins_of_both = copy.deepcopy if way == "deepcopy" else lambda both: pickle.loads(pickle.dumps(both))
        other, resumed = twins_of_both((net, optimizer))
    train(net, optimizer, 3, 6)
    train(other, resumed, 3, 6)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.contract("O35", "O36")
def test_loading_leaves_the_given_state_alone_and_keeps_norms_exact() -> None:
    net = network(torch.bfloat16)
    optimizer = Layca(net.parameters())
    train(net, optimizer, 0, 1)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    Layca(network(torch.bfloat16).parameters()).load_state_dict(state)
    norms = [entry["initial_norm"] for entry in state["state"].values()]
    assert all(norm.dtype == torch.float32 and norm.dim() == 0 for norm in norms)
    assert [float(n) for n in norms] == [float(entry["initial_norm"]) for entry in before["state"].values()]


@pytest.mark.contract("O37")
def test_the_state_of_another_base_is_refused_by_name() -> None:
    state = Layca(layers(), base="SGD").state_dict()
    with pytest.raises(
        ValueError, match=r"`state_dict` must come from Layca over AdamW, got groups without betas, eps\."
    ):
        Layca(layers(), base="AdamW").load_state_dict(state)


@pytest.mark.contract("O37")
def test_the_state_of_other_tensors_is_refused_before_a_kernel_reads_past_its_end() -> None:
    saved, ours = nn.Linear(3, 2, bias=False), nn.Linear(5, 4, bias=False)
    optimizer = Layca(saved.parameters(), base="AdamW")
    give_gradients(list(saved.parameters()), 0)
    optimizer.step()
    message = r"`state_dict` must come from .* got exp_avg of shape \(2, 3\) for parameter 0 of group 0 \(4, 5\)"
    with pytest.raises(ValueError, match=message):
        Layca(ours.parameters(), base="AdamW").load_state_dict(optimizer.state_dict())


@pytest.mark.contract("O37")
def test_the_state_of_the_plain_base_leaves_our_options_as_they_are() -> None:
    first, second = layers()[:2]
    groups = [{"params": [first], "lr": 1e-3, "weight_decay": 0.1}, {"params": [second], "lr": 1e-3}]
    plain = torch.optim.AdamW(groups)
    give_gradients([first, second], 0)
    plain.step()
    ours = [
        {"params": [first], "lr": 0.05, "name": "rotating"},
        {"params": [second], "lr": 0.01, "name": "plain", "rotate": False},
    ]
    optimizer = Layca(ours, base="AdamW")
    with pytest.warns(UserWarning, match="Layca loaded the state of a plain optimizer"):
        optimizer.load_state_dict(plain.state_dict())
    kept = [(g["name"], g["lr"], g["rotate"], g["weight_decay"]) for g in optimizer.param_groups]
    assert kept == [("rotating", 0.05, True, 0.0), ("plain", 0.01, False, 0.01)]
    assert torch.equal(optimizer.state[first]["exp_avg"], plain.state[first]["exp_avg"])
    before = first.detach().clone()
    optimizer.step()
    assert angle(before, first) == pytest.approx(math.atan(0.05), rel=1e-5)
