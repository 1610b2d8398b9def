"""The mathematics against mpmath and numpy's long double, and laws that hold for every layer."""

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import reference_optimizers as twins
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation import layer_rotation

ANGLES = [1e-5, 1e-3, 0.1, 1.0, 2.0, 3.1]
RELATIVE_ERROR = {torch.float32: 1e-4, torch.float64: 1e-9}
every_dtype = pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=["fp32", "float64"])
every_angle = pytest.mark.parametrize("angle", ANGLES, ids="angle {:g}".format)
every_ratio = pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0, 1e-3], ids="norm x{:g}".format)

quick = settings(deadline=None, max_examples=50, derandomize=True)
numbers = st.floats(-8, 8, width=32)
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=16)
triples = st.lists(st.tuples(numbers, numbers, numbers), min_size=2, max_size=16)


def turned(size: int, angle: float, ratio: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A layer and its reference at about this angle and ratio of norms; rounded to the dtype."""
    generator = torch.Generator().manual_seed(size)
    reference, other = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    other -= (other @ reference) / (reference @ reference) * reference
    other *= reference.norm() / other.norm()
    weights = ratio * (math.cos(angle) * reference + math.sin(angle) * other)
    return weights.to(dtype), reference.to(dtype)


def exact_distance(weights: Tensor, reference: Tensor) -> float:
    """``1 - cos`` of the numbers that the tensors hold, in 60 digits."""
    with mpmath.workdps(60):
        w, o = ([mpmath.mpf(x) for x in t.double().flatten().tolist()] for t in (weights, reference))
        return float(1 - mpmath.fdot(w, o) / mpmath.sqrt(mpmath.fdot(w, w) * mpmath.fdot(o, o)))


def long_double_distance(weights: Tensor, reference: Tensor) -> float:
    """The same from the chord between unit vectors, for sizes where mpmath takes minutes."""
    w, o = (t.double().numpy().astype(np.longdouble) for t in (weights, reference))
    chord = w / np.sqrt((w * w).sum()) - o / np.sqrt((o * o).sum())
    return float((chord * chord).sum() / 2)


def vectors(rows: list[tuple[float, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The columns as tensors, none of them nearly zero."""
    columns = torch.tensor(rows, dtype=dtype).unbind(1)
    assume(all(column.norm() > 1e-3 for column in columns))
    return [column.clone() for column in columns]


# --- the cosine distance ---


@every_dtype
@every_angle
@every_ratio
@pytest.mark.parametrize("size", [10, 1000])
@pytest.mark.contract("M3")
def test_distance_of_a_small_layer_is_exact(size: int, ratio: float, angle: float, dtype: torch.dtype) -> None:
    weights, reference = turned(size, angle, ratio, dtype)
    expected = exact_distance(weights, reference)
    assert float(layer_rotation(weights, reference)) == pytest.approx(expected, rel=RELATIVE_ERROR[dtype], abs=0)


@every_dtype
@every_angle
@every_ratio
@pytest.mark.contract("M3")
def test_distance_of_100_thousand_weights_is_exact(ratio: float, angle: float, dtype: torch.dtype) -> None:
    weights, reference = turned(10**5, angle, ratio, dtype)
    expected = long_double_distance(weights, reference)
    assert float(layer_rotation(weights, reference)) == pytest.approx(expected, rel=RELATIVE_ERROR[dtype], abs=0)


@pytest.mark.parametrize(
    ("angle", "ratio", "dtype"),
    [(angle, 1.0, torch.float32) for angle in ANGLES]
    + [(1e-5, 1e-3, torch.float32), (1e-3, 2.0, torch.float32), (1e-3, 0.5, torch.float64)],
    ids=lambda value: str(value),
)
def test_distance_of_10_million_weights_is_exact(angle: float, ratio: float, dtype: torch.dtype) -> None:
    weights, reference = turned(10**7, angle, ratio, dtype)
    expected = long_double_distance(weights, reference)
    assert float(layer_rotation(weights, reference)) == pytest.approx(expected, rel=RELATIVE_ERROR[dtype], abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("angle", [0.01, 1.0, 3.1], ids="angle {:g}".format)
@pytest.mark.contract("M3")
def test_half_precision_weights_are_read_as_the_numbers_that_they_are(dtype: torch.dtype, angle: float) -> None:
    weights, reference = turned(1000, angle, 1.5, dtype)
    expected = exact_distance(weights, reference)
    assert float(layer_rotation(weights, reference)) == pytest.approx(expected, rel=1e-5, abs=0)


def test_weights_and_reference_may_have_different_dtypes() -> None:
    weights, reference = turned(1000, 0.3)[0], turned(1000, 0.3, dtype=torch.float64)[1]
    expected = exact_distance(weights, reference)
    assert float(layer_rotation(weights, reference)) == pytest.approx(expected, rel=1e-6, abs=0)
    assert float(layer_rotation(reference, weights)) == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.5, 4.0], ids="scaled {:g}".format)
