"""Contract O1 to O11: what one step of Layca does to a layer, in numbers."""

import math
from typing import Any

import pytest
import reference_optimizers as twins
import torch
from contract.cases import KERNELS, angle, flat, give_gradients, layers, norm, same, snapshot, take_steps
from torch import Tensor, nn

from pl_layer_rotation import Layca, layca_optimizers

BASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "sgd": ("SGD", {}, twins.sgd),
    "momentum": ("SGD", {"momentum": 0.9}, lambda: twins.sgd(0.9)),
    "adam": ("Adam", {}, twins.adam),
    "adamw": ("AdamW", {}, twins.adam),
    "rmsprop": ("RMSprop", {}, twins.rmsprop),
}


def without_radial_part(step: Tensor, weight: Tensor) -> Tensor:
    return step - (step @ weight) / (weight @ weight) * weight


@pytest.mark.contract("O1")
@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, kernel) for name in BASES for kernel in KERNELS if (name, kernel) != ("rmsprop", "fused")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lr", [1e-6, 1e-4, 1e-2, 1.0])
def test_a_layer_turns_by_atan_lr_along_the_step_of_the_base(
    name: str, kernel: str, dtype: torch.dtype, lr: float
) -> None:
    base, options, twin = BASES[name]
    tensors = layers(dtype)
    directions = [twin() for _ in tensors]
    optimizer = Layca(tensors, lr=lr, base=base, **options, **KERNELS[kernel])
    for step in range(3):
        before = snapshot(tensors)
        give_gradients(tensors, step)
        gradients = [tensor.grad.double().numpy() for tensor in tensors]
        optimizer.step()
        for old, new, twin_step, gradient in zip(before, tensors, directions, gradients, strict=True):
            # Rounding turns the stored weights too, by about a quarter of eps; along the step where its entries are
            # all alike, as Adam's first.
            rounding = torch.finfo(dtype).eps / 4 / lr
            assert angle(old, new) == pytest.approx(math.atan(lr), rel=max(1e-5, rounding))
            along = -torch.from_numpy(twin_step(gradient)).flatten()
            moved, wanted = without_radial_part(flat(new), flat(old)), without_radial_part(along, flat(old))
            cosine = float(moved @ wanted / (moved.norm() * wanted.norm()))
            assert cosine >= 1 - max(1e-6, rounding**2)


@pytest.mark.contract("O2")
def test_the_norm_of_bfloat16_weights_is_kept_over_ten_thousand_steps() -> None:
    (weight,) = layers(torch.bfloat16, [(20, 30)])
    start = norm(weight)
    optimizer = Layca([weight], lr=1e-2, momentum=0.9)
    take_steps(optimizer, 0, 10_000)
    assert norm(weight) == pytest.approx(start, rel=1e-3)


@pytest.mark.contract("O2")
def test_the_norm_of_a_large_layer_is_kept_over_ten_thousand_steps() -> None:
    (weight,) = layers(shapes=[(130, 130)])
    start = norm(weight)
    optimizer = Layca([weight], lr=1e-2, momentum=0.9)
    gradients = [torch.randn(130, 130, generator=torch.Generator().manual_seed(seed)) for seed in range(17)]
    for step in range(10_000):
        weight.grad = gradients[step % 17]
        optimizer.step()
    assert norm(weight) == pytest.approx(start, rel=1e-6)


@pytest.mark.contract("O3")
@pytest.mark.parametrize(
    ("base", "options", "scale"),
    [
        ("SGD", {}, 1e-30),
        ("SGD", {}, 1e30),
        ("SGD", {"momentum": 0.9}, 1e-30),
        ("SGD", {"momentum": 0.9}, 1e30),
        # Steps of adaptive bases shrink only where eps outweighs the gradient; their own squares overflow at 1e20.
        ("Adam", {}, 1e-30),
        ("Adam", {}, 1e18),
        ("RMSprop", {}, 1e-30),
        ("Adagrad", {}, 1e-30),
    ],
)
def test_tiny_and_huge_gradients_turn_by_the_same_angle(base: str, options: dict[str, Any], scale: float) -> None:
    tensors = layers()
    optimizer = Layca(tensors, lr=0.1, base=base, **options)
    for step in range(3):
        before = snapshot(tensors)
        give_gradients(tensors, step, scale)
        optimizer.step()
        for old, new in zip(before, tensors, strict=True):
            assert angle(old, new) == pytest.approx(math.atan(0.1), rel=1e-5)


