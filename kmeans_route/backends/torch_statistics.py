"""What the torch backend gathers: loads, spread and margins of a routing, centroid sums, and the commit of them.

On CPU a branch on data costs nothing, and bags of rows are summed in cache. Legend: T tokens, D hidden size, E experts,
K top_k.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kmeans_route import metrics
from kmeans_route.backends import chunks
from kmeans_route.reference import (
    MARGIN_RANGE,
    MAX_SQUARED_NORM,
    MIN_CENTROID_NORM,
    NUM_MARGIN_BINS,
    State,
    commit_reference,
    compute_dtype,
    moved_reference,
    product,
)
from kmeans_route.types import CommitOptions, PendingStatistics, RouterState, Statistics

PAIRS_FROM = 1024  # tokens of a batch of which one looks who was chosen with whom
BAG_BYTES = 8 << 20  # of partial centroid sums held at once
FEW_PRODUCTS, MANY_PRODUCTS = 1 << 22, 1 << 27  # of a one-hot product that is quicker than bags: see there
MAX_NORM = MAX_SQUARED_NORM**0.5


def at_hand(values: Tensor) -> bool:
    """Whether looking at values stalls no device."""
    return values.is_cpu


def all_true(flags: Tensor) -> bool:
    """Whether all are known to be true."""
    return at_hand(flags) and bool(flags.all())


def all_within(norm: Tensor, low: float, high: float) -> bool:
    """The same of norms that must lie in [low, high]; NaN does not."""
    if not at_hand(norm) or not norm.numel():
        return False
    least, most = torch.aminmax(norm)
    return least.item() >= low and most.item() <= high


def ordinary_unit_rows(rows: Tensor) -> Tensor | None:
    """Unit rows of fp32 rows (E, D) that are all known to have a length that one may divide by; else None."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norm if all_within(norm, MIN_CENTROID_NORM, MAX_NORM) else None


def _bincount_serves(ids: Tensor) -> bool:
    """Not on a GPU, which it would synchronise, nor in a compiled graph, where its size hangs on the data: there a
    scatter counts."""
    return ids.is_cpu and not torch.compiler.is_compiling()


def count_experts(indices: Tensor, valid: Tensor, num_experts: int, *, all_valid: bool) -> Tensor:
    """(E,) int64: valid tokens that chose each expert."""
    if _bincount_serves(indices):
        counts = torch.bincount(indices.flatten(), minlength=num_experts)
        if not all_valid:  # rows that are not valid hold ids 0..K-1
            counts[: indices.shape[1]] -= (~valid).sum()
        return counts
    counts = torch.zeros(num_experts, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, indices.flatten(), valid[:, None].expand_as(indices).flatten().long())


def count_among(indices: Tensor, counts: Tensor, num_experts: int) -> Tensor:
    """(E,) int64: the same of the tokens that count, which are not all of the valid ones."""
    first_ids = torch.arange(indices.shape[1], device=indices.device)
    return count_experts(torch.where(counts[:, None], indices, first_ids), counts, num_experts, all_valid=False)


def score_std(scores: Tensor) -> Tensor:
    """Population standard deviation of each row, (T,); the mean is subtracted first: cosines share an offset."""
    centered = torch.sub(scores, scores.sum(1, keepdim=True), alpha=1 / scores.shape[1])
    std: Tensor = torch.linalg.vector_norm(centered, dim=1).div_(math.sqrt(scores.shape[1]))
    return std


