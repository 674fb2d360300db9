"""Rows in chunks: one that is read twice comes from cache the second time, and its fp32 copy stays small."""

from torch import Tensor

from kmeans_route.reference import compute_dtype

BYTES = 8 << 20  # of a chunk in the compute dtype


def of(x: Tensor, width: int = 0) -> list[slice]:
    """Slices of rows of about the same length. width: how many numbers a row becomes, if more than it has."""
    rows = max(1, BYTES // max(1, max(width, x.shape[1]) * compute_dtype(x.dtype).itemsize))
    rows = rows if x.device.type == "cpu" else 16 * rows
    rows = -(-x.shape[0] // max(1, round(x.shape[0] / rows)))
    return [slice(i, min(i + rows, x.shape[0])) for i in range(0, x.shape[0], max(1, rows))]
