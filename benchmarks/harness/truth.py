"""The comparison with fp64 that decides right from wrong, of benchmarks and tests."""

import torch
from torch import Tensor


def assert_close_to_truth(
    actual: Tensor, truth: Tensor, same_dtype_baseline: Tensor, *, tolerance: float | None = None, name: str = "result"
) -> float:
    """Assert that the error against the truth is no larger than plain PyTorch's in the same dtype, plus a little.

    max |actual - truth| <= max |same_dtype_baseline - truth| + tolerance, so the bound is measured, not picked.

    Args:
        actual: what is tested.
        truth: the same quantity, same shape, computed in fp64 (from the same inputs as rounded to their dtype).
        same_dtype_baseline: the same quantity from plain PyTorch in the dtype of `actual`.
        tolerance: absolute; None for 2 eps max |truth|, eps of the dtype of `actual`: two roundings of the result.
        name: what the message calls it.

    Returns:
        max |actual - truth|; 0 for empty tensors.

    Raises:
        AssertionError: the error is larger, a shape or the dtype differs, `actual` is not finite, or the baseline is
            further from the truth than sqrt(eps) max |truth|, so that it computes something else and judges nothing.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert same_dtype_baseline.shape == truth.shape, f"{name}: the baseline has {tuple(same_dtype_baseline.shape)}"
    assert actual.dtype == same_dtype_baseline.dtype, (
        f"{name}: dtype {actual.dtype} against a baseline in {same_dtype_baseline.dtype}"
    )
    assert truth.dtype == torch.float64, f"{name}: the truth must be fp64, got {truth.dtype}"
    if not actual.numel():
        return 0.0
    assert bool(torch.isfinite(truth).all()), f"{name}: the truth is not finite"
    assert bool(torch.isfinite(actual).all()), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    truth = truth.detach().cpu()
    error = (actual.detach().cpu().double() - truth).abs()
    allowed = float((same_dtype_baseline.detach().cpu().double() - truth).abs().max())
    if tolerance is None:
        tolerance = 2 * torch.finfo(actual.dtype).eps * float(truth.abs().max())
    rounding = torch.finfo(actual.dtype).eps ** 0.5 * float(truth.abs().max()) + tolerance
    assert allowed <= rounding, f"{name}: plain PyTorch is off by {allowed:.3e}, which is more than rounding"
    worst = float(error.max())
    assert worst <= allowed + tolerance, (
        f"{name}: error {worst:.3e} at {tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))}, "
        f"plain PyTorch {allowed:.3e} + tolerance {tolerance:.3e}"
    )
    return worst