def margin_hist(among: Tensor, valid: Tensor, top_k: int) -> Tensor:
    """Histogram (E, 1024) int32 of alpha_t - (s_te + b_e) over valid tokens; among: s + b, -inf where no candidate."""
    num_experts, size = among.shape[1], among.shape[1] * NUM_MARGIN_BINS
    alpha = among.topk(top_k + 1, dim=1).values[:, top_k:]
    scale = NUM_MARGIN_BINS / (2 * MARGIN_RANGE)
    margin = (alpha - among).masked_fill_(among == -torch.inf, MARGIN_RANGE)
    bins = ((margin + MARGIN_RANGE) * scale).floor_().clamp_(0, NUM_MARGIN_BINS - 1).long()
    bins += torch.arange(0, size, NUM_MARGIN_BINS, device=among.device)
    flat = torch.where(valid[:, None], bins, size).flatten()
    if _bincount_serves(flat):
        hist = torch.bincount(flat, minlength=size + 1)
    else:
        hist = torch.zeros(size + 1, dtype=torch.int64, device=among.device)
        hist.scatter_add_(0, flat, torch.ones_like(flat))
    return hist[:size].view(num_experts, NUM_MARGIN_BINS).int()


def centroid_sums(x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int) -> Tensor:
    """(1, E, D): sums of factor_t x_t over valid tokens, or of x_t without a factor."""
    sums = x.new_zeros(num_experts, x.shape[1], dtype=compute_dtype(x.dtype))
    _add_centroid_sums_(sums, x, indices, factor, valid, all_valid=all_true(valid))
    return sums[None]


def _add_centroid_sums_(
    sums: Tensor, x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, *, all_valid: bool
) -> Tensor | None:
    """sums (E, D) += sum of factor_t x_t over valid t with e in sel_t, in a fixed order.

    Returns the factors as (T, E), 0 where e is not in sel_t or t is not valid, if they were made.
    """
    factor = (valid if factor is None else factor).to(sums.dtype)
    if x.is_cpu and not _product_serves(x.shape[0], indices.shape[1], *sums.shape):
        _add_sums_by_bags_(sums, x, indices, factor, valid, all_valid=all_valid)
        return None
    factor = factor if all_valid else torch.where(valid, factor, 0.0)
    member = factor.new_zeros(x.shape[0], sums.shape[0])
    member.scatter_(1, indices, factor[:, None].expand_as(indices))
    if all_valid and x.dtype == sums.dtype:
        sums += product(member.T, x)
        return member
    for c in chunks.of(x):
        clean = x[c] if all_valid else x[c].masked_fill(~valid[c][:, None], 0.0)
        sums += product(member[c].T, clean.to(sums.dtype))
    return member


def _product_serves(num_tokens: int, top_k: int, num_experts: int, hidden_size: int) -> bool:
    """Whether a CPU is quicker with a one-hot product of E / K times the arithmetic than with bags and their sort."""
    products = num_tokens * num_experts * hidden_size
    return products <= FEW_PRODUCTS or (products <= MANY_PRODUCTS and num_experts <= 8 * top_k)


