"""Contract O12 to O22: Layca where an optimizer of torch is expected."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.cases import KERNELS, angle, give_gradients, layers, norm, same, skip_on_torch_2_6, snapshot, take_steps
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pl_layer_rotation import Layca

TURN = math.atan(0.1)
STUCK = "has a fused SGD that moves no half-precision weights on the CPU"


@pytest.mark.contract("O12")
def test_it_reads_like_an_optimizer() -> None:
    weight, bias = layers(shapes=[(3, 2), (3,)])
    optimizer = Layca([weight, bias], lr=0.1, base="Adam", betas=(0.8, 0.99))
    assert isinstance(optimizer, torch.optim.Optimizer)
    text = repr(optimizer)
    assert text.startswith("Layca (\nParameter Group 0\n")
    assert all(line in text for line in ("    betas: (0.8, 0.99)\n", "    lr: 0.1\n", "    rotate: True\n"))
    assert optimizer.defaults["betas"] == (0.8, 0.99)
    assert optimizer.defaults["lr"] == 0.1
    assert [group["params"] for group in optimizer.param_groups] == [[weight, bias]]
    assert not optimizer.state
    take_steps(optimizer, 0, 1)
    assert set(optimizer.state) == {weight, bias}
    assert {"exp_avg", "exp_avg_sq", "step", "initial_norm"} == set(optimizer.state[weight])


@pytest.mark.contract("O12", "O13")
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("base", "options"), [("SGD", {}), ("AdamW", {"betas": (0.8, 0.99)}), ("Adagrad", {})])
def test_copies_keep_everything_and_go_on_alone(
    clone: Callable[[Layca], Layca], steps: int, base: str, options: dict[str, Any]
) -> None:
    tensors = layers()
    optimizer = Layca(tensors, lr=0.1, base=base, tangential=False, **options)
    take_steps(optimizer, 0, steps)
    copied = clone(optimizer)
    assert copied.base_class is optimizer.base_class
    assert copied.defaults == optimizer.defaults
    assert repr(copied) == repr(optimizer)
    before = snapshot(tensors)
    take_steps(copied, steps, steps + 2)
    assert same(tensors, before)
    take_steps(optimizer, steps, steps + 2)
    assert same(copied.param_groups[0]["params"], tensors)


def wrong_uses() -> dict[str, Callable[[Any], Any]]:
    """What every torch optimizer refuses, or warns about."""
    first, second = layers(shapes=[(3, 2), (2, 2)])
    return {
        "bare tensor": lambda make: make(first),
        "duplicate in a group": lambda make: make([first, first]),
        "duplicate across groups": lambda make: make([{"params": [first]}, {"params": [first]}]),
        "set": lambda make: make({first, second}),
        "set in a group": lambda make: make([{"params": {first, second}}]),
        "empty": lambda make: make([]),
        "a number": lambda make: make([3]),
        "non-leaf": lambda make: make([first * 2]),
        "lr of two elements": lambda make: make([first], lr=torch.tensor([0.1, 0.2])),
        "half-named parameters": lambda make: make([("a", first), second]),
        "half-named groups": lambda make: make([{"params": [("a", first)]}, {"params": [second]}]),
        "negative momentum": lambda make: make([first], momentum=-1.0),
        "nesterov without momentum": lambda make: make([first], nesterov=True),
        "fused and foreach": lambda make: make([first], fused=True, foreach=True),
        "adding a list": lambda make: make([first]).add_param_group([second]),
        "adding a parameter again": lambda make: make([first]).add_param_group({"params": [first]}),
        "adding a set": lambda make: make([first]).add_param_group({"params": {second}}),
        "adding names": lambda make: make([first]).add_param_group({"params": [("a", second)]}),
        "state of more groups": lambda make: make([first]).load_state_dict(
            make([{"params": [first]}, {"params": [second]}]).state_dict()
        ),
        "state of more parameters": lambda make: make([first]).load_state_dict(make([first, second]).state_dict()),
    }


def complaints(use: Callable[[Any], Any], make: Any) -> list[tuple[type, str]]:
    """Warnings and the error of one use, each with its type and text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            use(make)
        except Exception as error:
            return [*((w.category, str(w.message)) for w in caught), (type(error), str(error))]
    return [(w.category, str(w.message)) for w in caught]