@pytest.mark.contract("O4")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_factor_on_the_loss_changes_nothing_over_sgd(momentum: float) -> None:
    results = []
    for factor in (1.0, 1e-3, 700.0):
        tensors = layers()
        optimizer = Layca(tensors, lr=0.1, momentum=momentum)
        for step in range(5):
            give_gradients(tensors, step, factor)
            optimizer.step()
        results.append(tensors)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)


@pytest.mark.contract("O4")
def test_clipping_changes_nothing_but_the_mix_of_momentum() -> None:
    def trained(momentum: float, clip: bool) -> Tensor:
        (weight,) = layers(shapes=[(40, 30)])
        optimizer = Layca([weight], lr=0.1, momentum=momentum)
        for step in range(5):
            give_gradients([weight], step, scale=10.0**step)
            if clip:
                nn.utils.clip_grad_norm_([weight], 1e-2)
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(trained(0.0, clip=True), trained(0.0, clip=False), rtol=1e-6, atol=1e-6)
    assert angle(trained(0.9, clip=True), trained(0.9, clip=False)) > 1e-2


@pytest.mark.contract("O5")
def test_zero_gradients_leave_layers_alone_and_plain_tensors_to_the_base() -> None:
    weight, plain, bias = layers(shapes=[(5, 4), (6, 3), (4,)])
    twin = nn.Parameter(plain.detach().clone())
    groups = [{"params": [weight, bias]}, {"params": [plain], "rotate": False, "lr": 0.1, "weight_decay": 0.5}]
    ours, theirs = Layca(groups, base="AdamW"), torch.optim.AdamW([twin], lr=0.1, weight_decay=0.5)
    before = snapshot([weight, bias])
    for tensor in (weight, plain, bias, twin):
        tensor.grad = torch.zeros_like(tensor)
    for _ in range(3):
        ours.step()
        theirs.step()
    assert same(before, [weight, bias])
    torch.testing.assert_close(plain, twin, rtol=1e-6, atol=0.0)
    assert norm(plain) < 0.9 * norm(layers(shapes=[(5, 4), (6, 3), (4,)])[1])


