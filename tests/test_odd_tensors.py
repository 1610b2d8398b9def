"""The cosine distance of any tensors that somebody may hold: strides, scales, dtypes, and what has no distance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_pairs import exact_distance
from torch import Tensor

from pl_layer_rotation import layer_rotation

quick = settings(deadline=None, max_examples=80, derandomize=True)
digits = st.floats(-8, 8, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def views(draw: st.DrawFn, shape: list[int], dtype: torch.dtype, exponent: int) -> Tensor:
    """A tensor of this shape: some dimensions permuted in memory, some with gaps, one maybe expanded, maybe flipped."""
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    expanded = draw(st.integers(-1, len(shape) - 1))
    stored = [1 if dim == expanded else shape[dim] * steps[dim] for dim in order]
    numbers = draw(st.lists(digits, min_size=math.prod(stored), max_size=math.prod(stored)))
    memory = (torch.tensor(numbers, dtype=torch.float64) * 10.0**exponent).to(dtype).view(stored)
    view = memory.permute([order.index(dim) for dim in range(len(shape))])
    for dim, step in enumerate(steps):
        view = view.expand([*view.shape[:dim], shape[dim], *view.shape[dim + 1 :]]) if dim == expanded else view
        view = view if dim == expanded else view[(slice(None),) * dim + (slice(None, None, step),)]
    return view.requires_grad_() if draw(st.booleans()) and view.is_leaf else view


@quick
@given(st.data())
def test_any_strides_and_scales_of_fp32_agree_with_60_digits(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    pair = [data.draw(views(shape, torch.float32, data.draw(st.integers(-41, 36)))) for _ in range(2)]
    distance = layer_rotation(*pair)
    if any(not tensor.any() for tensor in pair):
        assert distance.isnan()
        return
    exact = exact_distance(*(tensor.detach() for tensor in pair))
    assert float(distance) == pytest.approx(exact, rel=1e-4, abs=1e-14)
    assert (0 <= float(distance) <= 2, distance.requires_grad) == (True, False)


@quick
@given(st.data())
def test_any_two_dtypes_agree_with_60_digits(data: st.DataObject) -> None:
    kinds = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    pair = [data.draw(views([3, 4], data.draw(kinds), 0)) for _ in range(2)]
    if all(tensor.any() for tensor in pair):
        exact = exact_distance(*(tensor.detach() for tensor in pair))
        assert float(layer_rotation(*pair)) == pytest.approx(exact, rel=1e-4, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_numbers_that_no_dot_product_takes_are_read_as_they_are(dtype: torch.dtype) -> None:
    weights, reference = torch.tensor([1.0, 0.0]).to(dtype), torch.tensor([1.0, 1.0]).to(dtype)
    assert float(layer_rotation(weights, reference)) == pytest.approx(1 - math.sqrt(0.5), rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_real_tensor_is_a_complex_one_without_imaginary_part(dtype: torch.dtype) -> None:
    real, complex_ = torch.tensor([1.0, 1.0], dtype=dtype), torch.tensor([1 + 1j, 0])
    for pair in ((real, complex_), (complex_, real)):
        assert float(layer_rotation(*pair)) == pytest.approx(0.5, rel=1e-12, abs=0)


def test_no_elements_have_no_direction() -> None:
    assert layer_rotation(torch.zeros(0, 3), torch.zeros(0, 3)).isnan()


def test_one_number_turns_by_nothing_or_round() -> None:
    assert layer_rotation(torch.tensor(2.0), torch.tensor(3.0)) == 0
    assert layer_rotation(torch.tensor(-2.0), torch.tensor(3.0)) == 2


WITHOUT_ROWS = {
    "sparse": torch.eye(2).to_sparse(),
    "meta": torch.ones(2, 2, device="meta"),
}


@pytest.mark.parametrize("kind", WITHOUT_ROWS)
@pytest.mark.parametrize("place", [0, 1], ids=["weights", "reference"])
def test_a_tensor_without_dense_values_is_an_error(kind: str, place: int) -> None:
    pair = [torch.eye(2), torch.eye(2)]
    pair[place] = WITHOUT_ROWS[kind]
    name = ("weights", "reference")[place]
    with pytest.raises(ValueError, match=f"`{name}` must be a dense tensor with values, got torch.* on .*Pass"):
        layer_rotation(*pair)
