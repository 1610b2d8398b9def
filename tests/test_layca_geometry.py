"""What a step of Layca does to a layer: an independent numpy twin, angles, norms, layouts and dtypes."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference_optimizers as twins
import torch
from contract.cases import angle, give_gradients, norm
from hypothesis import given, settings
from hypothesis import strategies as st
from layca_cases import backward, every_base, layers, network, train
from torch import nn

from pl_layer_rotation import Layca


@pytest.mark.contract("O1")
@every_base
@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"foreach": False}], ids=["default", "foreach", "loop"])
def test_sixty_steps_equal_the_four_steps_of_the_paper(
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    twin: Callable[[], twins.Direction],
    kernel: dict[str, Any],
) -> None:
    net = network(torch.float64)
    optimizer = Layca(net.parameters(), lr=0.03, base=base, **options, **kernel)
    layers = [p for p in net.parameters() if p.dim() > 1]
    initial = [p.detach().numpy().copy() for p in layers]
    expected = [array.copy() for array in initial]
    directions = [twin() for _ in layers]
    for step in range(60):
        backward(net, step)
        gradients = [p.grad.numpy().copy() for p in layers]
        optimizer.step()
        for i, gradient in enumerate(gradients):
            expected[i] = twins.layca(expected[i], initial[i], directions[i](gradient), 0.03)
    for parameter, array in zip(layers, expected, strict=True):
        error = np.linalg.norm(parameter.detach().numpy() - array) / np.linalg.norm(array)
        assert error < 1e-10


@pytest.mark.contract("O1")
@every_base
@pytest.mark.parametrize("lr", [1e-6, 3**-5, 3**-3, 1.0])
def test_a_step_turns_by_the_requested_angle(base: Any, options: dict[str, Any], twin: Any, lr: float) -> None:
    # Below 1e-4 the rounding of fp32 weights is itself an angle of 3e-8.
    tensors = layers(torch.float64 if lr < 1e-4 else torch.float32)
    optimizer = Layca(tensors, lr=lr, base=base, **options)
    for step in range(3):
        before = [tensor.detach().clone() for tensor in tensors]
        give_gradients(tensors, step)
        optimizer.step()
        for old, new in zip(before, tensors, strict=True):
            assert angle(old, new) == pytest.approx(math.atan(lr), rel=1e-5)
            assert norm(new) == pytest.approx(norm(old), rel=1e-6)


@pytest.mark.contract("O3")
@pytest.mark.parametrize(("base", "scale"), [("SGD", 1e-30), ("SGD", 1e30), ("Adam", 1e-30)])
def test_the_scale_of_gradients_does_not_matter(base: str, scale: float) -> None:
    tensors, scaled = layers(), layers()
    options = {"eps": 1e-45} if base == "Adam" else {"momentum": 0.9}
    for some, factor in ((tensors, 1.0), (scaled, scale)):
        optimizer = Layca(some, base=base, **options)
        for step in range(2):
            give_gradients(some, step, factor)
            optimizer.step()
    start = layers()
    for one, other, old in zip(tensors, scaled, start, strict=True):
        if base == "SGD":
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert angle(old, other) > 3**-3


@pytest.mark.contract("O2")
def test_the_norm_is_kept_over_ten_thousand_steps() -> None:
    weight = nn.Parameter(torch.randn(20, 30, generator=torch.Generator().manual_seed(0)))
    start = norm(weight)
    optimizer = Layca([weight], lr=1e-2, momentum=0.9)
    for step in range(10_000):
        give_gradients([weight], step)
        optimizer.step()
    assert norm(weight) == pytest.approx(start, rel=1e-6)


@pytest.mark.contract("O1")
@pytest.mark.parametrize("sine", [1e-1, 1e-3, 1e-5])
def test_nearly_radial_steps_turn_by_the_requested_angle(sine: float) -> None:
    weight = nn.Parameter(torch.randn(200, 300, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    across = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    across -= (across * before).sum() / before.square().sum() * before
    weight.grad = before + sine * across * (before.norm() / across.norm())
    Layca([weight], lr=0.1).step()
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-4)


@pytest.mark.contract("O5", "O8")
@pytest.mark.parametrize("gradient", ["zero", "radial", "none"])
def test_without_a_direction_a_layer_stays_bitwise(gradient: str) -> None:
    weight = nn.Parameter(torch.randn(30, 20))
    before = weight.detach().clone()
    weight.grad = {"zero": torch.zeros_like(before), "radial": before.clone(), "none": None}[gradient]
    Layca([weight], lr=0.1).step()
    assert torch.equal(weight, before)


@pytest.mark.contract("O5")
def test_a_learning_rate_of_zero_moves_nothing_but_builds_the_state() -> None:
    net = network()
    before = copy.deepcopy(net)
    optimizer = Layca(net.parameters(), lr=0.0, base="Adam")
    train(net, optimizer, 0, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))
    assert all({"exp_avg", "initial_norm"} <= optimizer.state[p].keys() for p in net.parameters())


@pytest.mark.contract("O6")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_reaches_its_layer_and_no_other(bad: float) -> None:
    tensors, alone = layers(), layers()
    give_gradients(tensors, 0)
    give_gradients(alone, 0)
    tensors[1].grad[0, 0] = bad
    Layca(tensors).step()
    Layca(alone).step()
    assert tensors[1].isnan().any()
    assert all(torch.equal(tensors[i], alone[i]) for i in (0, 2, 3))


@pytest.mark.contract("O8", "O16")
@every_base
def test_plain_tensors_take_the_steps_of_the_base(base: Any, options: dict[str, Any], twin: Any) -> None:
    tensors = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.tensor([[2.0]]))]
    clones = copy.deepcopy(tensors)
    groups = [
        {"params": tensors[:1], "lr": 0.1},
        {"params": tensors[1:2], "rotate": False, "lr": 0.2},
        {"params": tensors[2:], "lr": 0.3},
    ]
    ours = Layca(groups, base=base, **options)
    weight_decay = {"weight_decay": 0.0} if base is torch.optim.AdamW else {}
    theirs = base(
        [
            {"params": [c], "lr": lr, **(weight_decay if lr != 0.2 else {})}
            for c, lr in zip(clones, (0.1, 0.2, 0.3), strict=True)
        ],
        **options,
    )
    for step in range(3):
        for some, optimizer in ((tensors, ours), (clones, theirs)):
            give_gradients(some, step)
            optimizer.step()
    for one, other in zip(tensors, clones, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.contract("O10")
def test_maximize_turns_the_other_way() -> None:
    (weight,), (mirror,) = layers()[:1], layers()[:1]
    before = weight.detach().clone()
    for tensor, maximize in ((weight, False), (mirror, True)):
        give_gradients([tensor], 0)
        Layca([tensor], maximize=maximize).step()
    assert angle(weight, mirror) == pytest.approx(2 * math.atan(3**-3), rel=1e-4)
    assert angle(before, mirror) == pytest.approx(math.atan(3**-3), rel=1e-5)


def test_without_projection_the_update_is_hyperball() -> None:
    (weight,) = layers(torch.float64)[1:2]
    before = weight.detach().clone()
    give_gradients([weight], 0)
    Layca([weight], lr=0.1, tangential=False).step()
    moved = before - 0.1 * before.norm() * weight.grad / weight.grad.norm()
    torch.testing.assert_close(weight.detach(), moved * before.norm() / moved.norm(), rtol=1e-12, atol=1e-12)


def layout(kind: str) -> nn.Parameter:
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    if kind == "channels_last":
        return nn.Parameter(weight.to(memory_format=torch.channels_last))
    if kind == "transposed":
        return nn.Parameter(weight.transpose(0, 1))
    return nn.Parameter(torch.randn(8, 4, 3, 6, generator=torch.Generator().manual_seed(0))[..., ::2])


@pytest.mark.contract("O9")
@pytest.mark.parametrize("kind", ["channels_last", "transposed", "sliced"])
def test_the_layout_of_weights_is_kept_and_does_not_matter(kind: str) -> None:
    weight = layout(kind)
    plain = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    strides = weight.stride()
    for tensor in (weight, plain):
        optimizer = Layca([tensor], base="AdamW")
        for step in range(3):
            give_gradients([tensor], step)
            optimizer.step()
    assert weight.stride() == strides
    torch.testing.assert_close(weight, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.contract("O21", "O26")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.complex64, 1e-5)]
)
def test_other_dtypes_turn_by_the_angle_within_their_resolution(dtype: torch.dtype, tolerance: float) -> None:
    weight = nn.Parameter(torch.randn(60, 50, generator=torch.Generator().manual_seed(0)).to(dtype))
    if dtype.is_complex:
        weight = nn.Parameter(weight.detach() * (1 + 0.5j))
    before = weight.detach().clone()
    weight.grad = torch.randn(60, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    Layca([weight], lr=0.1).step()
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=tolerance)


def test_layers_larger_than_the_scratch_and_many_small_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(2300, 2000), *[(9, 9)] * 50]]
    before = [tensor.detach().clone() for tensor in tensors]
    give_gradients(tensors, 0)
    Layca(tensors, lr=0.05, base="Adam").step()
    for old, new in zip(before, tensors, strict=True):
        assert angle(old, new) == pytest.approx(math.atan(0.05), rel=1e-5)


@pytest.mark.contract("O1")
@given(
    lr=st.floats(1e-3, 2.0),
    shape=st.sampled_from([(2, 1), (3, 2), (5, 4, 2), (4, 3, 2, 2)]),
    seed=st.integers(0, 2**20),
    scale=st.floats(1e-6, 1e6),
)
@settings(deadline=None, max_examples=60)
def test_angle_and_norm_for_any_layer(lr: float, shape: tuple[int, ...], seed: int, scale: float) -> None:
    weight = nn.Parameter(
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    )
    before = weight.detach().clone()
    give_gradients([weight], seed + 1)
    Layca([weight], lr=lr).step()
    assert angle(before, weight) == pytest.approx(math.atan(lr), rel=1e-7)
    assert float(weight.detach().norm()) == pytest.approx(float(before.norm()), rel=1e-12)


@pytest.mark.contract("O32")
def test_equal_runs_are_bitwise_equal_and_draw_no_random_numbers() -> None:
    results = []
    for _ in range(2):
        net = network()
        torch.manual_seed(11)
        train(net, Layca(net.parameters(), base="Adam"), 0, 3)
        results.append([*net.parameters(), torch.rand(1)])
    torch.manual_seed(11)
    assert torch.equal(results[0][-1], torch.rand(1))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
