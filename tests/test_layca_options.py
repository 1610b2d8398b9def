"""Two bases, leading dimensions, weights that others write to, and small steps in bfloat16."""

import copy
import functools
import io
import math
import warnings
from typing import Any

import pytest
import torch
from contract.cases import angle, needs_muon
from torch import Tensor, nn

from pl_layer_rotation import Layca


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def give_gradients(tensors: list[nn.Parameter], step: int = 0) -> None:
    for place, tensor in enumerate(tensors):
        tensor.grad = randn(*tensor.shape, seed=1000 + 100 * step + place, dtype=tensor.dtype)


# --- plain_base

MUON = {"base": "Muon", "plain_base": "AdamW", "tangential": False}


def groups(matrix: nn.Parameter, bias: nn.Parameter) -> list[dict[str, Any]]:
    return [{"params": [matrix], "name": "rotating"}, {"params": [bias], "rotate": False, "lr": 0.01, "name": "plain"}]


@needs_muon
def test_plain_tensors_take_the_steps_of_their_own_base() -> None:
    matrix, bias = nn.Parameter(randn(6, 4)), nn.Parameter(randn(5, seed=1))
    twin = nn.Parameter(bias.detach().clone())
    optimizer = Layca(groups(matrix, bias), lr=0.05, **MUON)
    reference = torch.optim.AdamW([twin], lr=0.01)
    for step in range(4):
        give_gradients([matrix, bias], step)
        twin.grad = bias.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(bias, twin, rtol=1e-6, atol=1e-7)
    assert (optimizer.base_class, optimizer.plain_base_class) == (torch.optim.Muon, torch.optim.AdamW)


@needs_muon
def test_the_direction_is_that_of_the_base() -> None:
    matrix, bias = nn.Parameter(randn(6, 4, dtype=torch.float64)), nn.Parameter(randn(5, seed=1, dtype=torch.float64))
    start = matrix.detach().clone()
    give_gradients([matrix, bias])
    optimizer = Layca(groups(matrix, bias), lr=0.05, **{**MUON, "tangential": True})
    muon = nn.Parameter(start.clone())
    muon.grad = matrix.grad.clone()
    torch.optim.Muon([muon], lr=1e-3, weight_decay=0.0).step()
    optimizer.step()
    step = muon.detach() - start
    step -= (step * start).sum() / start.square().sum() * start
    moved = matrix.detach() - (matrix.detach() * start).sum() / start.square().sum() * start
    assert float((moved * step).sum() / moved.norm() / step.norm()) == pytest.approx(1.0, abs=1e-9)
    assert angle(start, matrix) == pytest.approx(math.atan(0.05), rel=1e-9)


@needs_muon
def test_each_group_holds_the_options_of_its_base() -> None:
    matrix, bias = nn.Parameter(randn(6, 4)), nn.Parameter(randn(5))
    optimizer = Layca(
        groups(matrix, bias), base="Muon", plain_base=functools.partial(torch.optim.AdamW, betas=(0.8, 0.9))
    )
    rotating, plain = optimizer.param_groups
    assert (rotating["momentum"], rotating["weight_decay"]) == (0.95, 0.0)
    assert (plain["betas"], plain["weight_decay"]) == ((0.8, 0.9), 0.01)


@needs_muon
def test_a_bias_in_a_rotating_group_takes_the_defaults_of_the_plain_base() -> None:
    matrix, bias = nn.Parameter(randn(6, 4)), nn.Parameter(randn(5, seed=1))
    twin = nn.Parameter(bias.detach().clone())
    optimizer = Layca([matrix, bias], lr=0.03, base="Muon", plain_base="SGD")
    give_gradients([matrix, bias])
    twin.grad = bias.grad.clone()
    optimizer.step()
    torch.optim.SGD([twin], lr=0.03).step()
    torch.testing.assert_close(bias, twin)


@needs_muon
def test_a_plain_group_added_later_takes_the_plain_bases_defaults() -> None:
    matrix, bias, late = nn.Parameter(randn(6, 4)), nn.Parameter(randn(5)), nn.Parameter(randn(3))
    optimizer = Layca(groups(matrix, bias), **MUON)
    optimizer.add_param_group({"params": [late], "rotate": False})
    assert optimizer.param_groups[-1]["eps"] == 1e-8
    give_gradients([matrix, bias, late])
    optimizer.step()
    assert optimizer.state[late].keys() == {"step", "exp_avg", "exp_avg_sq", "initial_norm"}


