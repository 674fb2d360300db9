"""Inputs that tests alone need: other layouts, exact ties."""

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "padded_rows", "every_second", "transposed", "expanded")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout; what lies between them is NaN, so that reading it shows."""
    if layout == "expanded":
        return x[:1].expand(x.shape[0], -1)
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "padded_rows":
        wide = x.new_full((x.shape[0], x.shape[1] + 3), torch.nan)
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    if layout == "every_second":
        wide = x.new_full((x.shape[0], 2 * x.shape[1]), torch.nan)
        wide[:, ::2] = x
        return wide[:, ::2]
    return x


def make_tied_rows(
    num_tokens: int,
    hidden_size: int,
    num_experts: int,
    *,
    num_levels: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Hidden states (T, D) and centroids (E, D), in `dtype` and fp32, whose scores tie exactly on any backend.

    The centroids are coordinate axes and the first E entries of a token are integers in 1..num_levels, so every dot is
    one exact product: experts with the same entry have the same score bit for bit, in whatever order one sums.
    """
    assert num_experts <= hidden_size, "one axis an expert"
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-num_levels, num_levels + 1, (num_tokens, hidden_size), generator=generator).float()
    x[:, :num_experts] = torch.randint(1, num_levels + 1, (num_tokens, num_experts), generator=generator).float()
    return x.to(device=device, dtype=dtype), torch.eye(num_experts, hidden_size, device=device)