@pytest.mark.contract("M3")
def test_identical_weights_have_not_turned_at_all(dtype: torch.dtype, scale: float) -> None:
    reference = turned(10_000, 0, dtype=dtype)[1]
    assert layer_rotation(scale * reference, reference) == 0


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e-4], ids="scaled {:g}".format)
@pytest.mark.contract("M3")
def test_opposite_weights_are_at_distance_two(scale: float) -> None:
    reference = turned(10_000, 0)[1]
    distance = float(layer_rotation(-scale * reference, reference))
    assert distance == pytest.approx(2, rel=1e-6, abs=0)
    assert distance <= 2


@pytest.mark.parametrize("scale", [1e-25, 1e-38, 1e-42, 1e25, 1e37], ids="weights around {:g}".format)
@pytest.mark.parametrize("angle", [1e-3, 1.0], ids="angle {:g}".format)
def test_tiny_and_huge_fp32_weights_neither_underflow_nor_overflow(scale: float, angle: float) -> None:
    weights, reference = ((scale * t).float() for t in turned(1000, angle, dtype=torch.float64))
    expected = exact_distance(weights, reference)
    assert float(layer_rotation(weights, reference)) == pytest.approx(expected, rel=1e-4, abs=0)


def test_tiny_weights_may_have_a_huge_reference() -> None:
    weights, reference = turned(1000, 0.5, ratio=1e-30)
    expected = exact_distance(weights, reference)
    assert float(layer_rotation(weights, reference)) == pytest.approx(expected, rel=1e-4, abs=0)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "inf"])
@pytest.mark.parametrize("side", [0, 1], ids=["in the weights", "in the reference"])
@pytest.mark.contract("M4")
def test_a_value_that_is_not_finite_gives_nan(value: float, side: int) -> None:
    pair = turned(100, 0.1)
    pair[side][7] = value
    assert layer_rotation(*pair).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
def test_two_layers_of_zeros_give_nan(dtype: torch.dtype) -> None:
    assert layer_rotation(torch.zeros(5, dtype=dtype), torch.zeros(5, dtype=dtype)).isnan()


@every_dtype
@pytest.mark.parametrize("zero", [0, 1], ids=["zero weights", "zero reference"])
@pytest.mark.contract("M4")
def test_one_norm_of_zero_gives_nan(zero: int, dtype: torch.dtype) -> None:
    for size in range(2, 40):
        pair = list(turned(size, 0.1, dtype=dtype))
        pair[zero] = torch.zeros(size, dtype=dtype)
        assert layer_rotation(*pair).isnan()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second element": lambda t: torch.stack([t, torch.full_like(t, 9)], -1)[..., 0],
    "narrowed": lambda t: torch.cat([t, torch.full_like(t, 9)], 1)[:, : t.shape[1]],
    "requires grad": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("reference_layout", LAYOUTS.values(), ids=[f"reference {name}" for name in LAYOUTS])
@pytest.mark.contract("M18")
def test_memory_layout_does_not_matter_and_inputs_stay_as_they_are(
    layout: Callable[[Tensor], Tensor], reference_layout: Callable[[Tensor], Tensor]
) -> None:
    plain = [t.view(4, 6, 5, 2) for t in turned(240, 0.2, 1.3)]
    weights, reference = layout(plain[0]), reference_layout(plain[1])
    versions = weights._version, reference._version
    distance = layer_rotation(weights, reference)
    assert float(distance) == pytest.approx(exact_distance(*plain), rel=1e-6, abs=0)
    assert not distance.requires_grad
    assert (weights._version, reference._version) == versions
    assert torch.equal(weights, plain[0])