@needs_muon
@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_two_bases_go_on_bit_by_bit(way: str) -> None:
    def make() -> tuple[list[nn.Parameter], Layca]:
        tensors = [nn.Parameter(randn(6, 4)), nn.Parameter(randn(5, seed=1))]
        return tensors, Layca(groups(*tensors), lr=0.05, **MUON)

    tensors, optimizer = make()
    for step in range(3):
        give_gradients(tensors, step)
        optimizer.step()
    if way == "deepcopy":
        resumed, other = copy.deepcopy((tensors, optimizer))
    else:
        resumed, other = make()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        for ours, theirs in zip(resumed, tensors, strict=True):
            ours.data.copy_(theirs.data)
    for step in range(3, 6):
        for members, stepper in ((tensors, optimizer), (resumed, other)):
            give_gradients(members, step)
            stepper.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, tensors, strict=True))


def test_an_unknown_plain_base_is_named() -> None:
    with pytest.raises(ValueError, match=r"`plain_base` must name an optimizer of torch\.optim, got 'Adamm'"):
        Layca([nn.Parameter(randn(6, 4))], base="SGD", plain_base="Adamm")


@needs_muon
def test_the_state_of_other_plain_tensors_is_refused_also_where_the_base_has_no_fused_kernel() -> None:
    tensors = [nn.Parameter(randn(6, 4)), nn.Parameter(randn(5, seed=1))]
    optimizer = Layca(groups(*tensors), **MUON)
    give_gradients(tensors)
    optimizer.step()
    other = Layca(groups(nn.Parameter(randn(6, 4)), nn.Parameter(randn(7))), **MUON)
    with pytest.raises(ValueError, match=r"got exp_avg of shape \(5,\) for parameter 0 of group 'plain' \(7,\)"):
        other.load_state_dict(optimizer.state_dict())


# --- leading_dims


@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 3, 6, 4), (5, 7)], ids=str)
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_every_leading_slice_turns_by_the_angle_and_keeps_its_norm(shape: tuple[int, ...], base: str) -> None:
    leading = len(shape) - 2 if len(shape) > 2 else 1
    weight = nn.Parameter(randn(*shape) * torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1)))
    before = weight.detach().clone()
    optimizer = Layca([{"params": [weight], "leading_dims": leading}], lr=0.05, base=base)
    give_gradients([weight])
    optimizer.step()
    for old, new in zip(before.flatten(0, leading - 1), weight.detach().flatten(0, leading - 1), strict=True):
        assert angle(old, new) == pytest.approx(math.atan(0.05), rel=1e-5)
        assert float(new.norm()) == pytest.approx(float(old.norm()), rel=1e-6)
    assert optimizer.state[weight]["initial_norm"].shape == shape[:leading]


def test_slices_step_as_separate_parameters_would() -> None:
    stacked = nn.Parameter(randn(3, 6, 4))
    parts = [nn.Parameter(part.clone()) for part in stacked.detach()]
    together = Layca([stacked], lr=0.05, leading_dims=1, momentum=0.9)
    apart = Layca(parts, lr=0.05, momentum=0.9)
    for step in range(20):
        give_gradients([stacked], step)
        for part, gradient in zip(parts, stacked.grad, strict=True):
            part.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([part.detach() for part in parts]), rtol=1e-6, atol=1e-7)


def test_the_norms_of_slices_survive_a_checkpoint() -> None:
    weight = nn.Parameter(randn(3, 6, 4))
    optimizer = Layca([weight], lr=0.05, leading_dims=1)
    give_gradients([weight])
    optimizer.step()
    other = nn.Parameter(randn(3, 6, 4, seed=9))
    resumed = Layca([other], lr=0.05)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["leading_dims"] == 1
    assert torch.equal(resumed.state[other]["initial_norm"], optimizer.state[weight]["initial_norm"])


def test_a_slice_of_zeros_has_no_direction() -> None:
    weight = nn.Parameter(randn(3, 6, 4))
    weight.data[1] = 0
    give_gradients([weight])
    with pytest.raises(RuntimeError, match="must not be all zeros, got parameter 0"):
        Layca([weight], leading_dims=1).step()


@pytest.mark.parametrize("leading", [-1, 1.5, "1"])
def test_leading_dims_must_be_a_count(leading: Any) -> None:
    with pytest.raises(ValueError, match="`leading_dims` must be an integer of at least 0, got"):
        Layca([nn.Parameter(randn(3, 2))], leading_dims=leading)


def test_leading_dims_must_leave_a_dimension() -> None:
    with pytest.raises(
        ValueError, match=r"`leading_dims` must be below the dimensions .* got 2 for a tensor of shape \(3, 2\)"
    ):
        Layca([nn.Parameter(randn(3, 2))], leading_dims=2)