@pytest.mark.contract("O5")
@pytest.mark.parametrize(("base", "options"), [("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {})])
def test_a_zero_gradient_still_turns_a_layer_with_momentum(base: str, options: dict[str, Any]) -> None:
    (weight,) = layers(shapes=[(5, 4)])
    optimizer = Layca([weight], lr=0.1, base=base, **options)
    take_steps(optimizer, 0, 2)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-5)


@pytest.mark.contract("O6")
@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_a_nan_stays_in_its_layer_and_shows_there_from_then_on(base: str) -> None:
    poisoned, healthy = layers(), layers()
    options = {"momentum": 0.9} if base == "SGD" else {}
    optimizers = [Layca(tensors, base=base, **options) for tensors in (poisoned, healthy)]
    for step in range(4):
        for tensors, optimizer in zip((poisoned, healthy), optimizers, strict=True):
            give_gradients(tensors, step)
            if step == 1 and tensors is poisoned:
                tensors[1].grad[0, 0] = math.nan
            optimizer.step()
        assert bool(poisoned[1].isnan().any()) == (step >= 1)
        assert same([poisoned[0], *poisoned[2:]], [healthy[0], *healthy[2:]])


class ZeroInitialized(nn.Module):
    """Where networks start at zero: LoRA's B, a zero convolution, a residual output, the modulation of adaLN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 4, bias=False)
        self.lora_a, self.lora_b = nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.residual = nn.Linear(4, 4, bias=False)
        self.modulation = nn.Linear(4, 4, bias=False)
        self.zero_conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        for module in (self.lora_b, self.residual, self.modulation, self.zero_conv):
            nn.init.zeros_(module.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs) + self.lora_b(self.lora_a(inputs))
        hidden = hidden * (1 + self.modulation(hidden)) + self.residual(hidden)
        return hidden + self.zero_conv(hidden[:, None]).squeeze(1)


@pytest.mark.contract("O7")
def test_layers_that_start_at_zero_are_trained_by_plain_steps_after_one_warning() -> None:
    net = ZeroInitialized()
    with pytest.warns(UserWarning, match="Layers of zeros .* take plain steps") as caught:
        optimizer = layca_optimizers(net, lr=0.05)["optimizer"]
    named = ["lora_b", "residual", "modulation", "zero_conv"]
    assert [str(warning.message).count(name) for warning in caught for name in named] == [1] * 4
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert norm(net.body.weight) == pytest.approx(norm(before["body.weight"]), rel=1e-6)


@pytest.mark.contract("O8")
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_a_single_number_takes_the_plain_step(shape: tuple[int, ...], base: str) -> None:
    (number,), (twin,) = layers(shapes=[shape]), layers(shapes=[shape])
    ours, theirs = Layca([number], lr=0.1, base=base), getattr(torch.optim, base)([twin], lr=0.1)
    take_steps(ours, 0, 3)
    take_steps(theirs, 0, 3)
    torch.testing.assert_close(number, twin, rtol=1e-6, atol=0.0)


@pytest.mark.contract("O8")
@pytest.mark.parametrize("factor", [0.37, -1e-4, 3e5])
@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_radial_step_of_a_small_layer_is_no_step(factor: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Powers of two: the gradient is radial to the last bit.
    weight = nn.Parameter(torch.tensor([1.0, 0.5, -4.0, 2.0, 8.0, 0.25], dtype=dtype)[: math.prod(shape)].view(shape))
    before = weight.detach().clone()
    weight.grad = weight.detach() * torch.tensor(factor, dtype=dtype)
    Layca([weight], lr=0.1).step()
    assert torch.equal(weight, before)


@pytest.mark.contract("O9")
@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_a_change_to_channels_last_between_steps_is_followed(base: str) -> None:
    convolutions = []
    for change in (False, True):
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 4, 3)
        optimizer = Layca(convolution.parameters(), lr=0.1, base=base)
        take_steps(optimizer, 0, 2)
        if change:
            convolution.to(memory_format=torch.channels_last)
        before = convolution.weight.detach().clone()
        take_steps(optimizer, 2, 4)
        assert angle(before, convolution.weight) > 0.1
        convolutions.append(convolution)
    assert convolutions[1].weight.stride() == (27, 1, 9, 3)
    torch.testing.assert_close(convolutions[1].weight, convolutions[0].weight, rtol=1e-5, atol=1e-6)


def triple(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(3)


def triple_unseen(weight: nn.Parameter) -> None:
    weight.data.mul_(3)


def replace(weight: nn.Parameter) -> None:
    weight.data = 3 * weight.data


@pytest.mark.contract("O11")
@pytest.mark.parametrize("change", [triple, triple_unseen, replace])
@pytest.mark.parametrize("shape", [(5, 4), (130, 130)])
def test_weights_changed_by_hand_return_to_their_first_norm(change: Any, shape: tuple[int, int]) -> None:
    (weight,) = layers(shapes=[shape])
    start = norm(weight)
    optimizer = Layca([weight], lr=0.1)
    take_steps(optimizer, 0, 2)
    change(weight)
    before = weight.detach().clone()
    take_steps(optimizer, 2, 3)
    assert norm(weight) == pytest.approx(start, rel=1e-6)
    assert angle(before, weight) == pytest.approx(math.atan(0.1), rel=1e-5)


@pytest.mark.contract("O11")
def test_a_change_that_no_sample_of_a_large_layer_shows_is_found_in_a_hundred_steps() -> None:
    (weight,) = layers(shapes=[(130, 130)])
    start = norm(weight)
    optimizer = Layca([weight], lr=0.1)
    take_steps(optimizer, 0, 2)
    weight.data[1, 1:9] = 30.0
    take_steps(optimizer, 2, 102)
    assert norm(weight) == pytest.approx(start, rel=1e-6)


@pytest.mark.contract("O11")
def test_weights_restored_without_the_optimizer_return_to_the_norm_that_it_knows() -> None:
    net, saved = nn.Linear(130, 130, bias=False), nn.Linear(130, 130, bias=False)
    nn.init.normal_(saved.weight, std=2.0)
    start = norm(net.weight)
    optimizer = Layca(net.parameters(), lr=0.1)
    take_steps(optimizer, 0, 1)
    net.load_state_dict(saved.state_dict())
    take_steps(optimizer, 1, 2)
    assert norm(net.weight) == pytest.approx(start, rel=1e-6)
    assert angle(saved.weight, net.weight) == pytest.approx(math.atan(0.1), rel=1e-5)