def test_an_expanded_tensor_counts_every_element() -> None:
    reference = turned(12, 0)[1].view(3, 4)
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(3, 4)
    assert float(layer_rotation(weights, reference)) == pytest.approx(exact_distance(weights, reference), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("conjugate", [False, True], ids=["plain", "lazily conjugated"])
def test_complex_weights_turn_as_pairs_of_real_ones(dtype: torch.dtype, conjugate: bool) -> None:
    real = [t.view(5, 10, 2) for t in turned(100, 0.4, 2.0, dtype.to_real())]
    weights, reference = (torch.view_as_complex(t) for t in real)
    if conjugate:
        weights, reference = weights.conj(), reference.conj()
    assert float(layer_rotation(weights, reference)) == pytest.approx(exact_distance(*real), rel=1e-6, abs=0)


@quick
@given(pairs)
def test_any_fp32_pair_agrees_with_60_digits(rows: list[tuple[float, float]]) -> None:
    weights, reference = vectors(rows, torch.float32)
    distance = float(layer_rotation(weights, reference))
    assert 0 <= distance <= 2
    assert distance == pytest.approx(exact_distance(weights, reference), rel=1e-4, abs=1e-14)


@quick
@given(pairs)
def test_distance_is_symmetric(rows: list[tuple[float, float]]) -> None:
    weights, reference = vectors(rows)
    there, back = layer_rotation(weights, reference), layer_rotation(reference, weights)
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-14)


