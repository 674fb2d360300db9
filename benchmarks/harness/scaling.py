"""How a cost grows with a size: the exponent of a power law, fitted to measured values."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Fit(NamedTuple):
    """value = factor size^exponent. r_squared: share of the variance of log(value) that the line explains."""

    exponent: float
    factor: float
    r_squared: float


def fit_power(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """The line through log(value) over log(size), by least squares.

    Args:
        sizes: positive, at least two that differ.
        values: positive, one a size.

    Raises:
        ValueError: too few sizes, or something that has no logarithm.

    Example:
        >>> fit = fit_power([1, 2, 4], [3, 12, 48])
        >>> round(fit.exponent, 6), round(fit.factor, 6), round(fit.r_squared, 6)
        (2.0, 3.0, 1.0)
    """
    if len(set(sizes)) < 2 or len(sizes) != len(values):
        raise ValueError(f"a fit needs a value for each of two sizes or more, got {len(values)} for {list(sizes)}")
    if min(*sizes, *values) <= 0:
        raise ValueError(f"sizes and values must be positive, got {list(sizes)} and {list(values)}")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [a - mean_x for a in x], [b - mean_y for b in y]
    slope = math.fsum(a * b for a, b in zip(dx, dy, strict=True)) / math.fsum(a * a for a in dx)
    total = math.fsum(b * b for b in dy)
    left = math.fsum((b - slope * a) ** 2 for a, b in zip(dx, dy, strict=True))
    return Fit(slope, math.exp(mean_y - slope * mean_x), 1 - left / total if total else 1.0)
