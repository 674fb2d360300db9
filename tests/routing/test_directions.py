"""directions(weight, dtype): unit rows, rounded once, safe at both ends of the range."""

import numpy as np
import pytest
import torch

from kmeans_route import directions
from tests.helpers import oracle
from tests.helpers.compare import EPS, generator, numpy


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (60, 100), (160, 2880)], ids=str)
def test_unit_rows_rounded_to_the_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=generator(0)) * torch.logspace(-6, 6, shape[0])[:, None]
    got = directions(weight, dtype)
    want = oracle.directions(weight.numpy())
    assert got.dtype == dtype
    # Half a step of the dtype, relative (absolute below the smallest normal number), and fp32 arithmetic before it.
    slack = 0.0 if dtype == torch.float64 else EPS[torch.float32]
    bound = np.maximum(np.abs(want), torch.finfo(dtype).tiny) * (EPS[dtype] / 2 * 1.01 + 2 * slack)
    if dtype == torch.float64:
        bound += 2e-16
    assert (np.abs(numpy(got) - want) <= bound).all()


def test_short_rows_are_zero() -> None:
    weight = torch.zeros(5, 4)
    weight[1, 0] = 0.9e-12
    weight[2, 0] = 1.1e-12
    weight[3, 1] = -3e-10
    weight[4] = 1e-13
    for dtype in EPS:
        got = directions(weight, dtype)
        assert got[[0, 1, 4]].abs().max() == 0
        assert got[2].tolist() == [1, 0, 0, 0]
        assert got[3].tolist() == [0, -1, 0, 0]


def test_long_rows_are_unit() -> None:
    """The squares overflow fp32, the norm does not."""
    got = directions(torch.tensor([[1e20, -1e20, 1e20, -1e20], [3e37, 4e37, 0, 0]]), torch.float32)
    np.testing.assert_allclose(got.numpy(), [[0.5, -0.5, 0.5, -0.5], [0.6, 0.8, 0, 0]], rtol=1e-6)


def test_only_the_direction_counts() -> None:
    weight = torch.randn(6, 5, generator=generator(1))
    scale = torch.tensor([2.0, 4.0, 0.5, 1024.0, 2.0**-20, 8.0])[:, None]
    assert torch.equal(directions(weight * scale, torch.float32), directions(weight, torch.float32))
    assert torch.equal(directions(-weight, torch.float32), -directions(weight, torch.float32))


def test_weights_of_other_dtypes_and_layouts() -> None:
    weight = torch.randn(6, 5, generator=generator(2))
    for dtype in EPS:
        cast = weight.to(dtype)
        got = directions(cast, torch.float32)
        np.testing.assert_allclose(numpy(got), oracle.directions(numpy(cast)), rtol=0, atol=1.5e-7)
    assert torch.equal(directions(weight.T.contiguous().T, torch.bfloat16), directions(weight, torch.bfloat16))


def test_no_gradient_and_no_change_of_the_weight() -> None:
    weight = torch.randn(6, 5, generator=generator(3))
    before = weight.clone()
    got = directions(weight.requires_grad_(), torch.float32)
    assert not got.requires_grad
    assert torch.equal(weight, before)
    unit = before / before.norm(dim=1, keepdim=True)
    again = directions(unit, torch.float32)
    again.zero_()
    assert unit.abs().sum() > 0, "the result must not share memory with the weight"