@quick
@given(pairs, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_distance_does_not_depend_on_the_norms(rows: list[tuple[float, float]], first: float, second: float) -> None:
    weights, reference = vectors(rows)
    scaled = layer_rotation(first * weights, second * reference)
    torch.testing.assert_close(scaled, layer_rotation(weights, reference), rtol=1e-9, atol=1e-14)


@quick
@given(pairs, st.randoms(use_true_random=False))
def test_distance_does_not_depend_on_the_order_of_the_weights(rows: list[tuple[float, float]], random: Any) -> None:
    weights, reference = vectors(rows)
    order = random.sample(range(len(rows)), len(rows))
    shuffled = layer_rotation(weights[order], reference[order])
    torch.testing.assert_close(shuffled, layer_rotation(weights, reference), rtol=1e-9, atol=1e-14)


@quick
@given(pairs)
def test_turning_the_reference_round_gives_the_rest_to_two(rows: list[tuple[float, float]]) -> None:
    weights, reference = vectors(rows)
    both = layer_rotation(weights, reference) + layer_rotation(weights, -reference)
    torch.testing.assert_close(both, torch.tensor(2.0, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@quick
@given(triples)
def test_angles_obey_the_triangle_inequality(rows: list[tuple[float, float, float]]) -> None:
    first, second, third = vectors(rows)
    direct, leg, rest = (
        float(geometry.angle(layer_rotation(*ends))) for ends in ((first, third), (first, second), (second, third))
    )
    assert direct <= leg + rest + 1e-6


@every_dtype
@every_ratio
@pytest.mark.parametrize("angle", [1e-3, 0.1, 1.0, 3.1], ids="angle {:g}".format)
@pytest.mark.contract("M2")
def test_sums_of_uneven_and_empty_pieces_add_up_to_the_layer(angle: float, ratio: float, dtype: torch.dtype) -> None:
    weights, reference = turned(1000, angle, ratio, dtype)
    pieces = [(w, o) for w, o in zip(weights.split([0, 1, 699, 300]), reference.split([0, 1, 699, 300]), strict=True)]
    sums = sum(geometry.rotation_sums([w], [o], [False])[0] for w, o in pieces)
    distance = float(geometry.cosine_distance(sums)[0])
    assert distance == pytest.approx(exact_distance(weights, reference), rel=1e-6, abs=0)


@quick
@given(pairs, st.integers(0, 16))
def test_where_a_layer_is_cut_does_not_matter(rows: list[tuple[float, float]], cut: int) -> None:
    weights, reference = vectors(rows, torch.float32)
    sums = sum(
        geometry.rotation_sums([w], [o], [False])[0]
        for w, o in ((weights[:cut], reference[:cut]), (weights[cut:], reference[cut:]))
    )
    expected = exact_distance(weights, reference)
    assert float(geometry.cosine_distance(sums)[0]) == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_each_layer_of_a_list_gets_its_own_row() -> None:
    layers = [turned(50, 0.1), turned(60, 1.0, 2.0), turned(70, 1e-4, 1e-3, torch.float64)]
    weights, references = zip(*layers, strict=True)
    sums, scales = geometry.rotation_sums(weights, references, [True] * 3)
    expected = [exact_distance(w, o) for w, o in layers]
    assert geometry.cosine_distance(sums).tolist() == pytest.approx(expected, rel=1e-6, abs=0)
    assert geometry.norm_ratio(sums, scales).tolist() == pytest.approx([1, 2, 1e-3], rel=1e-6, abs=0)


def test_no_layers_give_no_rows() -> None:
    sums, scales = geometry.rotation_sums([], [], [])
    assert (tuple(sums.shape), tuple(scales.shape)) == ((0, 4), (0,))


@every_angle
def test_angle_undoes_one_minus_cosine(angle: float) -> None:
    with mpmath.workdps(40):
        distance = torch.tensor(float(1 - mpmath.cos(mpmath.mpf(angle))), dtype=torch.float64)
    assert float(geometry.angle(distance)) == pytest.approx(angle, rel=1e-12, abs=0)


@pytest.mark.parametrize(("distance", "angle"), [(0.0, 0.0), (1.0, math.pi / 2), (2.0, math.pi)])
def test_angle_at_the_ends_and_in_the_middle(distance: float, angle: float) -> None:
    assert float(geometry.angle(torch.tensor(distance, dtype=torch.float64))) == pytest.approx(angle, rel=1e-15, abs=0)


# --- Layca's update ---


def update(step: Tensor, weights: Tensor, lr: float, tangential: bool = True) -> Tensor:
    """The weights after one update to their own norm, by the coefficients of the sums: those of the CPU.

    Those of accelerators must be the same but for round-off.
    """
    sums, norm = geometry.step_sums(step, weights, exact=True), float(weights.norm())
    a, b = geometry.layca_coefficients(*sums.tolist(), lr, norm, tangential=tangential)
    rate, norms = (torch.tensor([value], dtype=torch.float64) for value in (lr, norm))
    on_device = geometry.device_coefficients(sums[None], rate, norms, torch.tensor([tangential]))
    assert [float(value) for value in on_device] == pytest.approx([a, b], rel=1e-9, abs=1e-300, nan_ok=True)
    return a * weights - b * step


@every_dtype
@pytest.mark.parametrize("size", [3, 1000, 300_000])
def test_step_sums_are_the_three_scalar_products(size: int, dtype: torch.dtype) -> None:
    step, weights = turned(size, 1.0, 0.2, dtype)
    s, w = step.double().numpy(), weights.double().numpy()
    sums = geometry.step_sums(step, weights)
    assert sums.tolist() == pytest.approx([s @ w, s @ s, w @ w], rel=1e-5, abs=0)
    assert sums.dtype == torch.float64


@pytest.mark.parametrize("tilt", [1.0, 1e-2, 1e-4], ids="tilt {:g}".format)
def test_tangential_part_of_a_nearly_radial_step_is_exact(tilt: float) -> None:
    step, weights = turned(1000, tilt, 3.0)
    s, w = (t.double().numpy().astype(np.longdouble) for t in (step, weights))
    part = s - (s @ w) / (w @ w) * w
    along, _, square = geometry.step_sums(step, weights, exact=True).tolist()
    assert geometry.tangential_square(step, weights, along, square) == pytest.approx(
        float(part @ part), rel=1e-6, abs=0
    )


@pytest.mark.parametrize(
    ("sums", "needed"),
    [
        ([0.5, 1, 1], False),
        ([0.999, 1, 1], True),
        ([0, 1e-31, 1], True),
        ([0, 1, 1e31], True),
        ([math.nan, math.nan, 1], True),
    ],
    ids=["ordinary", "nearly radial", "tiny step", "huge weights", "NaN"],
)
def test_sums_that_fp32_cannot_hold_are_taken_again(sums: list[float], needed: bool) -> None:
    assert geometry.needs_exact_sums(*sums) is needed


@pytest.mark.parametrize("lr", [1e-6, 1e-2, 1.0, 30.0], ids="lr {:g}".format)
def test_coefficients_do_the_four_steps_of_the_paper(lr: float) -> None:
    step, weights = turned(100, 1.2, 0.3, torch.float64)
    expected = twins.layca(weights.numpy(), weights.numpy(), step.numpy(), lr)
    np.testing.assert_allclose(update(step, weights, lr).numpy(), expected, rtol=1e-12, atol=1e-14)


@quick
@given(pairs, st.floats(1e-6, 10))
def test_an_update_turns_by_atan_lr_and_keeps_the_norm(rows: list[tuple[float, float]], lr: float) -> None:
    step, weights = vectors(rows)
    assume(0.01 < float(layer_rotation(step, weights)) < 1.99)
    after = update(step, weights, lr)
    assert float(after.norm()) == pytest.approx(float(weights.norm()), rel=1e-12, abs=0)
    assert float(geometry.angle(layer_rotation(after, weights))) == pytest.approx(math.atan(lr), rel=1e-8, abs=0)


@quick
@given(pairs, st.floats(1e-3, 1e3))
def test_an_update_does_not_depend_on_the_length_of_the_step(rows: list[tuple[float, float]], scale: float) -> None:
    step, weights = vectors(rows)
    assume(0.01 < float(layer_rotation(step, weights)) < 1.99)
    torch.testing.assert_close(update(scale * step, weights, 0.1), update(step, weights, 0.1), rtol=1e-9, atol=1e-11)


def test_without_projection_the_step_has_the_length_of_the_weights_times_lr() -> None:
    step, weights = turned(100, 1.2, 0.3, torch.float64)
    moved = weights - 0.05 * step * weights.norm() / step.norm()
    expected = moved * weights.norm() / moved.norm()
    torch.testing.assert_close(update(step, weights, 0.05, tangential=False), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "scale", [0.0, 2.0, 0.1, -1.0], ids=["zero step", "radial step", "rounded radial step", "step outwards"]
)
def test_a_step_without_direction_leaves_the_weights_bitwise_alone(scale: float) -> None:
    weights = turned(100, 0)[1]
    assert torch.equal(update(scale * weights, weights, 0.1), weights)


def test_a_rate_of_zero_leaves_the_weights_bitwise_alone() -> None:
    step, weights = turned(100, 1.2)
    assert torch.equal(update(step, weights, 0.0), weights)


def test_nan_in_the_step_reaches_the_weights() -> None:
    step, weights = turned(100, 1.2)
    step[0] = math.nan
    assert update(step, weights, 0.1).isnan().all()


def test_a_known_tangential_square_is_used() -> None:
    _, unknown = geometry.layca_coefficients(0.0, 4.0, 1.0, 1.0, 1.0)
    _, known = geometry.layca_coefficients(0.0, 4.0, 1.0, 1.0, 1.0, tangent_square=1.0)
    assert [known, unknown] == pytest.approx([math.sqrt(0.5), math.sqrt(0.5) / 2], rel=1e-15, abs=0)


@pytest.mark.parametrize(
    "sums", [(0.0, 1.0, 0.0), (math.inf, math.inf, 1.0), (0.0, math.inf, 1.0)], ids=["no weights", "inf", "inf across"]
)
@pytest.mark.parametrize("tangential", [True, False], ids=["projected", "hyperball"])
def test_sums_without_a_direction_spoil_the_weights_visibly(sums: tuple[float, float, float], tangential: bool) -> None:
    a, b = geometry.layca_coefficients(*sums, 0.1, 1.0, tangential=tangential)
    assert not math.isfinite(a * 1.0 - b * math.sqrt(sums[1]))


@pytest.mark.parametrize("name", ["contiguous", "transposed", "channels_last"])
def test_a_flat_view_writes_into_the_tensor(name: str) -> None:
    tensor = LAYOUTS[name](torch.ones(4, 6, 5, 2))
    flat = geometry.flat_view(tensor)
    assert flat is not None
    flat.zero_()
    assert flat.shape == (240,)
    assert not tensor.any()


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(4, 6)[:, ::2], torch.ones(1, 3).expand(4, 3), torch.arange(4.0).as_strided((3, 2), (1, 1))],
    ids=["gaps", "expanded", "overlapping"],
)
def test_memory_with_gaps_or_overlaps_has_no_flat_view(tensor: Tensor) -> None:
    assert geometry.flat_view(tensor) is None