def _add_sums_by_bags_(
    sums: Tensor, x: Tensor, indices: Tensor, factor: Tensor, valid: Tensor, *, all_valid: bool
) -> None:
    """The sums on CPU: one bag for each (chunk of tokens, expert), then the chunks in order.

    A one-hot product takes 1.4 to 3 times the time at the benchmarked shapes. A chunk of 512 tokens stays in cache
    while its bags are read; a token that is not valid is in no bag, so its NaN meets nothing.
    """
    (num_tokens, top_k), (num_experts, hidden_size) = indices.shape, sums.shape
    chunk = max(512, 32 * num_experts // top_k)
    together = max(1, BAG_BYTES // (num_experts * hidden_size * sums.element_size()))
    together = together if x.dtype == sums.dtype else 1
    for start in range(0, num_tokens, chunk * together):
        span = slice(start, min(start + chunk * together, num_tokens))
        rows = span.stop - span.start
        num_bags = -(-rows // chunk) * num_experts
        key = indices[span] + (torch.arange(rows, device=x.device) // chunk * num_experts)[:, None]
        if not all_valid:
            key = torch.where(valid[span, None], key, num_bags)
        narrow = torch.int16 if num_bags < 2**15 else torch.int32  # the radix sort reads fewer bytes
        in_bags = torch.bincount(key.flatten(), minlength=num_bags)[:num_bags]
        token = key.flatten().to(narrow).sort(stable=True).indices // top_k
        if not all_valid:
            token = token[: int(in_bags.sum())]
        if token.numel() == 0:
            continue
        bags = F.embedding_bag(
            token,
            x[span].to(sums.dtype),
            in_bags.cumsum(0) - in_bags,
            mode="sum",
            per_sample_weights=factor[span].index_select(0, token),
        )
        sums += bags.view(-1, num_experts, hidden_size).sum(0)


def count_pairs_(pairs: Tensor, indices: Tensor, counted: Tensor, member: Tensor | None = None) -> None:
    """Add to pairs (E, E) fp32 how many of the first tokens chose both of two experts.

    An (E, E) product over at most `PAIRS_FROM` tokens: sums of ones, so exact in any order. member: (T, E), above 0
    where a token that counts has chosen an expert, if that is there already.
    """
    if member is None:
        ids = indices[:PAIRS_FROM].clamp(0, pairs.shape[0] - 1)  # they are in range; scatter_ must not rest on that
        ones = counted[:PAIRS_FROM, None].to(pairs.dtype).expand_as(ids)
        chosen = pairs.new_zeros(ids.shape[0], pairs.shape[0]).scatter_(1, ids, ones)
    else:
        chosen = member[:PAIRS_FROM].sign()
    pairs.addmm_(chosen.T, chosen)


def accumulate(
    x: Tensor,
    indices: Tensor,
    factor: Tensor | None,
    valid: Tensor,
    partials: Tensor | None,
    batch: Statistics,
    pending: PendingStatistics,
    pairs: Tensor | None,
) -> None:
    """Add a batch to what is pending, in place. partials: its centroid sums (S, E, D); None: taken from x here."""
    all_valid, member = all_true(valid), None
    if pending.sums.numel() and partials is not None:
        pending.sums.add_(partials.sum(0))
    elif pending.sums.numel():
        member = _add_centroid_sums_(pending.sums, x, indices, factor, valid, all_valid=all_valid)
    if pairs is not None:
        count_pairs_(pairs, indices, valid, member)
    pending.counts.add_(batch.counts)
    pending.std_sum.add_(batch.score_std.sum())
    pending.num_tokens.add_(valid.shape[0] if all_valid else valid.sum())
    if not all_valid:
        pending.num_dropped.add_(batch.num_dropped)
    if pending.margin_hist.numel() and batch.margin_hist is not None:
        pending.margin_hist.add_(batch.margin_hist)


def commit(state: RouterState, pending: PendingStatistics, skip: Tensor | None, options: CommitOptions) -> None:
    """Fold what is pending into the state and empty it, in place; with a true `skip` () bool both stay as they are."""
    old = State(*(getattr(state, name) for name in State._fields))
    gathered = (pending.sums, pending.counts, pending.std_sum)
    if at_hand(pending.counts):
        if skip is not None and bool(skip):
            return
        if int(pending.num_tokens):
            new = moved_reference(old, *gathered, pending.num_tokens, pending.margin_hist, options)
            if options.directions == "centroids":
                state.turn.copy_(metrics.centroid_turn(old.weight, new.weight))
            _write_(old, new)
            state.tokens_per_expert.copy_(pending.counts)
        state.dropped_total.add_(pending.num_dropped)
        for each in pending:
            each.zero_()
        return
    go = pending.num_tokens > 0 if skip is None else (pending.num_tokens > 0) & ~skip
    new = commit_reference(old, *gathered, pending.num_tokens * go, pending.margin_hist, options)
    if options.directions == "centroids":
        state.turn.copy_(torch.where(go, metrics.centroid_turn(old.weight, new.weight), state.turn))
    _write_(old, new)
    state.dropped_total.add_(pending.num_dropped if skip is None else pending.num_dropped * ~skip)
    state.tokens_per_expert.copy_(torch.where(go, pending.counts, state.tokens_per_expert))
    for each in pending:
        each.zero_() if skip is None else each.masked_fill_(~skip, 0)


def _write_(old: State, new: State) -> None:
    for buffer, value in zip(old, new, strict=True):
        if buffer is not None and value is not None and buffer is not value:
            buffer.copy_(value)
