"""Measures of a mixture's health: tensors in, tensors out, on any device, without a host sync.

Legend: E experts, D hidden size, T tokens, K top_k; `...` are leading dimensions (layers, steps) and stay as they are.
f_e = counts_e / sum of counts is the share of the load on expert e. Where nothing was counted, every f_e is 1 / E:
an idle router is balanced (load 1, MaxVio 0, std 0, entropy 1, Gini 0), and all its experts are dead.

Measures of a load take counts (..., E), tokens of each expert, integer or floating, >= 0; with E = 0 or no dimension at
all they raise ValueError. Measures of directions take centroids (..., E, D), floating, of any scale; with fewer than
two dimensions they raise ValueError.
"""

import math

import torch
from torch import Tensor

from kmeans_route.reference import compute_dtype, product, unit_rows


def load(counts: Tensor) -> Tensor:
    """Load of each expert relative to the mean: counts_e / mean of counts = E f_e.

    Returns:
        (..., E) floating, >= 0, mean 1; 1 everywhere where nothing was counted.

    Example:
        >>> import torch
        >>> load(torch.tensor([3, 1, 0, 0])).tolist()
        [3.0, 1.0, 0.0, 0.0]
    """
    return _shares(counts) * counts.shape[-1]


def max_vio(counts: Tensor) -> Tensor:
    """MaxVio = max load / mean load - 1: how far the fullest expert is above a fair share.

    Counts of one batch give the batch MaxVio, pooled counts the global.

    Returns:
        (...) in [0, E - 1]; 0 is perfect balance, and the value where nothing was counted.

    Example:
        >>> import torch
        >>> max_vio(torch.tensor([30, 20, 10])).item()
        0.5
    """
    return (load(counts).amax(-1) - 1).clamp_min(0)