@pytest.mark.contract("O14")
@pytest.mark.parametrize("name", wrong_uses())
def test_wrong_uses_are_answered_in_the_words_of_torch(name: str) -> None:
    if name == "set":
        skip_on_torch_2_6("takes a set of parameters without a word")
    theirs = complaints(wrong_uses()[name], torch.optim.SGD)
    assert theirs
    assert complaints(wrong_uses()[name], Layca) == theirs


@pytest.mark.contract("O14")
@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -1.0)])
def test_bad_betas_are_answered_in_the_words_of_torch(betas: tuple[float, float]) -> None:
    theirs = complaints(lambda make: make(layers(), betas=betas), torch.optim.Adam)
    assert theirs[0][0] is ValueError
    assert complaints(lambda make: make(layers(), base="Adam", betas=betas), Layca) == theirs


class WantsClosure(torch.optim.SGD):
    """Steps twice on two gradients, as sharpness-aware methods do."""

    def step(self, closure: Any = None) -> None:
        if closure is None:
            raise RuntimeError("a closure is needed")
        super().step(closure)


@pytest.mark.contract("O14", "O42")
def test_a_base_that_cannot_step_without_a_closure_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"`base` must give a direction .*, got WantsClosure, which needs .* a\s+closure"
    ):
        Layca(layers(), base=WantsClosure)


@pytest.mark.contract("O14")
def test_the_default_decay_of_adamw_is_taken_and_acts_on_plain_groups_alone() -> None:
    weight, bias, plain = layers(shapes=[(5, 4), (4,), (4,)])
    Layca([weight], base="AdamW", weight_decay=0)
    groups = [{"params": [weight, bias]}, {"params": [plain], "rotate": False}]
    optimizer = Layca(groups, lr=0.1, base="AdamW")
    before = snapshot([weight, bias, plain])
    for tensor in (weight, bias, plain):
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    assert same(before[:2], [weight, bias])
    torch.testing.assert_close(plain.detach(), before[2] * (1 - 0.1 * 0.01), rtol=1e-6, atol=0.0)


@pytest.mark.contract("O15")
def test_parameters_are_taken_in_every_form_that_torch_takes() -> None:
    results = []
    forms: list[Callable[[nn.Module], Any]] = [
        lambda net: list(net.parameters()),
        lambda net: net.parameters(),
        lambda net: net.named_parameters(),
        lambda net: [{"params": net.parameters()}],
        lambda net: [{"params": list(net.named_parameters())}],
        lambda net: ({"params": parameter} for parameter in net.parameters()),
    ]
    for form in forms:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        take_steps(Layca(form(net), lr=0.1, base="Adam"), 0, 2)
        results.append(list(net.parameters()))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.contract("O16")
