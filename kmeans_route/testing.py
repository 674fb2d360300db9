"""Shared by commands, tests and benchmarks: named shapes, input makers, and the comparison of selections.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ModelShape(NamedTuple):
    """Router of a published model: hidden_size D, num_experts E, top_k K."""

    hidden_size: int
    num_experts: int
    top_k: int


class BenchShape(NamedTuple):
    """One routing problem: num_tokens T, hidden_size D, num_experts E, top_k K."""

    num_tokens: int
    hidden_size: int
    num_experts: int
    top_k: int


MODEL_SHAPES = {
    "OLMoE": ModelShape(2048, 64, 8),
    "Qwen3-30B-A3B": ModelShape(2048, 128, 8),
    "Mixtral": ModelShape(4096, 8, 2),
    "DeepSeek-V3": ModelShape(7168, 256, 8),
    "GPT-OSS-120B": ModelShape(2880, 128, 4),
    "Qwen3-Next": ModelShape(2048, 512, 10),
}


def make_hidden_states(
    num_tokens: int,
    hidden_size: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    offset: float = 0.0,
    num_clusters: int = 0,
    spread: float = 0.5,
) -> Tensor:
    """Random hidden states (T, D), equal for equal arguments on every device.

    Args:
        num_tokens, hidden_size: T and D, >= 0.
        seed: of a private generator; the global one is not touched.
        dtype, device: of the result. Values are drawn in fp32 on the CPU, then cast and moved.
        offset: length of a direction common to all tokens, in units of the tokens' own standard deviation times
            sqrt(D): 1 makes half of the energy common, as the hidden states of real models have it.
        num_clusters: 0 for standard normal tokens, else tokens lie around that many normal centres.
        spread: standard deviation around a centre (whose own entries have standard deviation 1).
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden_size, generator=generator)
    if num_clusters:
        centres = torch.randn(num_clusters, hidden_size, generator=generator)
        member = torch.randint(num_clusters, (num_tokens,), generator=generator)
        x.mul_(spread).add_(centres[member])
    if offset:
        x.add_(torch.randn(hidden_size, generator=generator), alpha=offset)
    return x.to(device=device, dtype=dtype)


def make_centroids(num_experts: int, hidden_size: int, *, seed: int = 1, device: str | torch.device = "cpu") -> Tensor:
    """Random unit rows (E, D) in fp32, equal for equal arguments on every device, drawn by a private generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(num_experts, hidden_size, generator=generator)).to(device)


def assert_same_selection(
    indices: Tensor, reference_scores_plus_bias: Tensor, *, tolerance: float = 2e-7, cap: float = 1e-4
) -> int:
    """Assert that the ids are those of the reference, except in near-ties, which are counted and capped.

    A row is a near-tie when two neighbours among its K + 1 largest reference values differ by less than `tolerance`.
    There another order, or another last expert, passes as long as no place loses more than K `tolerance`; every other
    row must agree id for id. With tolerance 0 exact ties, too, must go to the lower id.

    Args:
        indices: (T, K) int64, what is tested.
        reference_scores_plus_bias: (T, E) s + b in fp64; -inf where an expert is no candidate.
        tolerance: near-tie margin in units of cosine. fp32 cosines of up to 2048 terms were seen 7e-8 off the truth,
            so two of them can change places within twice that.
        cap: largest share of rows that may differ; at least one row always may.

    Returns:
        Number of rows that differ from the reference, near-ties all of them.

    Raises:
        AssertionError: an id differs outside near-ties, an id is repeated or out of range, or too many rows differ.
    """
    indices, ranking = indices.detach().cpu(), reference_scores_plus_bias.detach().cpu()
    (num_tokens, top_k), num_experts = indices.shape, ranking.shape[1]
    assert ranking.shape[0] == num_tokens, f"ids of {num_tokens} tokens against scores of {ranking.shape[0]}"
    assert indices.dtype == torch.int64, f"ids must be int64, got {indices.dtype}"
    in_range = (indices >= 0) & (indices < num_experts)
    assert bool(in_range.all()), f"{int((~in_range).sum())} ids lie outside [0, {num_experts})"
    in_order = indices.sort(dim=1).values
    repeated = (in_order[:, 1:] == in_order[:, :-1]).any(1)
    assert not bool(repeated.any()), f"{int(repeated.sum())} rows repeat an id, first row {_first(repeated)}"

    values, order = ranking.sort(dim=1, descending=True, stable=True)
    expected, head = order[:, :top_k], values[:, : top_k + 1]
    near = ((head[:, :-1] - head[:, 1:]) < tolerance).any(1)
    differs = (indices != expected).any(1)
    outside = differs & ~near
    assert not bool(outside.any()), (
        f"{int(outside.sum())} of {num_tokens} rows differ outside near-ties, first row {(t := _first(outside))}: "
        f"got {indices[t].tolist()}, expected {expected[t].tolist()}"
    )
    worse = differs & ((values[:, :top_k] - ranking.gather(1, indices)).amax(1) > tolerance * top_k)
    assert not bool(worse.any()), f"{int(worse.sum())} near-tie rows chose a worse expert, first row {_first(worse)}"
    num_differing = int(differs.sum())
    allowed = math.ceil(cap * num_tokens)
    assert num_differing <= allowed, f"{num_differing} of {num_tokens} rows differ in near-ties, at most {allowed} may"
    return num_differing


def _first(rows: Tensor) -> int:
    return int(rows.nonzero()[0])
