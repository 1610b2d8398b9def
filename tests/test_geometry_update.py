"""Layca's update on plain tensors: sums, tangential part, coefficients, and the flat view that is written into."""

import math

import numpy as np
import pytest
import reference_optimizers as twins
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from layer_pairs import LAYOUTS, every_dtype, pairs, quick, turned, vectors
from torch import Tensor

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation import layer_rotation


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