@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_in_one_group_the_matrix_turns_by_atan_lr_and_the_bias_takes_the_lr(base: str) -> None:
    weight, bias, twin = [*layers(shapes=[(5, 4), (4,)]), *layers(shapes=[(5, 4), (4,)])[1:]]
    ours, theirs = Layca([weight, bias], lr=0.1, base=base), getattr(torch.optim, base)([twin], lr=0.1)
    for step in range(3):
        before = weight.detach().clone()
        give_gradients([bias], step)
        twin.grad = bias.grad.clone()
        give_gradients([weight], step + 10)
        ours.step()
        theirs.step()
        assert angle(before, weight) == pytest.approx(TURN, rel=1e-5)
    torch.testing.assert_close(bias, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.contract("O17")
@pytest.mark.filterwarnings("ignore:bfloat16 weights move by")  # true, and wanted here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_of_two_groups_the_one_with_a_vanishing_lr_stays(dtype: torch.dtype) -> None:
    still, moving = layers(dtype), layers(dtype)
    before = snapshot(moving)
    optimizer = Layca([{"params": still, "lr": 1e-28}, {"params": moving}], lr=0.1)
    take_steps(optimizer, 0, 5)
    assert same(still, before)
    assert all(angle(old, new) > TURN for old, new in zip(before, moving, strict=True))


@pytest.mark.contract("O17")
def test_options_edited_between_steps_are_obeyed_at_the_next() -> None:
    (weight,), (twin,) = layers(torch.float64)[1:2], layers(torch.float64)[1:2]
    optimizer = Layca([weight], lr=0.1, momentum=0.9)
    group = optimizer.param_groups[0]
    take_steps(optimizer, 0, 2)
    group["lr"], group["momentum"] = 0.2, 0.0
    before = weight.detach().clone()
    take_steps(optimizer, 2, 3)
    with torch.no_grad():
        twin.copy_(before)
    take_steps(Layca([twin], lr=0.2), 2, 3)
    assert angle(before, weight) == pytest.approx(math.atan(0.2), rel=1e-7)
    torch.testing.assert_close(weight, twin, rtol=1e-12, atol=1e-12)
    group["maximize"] = True
    take_steps(optimizer, 2, 3)
    assert angle(before, weight) < 0.1 * math.atan(0.2)
    group["rotate"], group["maximize"] = False, False
    before = weight.detach().clone()
    take_steps(optimizer, 3, 4)
    torch.testing.assert_close(weight.detach(), before - 0.2 * weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.contract("O18")
@pytest.mark.parametrize("base", ["SGD", "Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_lr_gives_the_weights_of_a_float_lr_and_schedulers_edit_it_in_place(
    base: str, shape: tuple[int, ...]
) -> None:
    if shape:
        skip_on_torch_2_6("has schedulers that edit no lr with a dimension")
    results = []
    for lr in (0.125, torch.full(shape, 0.125)):
        tensors = layers(shapes=[(5, 4), (4,)])
        optimizer = Layca(tensors, lr=lr, base=base)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for step in range(4):
            take_steps(optimizer, step, step + 1)
            scheduler.step()
        if isinstance(lr, Tensor):
            assert optimizer.param_groups[0]["lr"] is lr
        assert float(lr if isinstance(lr, Tensor) else optimizer.param_groups[0]["lr"]) == 0.125 / 4
        results.append(tensors)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.contract("O20")
@pytest.mark.parametrize("base", ["SGD", "Adam", "Adagrad"])
def test_parameters_without_a_gradient_are_neither_moved_nor_given_a_state(base: str) -> None:
    tensors = layers(shapes=[(5, 4), (4,), (3, 2), (2,)])
    before = snapshot(tensors)
    optimizer = Layca(tensors, lr=0.1, base=base)
    optimizer.step()
    assert not optimizer.state
    give_gradients(tensors[2:], 0)
    optimizer.step()
    assert set(optimizer.state) == set(tensors[2:])
    assert same(tensors[:2], before[:2])
    assert not torch.equal(tensors[2], before[2])


@pytest.mark.contract("O20")
@pytest.mark.parametrize(
    ("base", "options"),
    [("SGD", {"momentum": 0.9}), ("Adam", {"amsgrad": True}), ("AdamW", {}), ("Adagrad", {}), ("RMSprop", {})],
)
def test_freezing_and_unfreezing_is_the_same_with_every_kernel_state_included(
    base: str, options: dict[str, Any]
) -> None:
    results = []
    # torch has no fused RMSprop, and its fused SGD cannot start the momentum of some tensors only.
    for kernel in [name for name in KERNELS if name != "fused" or base not in ("SGD", "RMSprop")]:
        tensors = layers(torch.float64, [(5, 4), (40, 30), (4,), (3,)])
        optimizer = Layca(tensors, lr=0.1, base=base, **options, **KERNELS[kernel])
        for step in range(6):
            give_gradients(tensors, step)
            if step < 2 or step == 4:
                tensors[1].grad = tensors[3].grad = None
            optimizer.step()
        state = {(i, key): v for i, t in enumerate(tensors) for key, v in optimizer.state[t].items()}
        results.append({**dict(enumerate(tensors)), **state})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.contract("O21")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("base", ["SGD", "AdamW", "Adagrad"])
def test_every_kernel_gives_the_same_weights_also_with_a_number_among_them(
    base: str, dtype: torch.dtype, tolerance: float
) -> None:
    if (base, dtype) == ("SGD", torch.bfloat16):
        skip_on_torch_2_6(STUCK)
    results = []
    for kernel in KERNELS.values():
        tensors = layers(dtype, [(5, 4), (4,), (2, 3, 2), ()])
        take_steps(Layca(tensors, lr=0.05, base=base, **kernel), 0, 4)
        results.append(tensors)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=tolerance, atol=tolerance)


@pytest.mark.contract("O21")
@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_sums_beyond_its_range_turn_by_the_angle(kernel: str) -> None:
    if kernel == "fused":
        skip_on_torch_2_6(STUCK)
    weight = nn.Parameter((layers(shapes=[(400, 400)])[0].detach() * 2).half())
    assert norm(weight) ** 2 > 2 * torch.finfo(torch.float16).max
    before = weight.detach().clone()
    optimizer = Layca([weight], lr=0.1, **KERNELS[kernel])
    give_gradients([weight], 0)
    optimizer.step()
    assert angle(before, weight) == pytest.approx(TURN, rel=1e-3)
    assert norm(weight) == pytest.approx(norm(before), rel=1e-4)


def hook_events(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> list[str]:
    """In which order all the hooks of an optimizer fire; one of them was removed."""
    events: list[str] = []

    def note(text: str) -> Callable[..., None]:
        return lambda *_: events.append(text)

    optimizer = make(list(layers(shapes=[(5, 4), (4,)])))
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("state pre 1")),
        optimizer.register_state_dict_pre_hook(note("state pre 2"), prepend=True),
        optimizer.register_state_dict_post_hook(note("state post 1")),
        optimizer.register_state_dict_post_hook(note("state post 2"), prepend=True),
        optimizer.register_load_state_dict_pre_hook(note("load pre 1")),
        optimizer.register_load_state_dict_pre_hook(note("load pre 2"), prepend=True),
        optimizer.register_load_state_dict_post_hook(note("load post 1")),
        optimizer.register_load_state_dict_post_hook(note("load post 2"), prepend=True),
    ]
    removed = [
        optimizer.register_step_post_hook(note("removed")),
        optimizer.register_state_dict_post_hook(note("removed")),
    ]
    try:
        for handle in removed:
            handle.remove()
        take_steps(optimizer, 0, 2)
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    return events


@pytest.mark.contract("O22")
def test_hooks_of_steps_and_states_fire_once_and_in_the_order_of_torch() -> None:
    theirs = hook_events(lambda tensors: torch.optim.Adam(tensors))
    assert len(theirs) == 2 * 4 + 8
    assert hook_events(lambda tensors: Layca(tensors, base="Adam")) == theirs


@pytest.mark.contract("O22")
def test_state_hooks_may_replace_what_is_saved_and_loaded() -> None:
    (weight,) = layers(shapes=[(5, 4)])
    optimizer = Layca([weight], base="Adam", lr=0.1)
    take_steps(optimizer, 0, 1)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    assert optimizer.state_dict()["mark"] == 1

    def halve(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(optimizer.state_dict())
    before = weight.detach().clone()
    take_steps(optimizer, 1, 2)
    assert angle(before, weight) == pytest.approx(math.atan(0.05), rel=1e-5)


@pytest.mark.contract("O22")
def test_the_profiler_shows_one_step_and_it_is_ours() -> None:
    tensors = layers()
    optimizer = Layca(tensors, base="Adam")
    give_gradients(tensors, 0)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    steps = [event.key for event in profile.key_averages() if event.key.startswith("Optimizer.")]
    assert steps == ["Optimizer.step#Layca.step"]