def load_std(counts: Tensor) -> Tensor:
    """Population standard deviation over the experts of f_e = counts_e / sum of counts.

    The shares sum to 1, so the value depends on E: times E it is the coefficient of variation of the load, the one to
    compare between models of different E.

    Returns:
        (...) in [0, sqrt(E - 1) / E]; 0 where nothing was counted.
    """
    return _shares(counts).std(-1, correction=0)


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the load, normalised: -(sum over e of f_e log f_e) / log E.

    Returns:
        (...) in [0, 1]: 1 for an even load, 0 when one expert takes all; 1 for E = 1 and where nothing was counted.
    """
    shares = _shares(counts)
    if shares.shape[-1] == 1:
        return torch.ones_like(shares[..., 0])
    return (-torch.xlogy(shares, shares).sum(-1) / math.log(shares.shape[-1])).clamp(0, 1)


def gini(counts: Tensor) -> Tensor:
    """Gini coefficient of the load: sum over i of (2 i - E - 1) f_(i) / E, f_(1) <= ... <= f_(E).

    Returns:
        (...) in [0, 1 - 1 / E]: 0 for an even load and where nothing was counted, 1 - 1 / E when one takes all.
    """
    shares = _shares(counts).sort(-1).values
    num_experts = shares.shape[-1]
    rank = torch.arange(1 - num_experts, num_experts, 2, device=shares.device, dtype=shares.dtype)
    return ((shares * rank).sum(-1) / num_experts).clamp_min(0)


def dead_experts(counts: Tensor) -> Tensor:
    """Number of experts that no token chose: sum over e of [counts_e = 0].

    Returns:
        (...) int64 in [0, E]; E where nothing was counted.
    """
    _check_counts(counts)
    return (counts == 0).sum(-1)


def effective_experts(indices: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """How many experts are chosen independently: 1 + (tr C)^2 / tr(C^2), C the covariance over tokens of [e in sel_t].

    C is (E, E); the ratio is the participation ratio of its spectrum, the number of directions that carry variance.
    Loads do not show what this does: where experts are always chosen together they are one expert of their summed
    width, however even the load. E balanced experts of which each token takes K at random give E, for K = 1 too; two
    sets of E / 2 that are always chosen whole give 2; one set for all tokens gives 1.

    Args:
        indices: (..., T, K) int64 ids in [0, E), distinct in a row, as routers return them.
        num_experts: E.
        mask: (..., T) bool, such as `Routing.valid`; tokens where it is false are left out.

    Returns:
        (...) fp32 in [1, E].

    Raises:
        ValueError: indices has fewer than two dimensions.

    Example:
        >>> import torch
        >>> effective_experts(torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]]), num_experts=4).item()
        2.0
    """
    if indices.dim() < 2:
        raise ValueError(f"indices must be (..., T, K), got {tuple(indices.shape)}: pass a row of expert ids a token")
    chosen = torch.zeros(*indices.shape[:-1], num_experts, device=indices.device).scatter(-1, indices, 1.0)
    keep = torch.ones_like(chosen[..., :1]) if mask is None else mask[..., None].to(chosen.dtype)
    total = keep.sum(-2, keepdim=True).clamp_min(1)
    centred = (chosen - (chosen * keep).sum(-2, keepdim=True) / total) * keep
    with torch.autocast(indices.device.type, enabled=False):
        covariance = product(centred.mT, centred) / total
    return _participation(covariance)


def effective_experts_of(chosen_together: Tensor, top_k: int) -> Tensor:
    """`effective_experts` from counts (..., E, E) of tokens that chose both of two experts, its own on the diagonal.

    0 where nothing was counted.
    """
    num_tokens = chosen_together.diagonal(dim1=-2, dim2=-1).sum(-1) / top_k
    share = chosen_together.double() / num_tokens.clamp_min(1)[..., None, None]
    load = share.diagonal(dim1=-2, dim2=-1)
    found = _participation(share - load[..., :, None] * load[..., None, :])
    return torch.where(num_tokens > 0, found, 0.0)


def _participation(covariance: Tensor) -> Tensor:
    trace, squares = covariance.diagonal(dim1=-2, dim2=-1).sum(-1), covariance.square().sum((-2, -1))
    return (1 + trace**2 / torch.where(squares > 0, squares, 1.0)).clamp(1, covariance.shape[-1])


def pairwise_cosine(weight: Tensor) -> Tensor:
    """Cosine between every two centroids: d_i . d_j with d_e = c_e / ||c_e||.

    Returns:
        (..., E, E) symmetric, in [-1, 1], in fp32 (fp64 for fp64 centroids); rows and columns of centroids shorter
        than 1e-12 are 0.
    """
    d = _directions(weight, "weight")
    with torch.autocast(d.device.type, enabled=False):
        return product(d, d.mT).clamp(-1, 1)


def mean_pairwise_cosine(weight: Tensor) -> Tensor:
    """Mean cosine between different centroids: (sum over i != j of d_i . d_j) / (E (E - 1)).

    Returns:
        (...) in [-1 / (E - 1), 1]; 0 for a single expert. Near 1 the centroids have collapsed onto each other.
    """
    cosine = pairwise_cosine(weight)
    num_experts = cosine.shape[-1]
    off_diagonal = cosine.sum((-2, -1)) - cosine.diagonal(dim1=-2, dim2=-1).sum(-1)
    return off_diagonal / max(1, num_experts * (num_experts - 1))


def differences_cosine(weight: Tensor) -> Tensor:
    """Cosine between every two directions less the mean of all: what tells the experts apart.

    A part that all directions share raises all scores of a token alike, so it decides no choice. Whitened directions
    hold a large one, the mean of the centroids.

    Returns:
        (..., E, E) as `pairwise_cosine`. Its mean off the diagonal is about -1 / (E - 1) whatever the directions are.
    """
    d = _directions(weight, "weight")
    return pairwise_cosine(d - d.mean(-2, keepdim=True))


def nearest_cosine(cosine: Tensor) -> Tensor:
    """Mean over the experts of the largest cosine with another one, of cosines (..., E, E).

    Returns:
        (...) in [-1, 1]; 0 for a single expert. Near 1 every expert has a like one.
    """
    if cosine.shape[-1] < 2:
        return cosine.new_zeros(cosine.shape[:-2])
    others = cosine.clone()
    others.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
    return others.amax(-1).mean(-1)


def centroid_drift(before: Tensor, after: Tensor) -> Tensor:
    """Angle in radians that each centroid has turned: 2 atan2(||u - v||, ||u + v||), u and v its two directions.

    This form keeps its digits for small angles, where 1 - cosine has none left in fp32.

    The leading dimensions of the two must broadcast.

    Returns:
        (..., E) in [0, pi]; pi / 2 where one of the two is shorter than 1e-12, 0 where both are.

    Raises:
        ValueError: another number of experts or hidden size.
    """
    if before.shape[-2:] != after.shape[-2:]:
        raise ValueError(
            f"before and after must hold the same (E, D), got {tuple(before.shape)} and {tuple(after.shape)}: "
            "pass two states of one router"
        )
    return angle_of_turn(centroid_turn(before, after))


def centroid_turn(before: Tensor, after: Tensor) -> Tensor:
    """(2, ..., E): ||u - v|| and ||u + v||, u and v the directions before and after. `centroid_drift` is its angle."""
    u, v = _directions(before, "before"), _directions(after, "after")
    return torch.stack([torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1)])


def angle_of_turn(turn: Tensor) -> Tensor:
    """The angle in radians (..., E) of a turn (2, ..., E)."""
    return 2 * torch.atan2(turn[0], turn[1])


def coupling(scores: Tensor, activation_norms: Tensor, mask: Tensor | None = None) -> Tensor:
    """Router-expert coupling: Pearson correlation of a score with the chosen expert's activation norm.

        r = sum (s - mean s)(a - mean a) / sqrt(sum (s - mean s)^2  sum (a - mean a)^2)

    over all (token, choice) pairs: does the expert respond more strongly to the tokens that the router finds closer?

    Args:
        scores: (T, K) score of each selected expert, or any shape.
        activation_norms: same shape, norm of that expert's output (or inner activation) for that token.
        mask: bool, broadcastable to the shape of scores ((T, 1) for a mask of tokens); pairs where it is false are
            left out, whatever they hold.

    Returns:
        () in [-1, 1]; 0 where fewer than two pairs are left or one of the two does not vary.

    Raises:
        ValueError: the shapes differ.
    """
    if scores.shape != activation_norms.shape:
        raise ValueError(
            f"scores and activation_norms must have one shape, got {tuple(scores.shape)} and "
            f"{tuple(activation_norms.shape)}: pass one norm for each selected score"
        )
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    s, a = _centred(scores, keep), _centred(activation_norms, keep)
    scale = torch.linalg.vector_norm(s) * torch.linalg.vector_norm(a)
    r = (s * a).sum() / torch.where(scale > 0, scale, 1.0)
    return r.clamp(-1, 1)


def _check_counts(counts: Tensor) -> None:
    if counts.dim() == 0 or counts.shape[-1] == 0:
        raise ValueError(f"counts must be (..., E) with E >= 1, got {tuple(counts.shape)}: pass one count an expert")


def _shares(counts: Tensor) -> Tensor:
    """f_e (..., E); 1 / E where the counts sum to 0."""
    _check_counts(counts)
    total = counts.sum(-1, keepdim=True)
    dtype = compute_dtype(counts.dtype)
    # Summed as integers: fp32 is not exact past 2^24 tokens.
    shares = counts.to(dtype) / torch.where(total == 0, 1, total).to(dtype)
    return torch.where(total == 0, 1 / counts.shape[-1], shares)


def _directions(weight: Tensor, name: str) -> Tensor:
    if weight.dim() < 2:
        raise ValueError(f"{name} must be (..., E, D), got {tuple(weight.shape)}: pass one centroid a row")
    return unit_rows(weight.to(compute_dtype(weight.dtype)))


def _centred(values: Tensor, keep: Tensor) -> Tensor:
    """values - their mean over `keep`, 0 outside it and where all are equal."""
    values = torch.where(keep, values.to(compute_dtype(values.dtype)), 0.0)
    mean = values.sum() / keep.sum().clamp_min(1)
    centred = torch.where(keep, values - mean, 0.0)
    # The mean of equal values is rounded: what is left of them must not pass for variation.
    noise = torch.finfo(values.dtype).eps * values.abs().amax() if values.numel() else values.sum()
    return torch.where(centred.abs().sum() > 4 * noise * keep.sum(), centred, 0.0)
