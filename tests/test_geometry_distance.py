"""The cosine distance and its sums against mpmath and numpy's long double, and laws that hold for every layer."""

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_pairs import (
    LAYOUTS,
    RELATIVE_ERROR,
    every_dtype,
    exact_distance,
    long_double_distance,
    pairs,
    quick,
    triples,
    turned,
    vectors,
)
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation import layer_rotation

ANGLES = [1e-5, 1e-3, 0.1, 1.0, 2.0, 3.1]
every_angle = pytest.mark.parametrize("angle", ANGLES, ids="angle {:g}".format)
every_ratio = pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0, 1e-3], ids="norm x{:g}".format)


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
