"""Contract O35 to O40: what is saved, loaded and skipped."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.cases import angle, copy_weights, layers, norm, same, skip_on_torch_2_6, snapshot, take_steps
from processes import launch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

from pl_layer_rotation import Layca, layca_optimizers

BASES: dict[str, dict[str, Any]] = {
    "sgd": {"base": "SGD"},
    "momentum": {"base": "SGD", "momentum": 0.9},
    "adam": {"base": "Adam"},
    "adamw": {"base": "AdamW"},
    "rmsprop": {"base": "RMSprop"},
}
TORCH_BASES = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        net(torch.randn(8, 7, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


@pytest.mark.contract("O35")
@pytest.mark.parametrize("base", ["Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adadelta"])
@pytest.mark.parametrize("convert", [float, torch.tensor], ids=["float", "tensor"])
def test_a_step_count_may_be_a_number_or_a_tensor(base: str, convert: Callable[[float], Any]) -> None:
    tensors, others = layers(), layers()
    optimizer, resumed = Layca(tensors, base=base), Layca(others, base=base)
    take_steps(optimizer, 0, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = convert(float(entry["step"]))
    copy_weights(tensors, others)
    resumed.load_state_dict(state)
    take_steps(optimizer, 3, 5)
    take_steps(resumed, 3, 5)
    assert same(tensors, others)


@pytest.mark.contract("O35")
def test_a_state_says_nothing_that_a_safe_load_refuses_and_equals_itself_after_a_load() -> None:
    optimizer = Layca(layers(), base="AdamW")
    take_steps(optimizer, 0, 2)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    resumed = Layca(layers(), lr=0.5, base="AdamW")
    resumed.load_state_dict(state_dict=loaded)
    torch.testing.assert_close(resumed.state_dict(), optimizer.state_dict(), rtol=0.0, atol=0.0)


@pytest.mark.contract("O35")
def test_saving_does_not_change_what_follows() -> None:
    tensors, saved = layers(), layers()
    optimizer, saving = Layca(tensors, momentum=0.9), Layca(saved, momentum=0.9)
    for step in range(6):
        take_steps(optimizer, step, step + 1)
        take_steps(saving, step, step + 1)
        copy.deepcopy(saving)
        saving.state_dict()
    assert same(tensors, saved)


@pytest.mark.contract("O37")
@pytest.mark.parametrize("base", TORCH_BASES)
def test_a_checkpoint_without_the_options_that_came_later_gets_their_defaults(base: str) -> None:
    tensors, others = layers(), layers()
    optimizer = Layca(tensors, base=base)
    take_steps(optimizer, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for option in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(option, None)
    resumed = Layca(others, base=base)
    resumed.load_state_dict(state)
    copy_weights(tensors, others)
    take_steps(optimizer, 2, 4)
    take_steps(resumed, 2, 4)
    assert same(tensors, others)


@pytest.mark.contract("O37")
def test_a_checkpoint_without_our_options_gets_their_defaults() -> None:
    (weight,) = layers(shapes=[(5, 4)])
    optimizer = Layca([weight], lr=0.1, base="AdamW")
    take_steps(optimizer, 0, 1)
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["tangential"]
    resumed = Layca([weight], lr=0.1, base="AdamW", tangential=True)
    resumed.load_state_dict(state)
    before = weight.detach().clone()
    take_steps(resumed, 1, 2)
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-5)


@pytest.mark.contract("O37")
@pytest.mark.parametrize("loading", TORCH_BASES)
@pytest.mark.parametrize("saved", TORCH_BASES)
def test_the_state_of_another_base_is_refused_at_the_load_or_goes_on(saved: str, loading: str) -> None:
    optimizer = Layca(layers(shapes=[(5, 4)]), lr=0.1, base=saved)
    take_steps(optimizer, 0, 2)
    (weight,) = layers(shapes=[(5, 4)])
    other = Layca([weight], lr=0.1, base=loading)
    try:
        other.load_state_dict(optimizer.state_dict())
    except ValueError as error:
        assert saved != loading
        assert f"`state_dict` must come from Layca over {loading}" in str(error)  # noqa: PT017  # the others must go on
        return
    # Where nothing was refused no base may miss its own state later. (RAdam's first steps are those of momentum.)
    before = weight.detach().clone()
    take_steps(other, 2, 3)
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-5)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full on the cpu": {"full_state_dict": True, "cpu_offload": True},
    "on the cpu": {"cpu_offload": True},
}


def resumed_equals(make: Callable[[nn.Module], torch.optim.Optimizer], form: dict[str, Any]) -> bool:
    """Whether a training that goes on from a distributed state ends at the same weights, bit by bit."""
    options = StateDictOptions(**form)
    net, other = network(), network()
    optimizer, resumed = make(net), make(other)
    train(net, optimizer, 0, 3)
    before = snapshot(list(net.parameters()))
    model_state, optimizer_state = copy.deepcopy(get_state_dict(net, optimizer, options=options))
    assert same(before, list(net.parameters()))
    set_state_dict(other, resumed, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    assert same(before, list(other.parameters()))
    train(net, optimizer, 3, 6)
    train(other, resumed, 3, 6)
    return same(list(net.parameters()), list(other.parameters()))


@pytest.mark.contract("O38")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_a_distributed_state_in_one_process_resumes_bit_by_bit(base: str, form: str) -> None:
    if base == "sgd" and FORMS[form].get("full_state_dict"):
        # torch's loader wants a tensor of one dimension or more in a full state, and SGD's state has none.
        def outcome(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Any:
            try:
                return resumed_equals(make, FORMS[form])
            except AssertionError as error:
                return str(error)

        assert outcome(lambda net: Layca(net.parameters(), base="SGD")) == outcome(
            lambda net: torch.optim.SGD(net.parameters(), lr=0.1)
        )
        return
    assert resumed_equals(lambda net: Layca(net.parameters(), **BASES[base]), FORMS[form])


@pytest.mark.contract("O38")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_state_with_frozen_weights_and_two_groups_resumes(base: str, flatten: bool) -> None:
    def make(net: nn.Module) -> torch.optim.Optimizer:
        net[0].weight.requires_grad_(False)
        return layca_optimizers(net, **BASES[base])["optimizer"]  # type: ignore[no-any-return]

    assert resumed_equals(make, {"flatten_optimizer_state_dict": flatten})


@pytest.mark.contract("O38")
@pytest.mark.parametrize("base", BASES)
def test_a_distributed_state_finds_its_parameters_in_groups_of_another_order(base: str) -> None:
    net, other = network(), network()
    first, second = ([*module.parameters()] for module in (net[0], net[2]))
    optimizer = Layca([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.2}], **BASES[base])
    train(net, optimizer, 0, 3)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(net, optimizer))
    resumed = Layca([{"params": m.parameters(), "lr": 0.7} for m in (other[2], other[0])], **BASES[base])
    set_state_dict(other, resumed, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert [group["lr"] for group in resumed.param_groups] == [0.2, 0.1]
    train(net, optimizer, 3, 6)
    train(other, resumed, 3, 6)
    for ours, theirs in zip(other.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def full_state_resumes(rank: int, options: dict[str, Any], form: dict[str, Any]) -> tuple[Any, Any]:
    def sharded() -> nn.Sequential:
        net = network()
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        return net

    def values(net: nn.Module) -> list[list[float]]:
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
        return [tensor.detach().flatten().tolist() for tensor in whole]

    net, other = sharded(), sharded()
    optimizer, resumed = (layca_optimizers(n, lr=0.05, **options)["optimizer"] for n in (net, other))
    train(net, optimizer, 0, 3)
    state_options = StateDictOptions(**form)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(net, optimizer, options=state_options))
    if form.get("broadcast_from_rank0") and rank:
        model_state, optimizer_state = {}, {}
    # Both in one call hangs with an empty state, with torch's optimizers too; Lightning makes two calls.
    set_model_state_dict(other, model_state, options=state_options)
    set_optimizer_state_dict(other, resumed, optimizer_state, options=state_options)
    train(net, optimizer, 3, 6)
    train(other, resumed, 3, 6)
    return values(net), values(other)


@pytest.mark.contract("O38")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_full_state_of_two_processes_resumes_bit_by_bit(base: str, offload: bool) -> None:
    skip_on_torch_2_6("cannot run FSDP2 on the CPU")
    form = {"full_state_dict": True, "cpu_offload": offload}
    if offload:
        # Every process but the first gets an empty state there, and loads what the first one sends.
        form["broadcast_from_rank0"] = True
    for straight, resumed in launch(full_state_resumes, BASES[base], form):
        assert straight == resumed


@pytest.mark.contract("O39")
@pytest.mark.parametrize("base", BASES)
def test_the_first_step_of_torchs_distributed_checkpoints_moves_nothing_and_knows_the_norms(base: str) -> None:
    net = network()
    before = snapshot(list(net.parameters()))
    optimizer = Layca(net.parameters(), lr=0.1, **BASES[base])
    state = get_optimizer_state_dict(net, optimizer)["state"]
    assert same(before, list(net.parameters()))
    assert optimizer.param_groups[0]["lr"] == 0.1
    for (name, parameter), start in zip(net.named_parameters(), before, strict=True):
        entry: dict[str, Tensor] = state[name]
        if start.dim() > 1:
            assert float(entry["initial_norm"]) == pytest.approx(norm(start), rel=1e-6)
        assert all(not entry[key].any() for key in entry if key not in ("initial_norm", "step"))
        assert parameter.grad is None
    take_steps(optimizer, 0, 1)
    assert angle(before[0], net[0].weight) == pytest.approx(math.atan(0.1), rel=1e-5)
    assert norm(net[0].weight) == pytest.approx(norm(before[0]), rel=1e-6)


@pytest.mark.contract("O40")
@pytest.mark.parametrize("options", [{"base": "SGD", "momentum": 0.9}, {"base": "AdamW", "fused": True}], ids=str)
def test_an_overflow_in_mid_training_leaves_weights_state_and_norms_as_they_are(options: dict[str, Any]) -> None:
    net = network()
    optimizer = Layca(net.parameters(), lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    train(net, optimizer, 0, 2)
    before, state = snapshot(list(net.parameters())), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    scaler.scale(net(torch.ones(1, 7)).sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert same(before, list(net.parameters()))
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0.0, atol=0.0)
    train(net, optimizer, 2, 3)
    assert angle(before[0], net[0].weight) == pytest.approx(math.atan(0.1), rel=1e-5)


@pytest.mark.contract("O40")
def test_unscaling_before_clipping_unscales_once() -> None:
    net, twin = network(), network()
    optimizer, other = (Layca(n.parameters(), lr=0.1) for n in (net, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs = torch.randn(8, 7, generator=torch.Generator().manual_seed(0))
    scaler.scale(net(inputs).square().mean()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    scaler.step(optimizer)
    twin(inputs).square().mean().backward()
    nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    other.step()
    # The bias takes a plain step: its size would tell of a second division.
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