# --- weights that others write to


@pytest.mark.contract("O11")
@pytest.mark.parametrize("write", ["no_grad", "data", "data of another tensor"])
@pytest.mark.parametrize("size", [40, 300])
def test_the_step_after_a_change_by_hand_turns_by_the_angle_and_restores_the_norm(write: str, size: int) -> None:
    """Also for layers whose norm is not read in every step."""
    weight = nn.Parameter(randn(size, size))
    start = float(weight.detach().norm(dtype=torch.float64))
    optimizer = Layca([weight], lr=0.02)
    for step in range(5):
        if step == 3:
            if write == "no_grad":
                with torch.no_grad():
                    weight.mul_(3)
            elif write == "data":
                weight.data.mul_(3)
            else:
                weight.data = weight.detach().clone().mul_(3)
        before = weight.detach().clone()
        give_gradients([weight], step)
        optimizer.step()
        assert angle(before, weight) == pytest.approx(math.atan(0.02), rel=1e-5)
        assert float(weight.detach().norm(dtype=torch.float64)) == pytest.approx(start, rel=1e-6)


@pytest.mark.contract("O35")
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_a_resumed_training_reads_the_norms_that_the_uninterrupted_one_does(base: str) -> None:
    """Bit by bit, for layers whose norm is not read in every step and wherever the training was cut."""

    def step(tensor: nn.Parameter, optimizer: Layca, number: int) -> None:
        tensor.grad = randn(150, 200, seed=number + 1)
        optimizer.step()

    weight = nn.Parameter(randn(150, 200))
    straight = Layca([weight], lr=0.02, base=base)
    for number in range(30):
        other = nn.Parameter(weight.detach().clone())
        resumed = Layca([other], lr=0.02, base=base)
        resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
        step(weight, straight, number)
        step(other, resumed, number)
        assert torch.equal(weight, other)


def test_norms_that_are_not_read_do_not_drift() -> None:
    weight = nn.Parameter(randn(200, 200))
    start = float(weight.detach().norm(dtype=torch.float64))
    optimizer = Layca([weight], lr=0.01)
    for step in range(1000):
        weight.grad = randn(200, 200, seed=step + 1)
        optimizer.step()
    assert float(weight.detach().norm(dtype=torch.float64)) == pytest.approx(start, rel=1e-6)


def test_a_group_that_starts_to_rotate_keeps_the_norm_it_has_then() -> None:
    weight = nn.Parameter(randn(6, 4))
    optimizer = Layca([{"params": [weight], "rotate": False}], lr=0.5)
    for step in range(2):
        give_gradients([weight], step)
        optimizer.step()
    norm = float(weight.detach().norm())
    optimizer.param_groups[0].update(rotate=True, lr=0.1)
    before = weight.detach().clone()
    give_gradients([weight], 2)
    optimizer.step()
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-5)
    assert float(weight.detach().norm()) == pytest.approx(norm, rel=1e-6)


# --- bfloat16


@pytest.mark.contract("O21")
@pytest.mark.parametrize(("lr", "share"), [(2.9e-3, 0.92), (1e-3, 0.52), (3e-4, 0.17), (1e-5, 0.06)])
def test_small_steps_in_bfloat16_warn_once_with_the_share_that_is_left(lr: float, share: float) -> None:
    weight = nn.Parameter(randn(256, 256).mul(0.05).bfloat16())
    optimizer = Layca([weight], lr=lr)
    give_gradients([weight])
    before = weight.detach().double()
    with pytest.warns(UserWarning, match=rf"bfloat16 weights move by about {share:.0%} of a step at lr {lr:.2g}"):
        optimizer.step()
    if lr >= 3e-4:
        # The message is right: what the weights made of the step, along the step.
        after = weight.detach().double()
        direction = -weight.grad.double()
        direction -= (direction * before).sum() / before.square().sum() * before
        moved = float((after / after.norm() * direction / direction.norm()).sum())
        assert moved / lr == pytest.approx(share, abs=0.05)
    give_gradients([weight], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize(("dtype", "lr"), [(torch.bfloat16, 3e-3), (torch.bfloat16, 0.0), (torch.float32, 1e-4)])
def test_no_warning_where_nothing_is_lost(dtype: torch.dtype, lr: float) -> None:
    weight = nn.Parameter(randn(20, 20).to(dtype))
    give_gradients([weight])
    Layca([weight], lr=lr).step()
