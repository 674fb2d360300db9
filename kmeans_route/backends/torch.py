"""Backend "torch": the bodies of the operators in plain PyTorch, tuned for CPU, correct on any device.

No autograd here and no argument checks; `ops` adds the first, `functional` the second. Rows are taken in chunks
that stay in cache, which also bounds the fp32 copy that 16-bit inputs need. On CPU a branch on data costs nothing and
saves passes (are all tokens valid? is there a tie?); on other devices it would stall the stream, so there the general
path always runs.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kmeans_route import metrics
from kmeans_route.backends.torch_topk import exact_topk
from kmeans_route.backends.whitening import whitened as whitened
from kmeans_route.reference import (
    MARGIN_RANGE,
    MAX_SQUARED_NORM,
    MIN_CENTROID_NORM,
    MIN_COSINE_GATE,
    MIN_SQUARED_NORM,
    NUM_MARGIN_BINS,
    State,
    candidates_reference,
    commit_reference,
    compute_dtype,
    directions_reference,
    finite_bias,
    gates_reference,
    product,
    replay_or_choose,
)
from kmeans_route.types import (
    CommitOptions,
    Dispatch,
    PendingStatistics,
    Routed,
    RouteInputs,
    RouteOptions,
    RouterState,
    RoutingGrads,
    SavedRouting,
    Statistics,
    Wanted,
)

NAME, PLAIN, FUSED = "torch", False, False
MIN_NORM, MAX_NORM = MIN_SQUARED_NORM**0.5, MAX_SQUARED_NORM**0.5
CHUNK_BYTES = 8 << 20  # of x in the compute dtype: a chunk read twice comes from cache the second time
FEW = 1024  # elements up to which one call is quicker than several that are vectorised
BAG_BYTES = 8 << 20  # of partial centroid sums held at once


def chunks(x: Tensor) -> list[slice]:
    """Slices of rows of about the same length."""
    rows = max(1, CHUNK_BYTES // max(1, x.shape[1] * compute_dtype(x.dtype).itemsize))
    rows = rows if x.device.type == "cpu" else 16 * rows
    rows = -(-x.shape[0] // max(1, round(x.shape[0] / rows)))
    return [slice(i, min(i + rows, x.shape[0])) for i in range(0, x.shape[0], max(1, rows))]


def _all_true(flags: Tensor) -> bool:
    """Whether a shortcut may be taken: known on CPU, never assumed where asking would stall the device."""
    return flags.is_cpu and bool(flags.all())


def _all_within(norm: Tensor, low: float, high: float) -> bool:
    """The same of norms that must lie in [low, high]; NaN does not."""
    if not norm.is_cpu or not norm.numel():
        return False
    least, most = torch.aminmax(norm)
    return least.item() >= low and most.item() <= high


def cosine_scores(x: Tensor, directions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, bool]:
    """s (T, E), 1 / ||x|| (T,), validity (T,), and whether all are known to be valid; reads x from memory once."""
    dtype = compute_dtype(x.dtype)
    d_DE = directions.to(dtype).T
    if x.numel() * dtype.itemsize <= CHUNK_BYTES:
        x_c = x.to(dtype)
        norm, scores = torch.linalg.vector_norm(x_c, dim=1), product(x_c, d_DE)
    else:
        scores = x.new_empty(x.shape[0], directions.shape[0], dtype=dtype)
        norm = x.new_empty(x.shape[0], dtype=dtype)
        for c in chunks(x):
            x_c = x[c].to(dtype)
            torch.linalg.vector_norm(x_c, dim=1, out=norm[c])
            scores[c] = product(x_c, d_DE)
            del x_c  # one fp32 copy of 16-bit rows at a time
    valid, all_valid = _validity(norm, mask)
    inv_norm = norm.reciprocal_()
    scores.mul_(inv_norm.unsqueeze(1))
    if not all_valid:
        scores.masked_fill_(~valid[:, None], 0.0)
        inv_norm.masked_fill_(~valid, 0.0)
    return scores, inv_norm, valid, all_valid


def _validity(norm: Tensor, mask: Tensor | None) -> tuple[Tensor, bool]:
    """Which tokens are valid, by their norms, and whether all are known to be."""
    if mask is None and _all_within(norm, MIN_NORM, MAX_NORM):
        return torch.ones_like(norm, dtype=torch.bool), True
    valid = (norm >= MIN_NORM) & (norm <= MAX_NORM)
    if mask is not None:
        valid &= mask
    return valid, _all_true(valid)


def directions(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows of weight (E, D) in `dtype`; rows of ordinary length in two passes in place of five."""
    if weight.dtype == torch.float32 and dtype != torch.float64:
        c = weight.detach()
        norm = torch.linalg.vector_norm(c, dim=1, keepdim=True)
        if _all_within(norm, MIN_CENTROID_NORM, MAX_NORM):
            return torch.div(c, norm).to(dtype)
    return directions_reference(weight, dtype)


def route_fwd(inputs: RouteInputs, options: RouteOptions, wanted: Wanted) -> Routed:
    """One routing, with its statistics."""
    x, directions, expert_bias, mask, count_mask, indices = inputs
    num_experts, top_k, over_all = directions.shape[0], options.top_k, options.over_all
    scores, inv_norm, valid, all_valid = cosine_scores(x, directions, mask)
    ranking = scores if expert_bias is None else scores + finite_bias(expert_bias).to(scores.dtype)
    among = ranking
    if options.grouped:
        among = ranking.masked_fill(~candidates_reference(ranking, options), -torch.inf)
    chosen = exact_topk(among, top_k)
    indices = chosen if indices is None else replay_or_choose(indices, chosen, num_experts)
    if not all_valid:
        indices = torch.where(valid[:, None], indices, torch.arange(top_k, device=x.device))

    selected = scores.gather(1, indices)
    candidates = candidate_mask(ranking, indices, options) if over_all else None
    if options.gate == "softmax" and options.normalize:
        weights = softmax_rows(selected / options.tau)
        weights = weights if options.scaling == 1 else weights.mul_(options.scaling)
    else:
        weights = gates_reference(selected, scores, candidates, options)
    if not all_valid:
        weights.masked_fill_(~valid[:, None], 0.0)
    loads = count_experts(indices, valid, num_experts, all_valid=all_valid)
    counts = valid if count_mask is None else valid & count_mask
    std = _score_std(scores) if wanted.std else None
    if std is not None and count_mask is not None:
        std.masked_fill_(~counts, 0.0)
    return Routed(
        indices,
        weights,
        selected,
        scores if wanted.scores or over_all else None,
        candidates,
        loads,
        inv_norm,
        valid,
        None if count_mask is None else count_among(indices, counts, num_experts),
        std,
        margin_hist(ranking, among, counts, top_k) if wanted.hist else None,
        _num_dropped(mask, count_mask, valid, loads, all_valid=all_valid),
    )


def _num_dropped(
    mask: Tensor | None, count_mask: Tensor | None, valid: Tensor, loads: Tensor, *, all_valid: bool
) -> Tensor:
    """() int64: tokens that the masks let in and that are not valid."""
    if all_valid:
        return loads.new_zeros(())
    bad = ~valid
    for each in (mask, count_mask):
        bad = bad if each is None else bad & each
    return bad.sum()


def candidate_mask(ranking: Tensor, indices: Tensor, options: RouteOptions) -> Tensor:
    """Which experts the softmax over all candidates runs over, (T, E)."""
    if not options.grouped:
        return torch.ones_like(ranking, dtype=torch.bool)
    return candidates_reference(ranking, options).scatter(1, indices, True)


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


def softmax_rows(z: Tensor) -> Tensor:
    """Softmax over the few columns of (T, K). On CPU a row shorter than a vector register is best taken as a column."""
    if z.numel() <= FEW:
        return z.softmax(1)
    if z.shape[1] == 2:
        return torch.sigmoid(z - z.flip(1))
    return z.T.contiguous().softmax(0).T.contiguous() if z.shape[1] < 8 else z.softmax(1)


def row_sums(values: Tensor) -> Tensor:
    """(T, K) -> (T, 1), as a product with ones: quicker than a sum over so short a dimension."""
    return product(values, values.new_ones(values.shape[1], 1))


def _score_std(scores: Tensor) -> Tensor:
    """Population standard deviation of each row, (T,); the mean is subtracted first: cosines share an offset."""
    centered = scores - scores.mean(1, keepdim=True)
    std: Tensor = torch.linalg.vector_norm(centered, dim=1).div_(math.sqrt(scores.shape[1]))
    return std


def margin_hist(ranking: Tensor, among: Tensor, valid: Tensor, top_k: int) -> Tensor:
    """Histogram (E, 1024) int32 of alpha_t - (s_te + b_e) over valid tokens; `among` is -inf where no candidate."""
    num_experts = ranking.shape[1]
    alpha = among.topk(top_k + 1, dim=1).values[:, top_k:]
    scale = NUM_MARGIN_BINS / (2 * MARGIN_RANGE)
    margin = (alpha - among).masked_fill_(among == -torch.inf, MARGIN_RANGE)
    bins = ((margin + MARGIN_RANGE) * scale).floor_().clamp_(0, NUM_MARGIN_BINS - 1).long()
    bins += torch.arange(num_experts, device=ranking.device) * NUM_MARGIN_BINS
    flat = torch.where(valid[:, None], bins, num_experts * NUM_MARGIN_BINS).flatten()
    size = num_experts * NUM_MARGIN_BINS
    if _bincount_serves(flat):
        hist = torch.bincount(flat, minlength=size + 1)
    else:
        hist = torch.zeros(size + 1, dtype=torch.int64, device=ranking.device)
        hist.scatter_add_(0, flat, torch.ones_like(flat))
    return hist[:size].view(num_experts, NUM_MARGIN_BINS).int()


def gates_bwd(d_weights: Tensor, selected: Tensor, options: RouteOptions) -> Tensor:
    """ds (T, K) from dg (T, K), for the gates that look at the selected scores only."""
    tau, normalize = options.tau, options.normalize
    dg = d_weights * options.scaling
    if options.gate == "softmax":
        p = softmax_rows(selected / tau)
        return p * (dg - row_sums(p * dg)).mul_(1 / tau)
    if options.gate == "sigmoid":
        z = selected / tau
        if normalize:
            p = F.logsigmoid(z).softmax(1)
            return p * (dg - (p * dg).sum(1, keepdim=True)) * (-z).sigmoid() / tau
        q = z.sigmoid()
        return dg * q * (1 - q) / tau
    if options.gate == "cosine":
        free = selected >= MIN_COSINE_GATE
        if normalize:
            q = selected.clamp_min(MIN_COSINE_GATE)
            total = q.sum(1, keepdim=True)
            dg = (dg - (q * dg).sum(1, keepdim=True) / total) / total
        return torch.where(free, dg, 0.0)
    return torch.zeros_like(selected)


def route_bwd(
    x: Tensor,
    directions: Tensor,
    saved: SavedRouting,
    grads: RoutingGrads,
    d_x_sorted: Tensor | None,
    positions: Tensor | None,
    options: RouteOptions,
) -> Tensor:
    """dx_t = inv_norm_t (sum over e of ds_te d_e - x_t inv_norm_t sum over e of ds_te s_te), 0 if not valid.

    With ds of the selected experts alone, a CPU gathers K direction rows a token (embedding_bag) instead of multiplying
    by all E: 0.65 to 0.9 of the time. dx in fp32 is written by one whole-tensor call: page faults of the fresh tensor
    cost more than its arithmetic, and chunks make them collide.
    """
    ds_TK, ds_TE = score_grads(saved, grads, options)
    indices, selected, inv_norm = saved.indices, saved.selected_scores, saved.inv_norm
    d_ED = directions.to(selected.dtype)
    along = torch.zeros_like(inv_norm)[:, None]  # sum over e of ds_te s_te
    if ds_TK is not None:
        along += row_sums(ds_TK * selected)
    if ds_TE is not None:
        along += (ds_TE * saved.scores).sum(1, keepdim=True)
    coef = along.mul_(-inv_norm.square()[:, None])
    sparse = ds_TE is None and x.device.type == "cpu"
    if not sparse:
        ds_TE = torch.zeros_like(inv_norm)[:, None].repeat(1, d_ED.shape[0]) if ds_TE is None else ds_TE.clone()
        ds_TE = ds_TE if ds_TK is None else ds_TE.scatter_add_(1, indices, ds_TK)
    ds = ds_TK if sparse else ds_TE
    assert ds is not None
    ds = ds * inv_norm[:, None]

    def rows(c: slice) -> Tensor:
        if sparse:
            return F.embedding_bag(indices[c], d_ED, per_sample_weights=ds[c], mode="sum")
        return product(ds[c], d_ED)

    if x.dtype == selected.dtype:
        dx = rows(slice(None)).addcmul_(x, coef)
    else:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for c in chunks(x):
            dx[c] = rows(c).addcmul_(x[c].to(selected.dtype), coef[c])
    dx = _zero_rows(dx, saved.valid)
    if d_x_sorted is not None:
        assert positions is not None
        dx += combine_fwd(d_x_sorted, positions, None, saved.valid)
    return dx


def score_grads(saved: SavedRouting, grads: RoutingGrads, options: RouteOptions) -> tuple[Tensor | None, Tensor | None]:
    """ds of the selected experts (T, K) and of all experts (T, E), their sum being ds; None where nothing came."""
    ds_TK = grads.selected_scores
    ds_TE = None if grads.scores is None else grads.scores.to(saved.selected_scores.dtype)
    if grads.weights is not None:
        dg = grads.weights.to(saved.selected_scores.dtype)
        if options.over_all:
            p = (saved.scores / options.tau).masked_fill_(~saved.candidates, -torch.inf).softmax(1)
            ds = p.gather(1, saved.indices) * dg * (options.scaling / options.tau)
            through_sum = p.mul_(ds.sum(1, keepdim=True))
            ds_TE = -through_sum if ds_TE is None else ds_TE - through_sum
        else:
            ds = gates_bwd(dg, saved.selected_scores, options)
        ds_TK = ds if ds_TK is None else ds_TK + ds
    return ds_TK, ds_TE


def directions_bwd(
    x: Tensor, num_experts: int, saved: SavedRouting, grads: RoutingGrads, options: RouteOptions
) -> Tensor:
    """dd_e = sum over valid t of ds_te x_t inv_norm_t, (E, D) in x's dtype: one product, as of a learned router.

    The same on every backend.
    """
    ds_TK, ds_TE = score_grads(saved, grads, options)
    ds = torch.zeros_like(saved.inv_norm)[:, None].repeat(1, num_experts) if ds_TE is None else ds_TE
    if ds_TK is not None:
        chosen = torch.zeros_like(ds).scatter_(1, saved.indices, ds_TK)  # a row's ids are distinct
        ds = chosen if ds_TE is None else ds + chosen
    ds = ds * saved.inv_norm[:, None]
    if not _all_true(saved.valid):  # a factor 0 would leave the NaN of a bad row standing
        bad = ~saved.valid[:, None]
        ds, x = ds.masked_fill(bad, 0.0), x.masked_fill(bad, 0.0)
    return product(ds.T, x.to(ds.dtype)).to(x.dtype)


def _zero_rows(rows: Tensor, valid: Tensor) -> Tensor:
    """Zero what is not valid in place: a factor 0 would leave the NaN of a bad row standing."""
    return rows if _all_true(valid) else rows.masked_fill_(~valid[:, None], 0.0)


def centroid_sums(x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int) -> Tensor:
    """(1, E, D): sums of factor_t x_t over valid tokens, or of x_t without a factor."""
    sums = x.new_zeros(num_experts, x.shape[1], dtype=compute_dtype(x.dtype))
    return _add_centroid_sums_(sums, x, indices, factor, valid)[None]


def _add_centroid_sums_(sums: Tensor, x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor) -> Tensor:
    """sums (E, D) += sum of factor_t x_t over valid t with e in sel_t, in a fixed order."""
    factor = (valid if factor is None else factor).to(sums.dtype)
    if x.device.type == "cpu":
        return _add_sums_by_bags_(sums, x, indices, factor, valid)
    factor = torch.where(valid, factor, 0.0)
    member = factor.new_zeros(x.shape[0], sums.shape[0])
    member.scatter_(1, indices, factor[:, None].expand_as(indices))
    for c in chunks(x):
        clean = x[c].masked_fill(~valid[c][:, None], 0.0)
        sums += product(member[c].T, clean.to(sums.dtype))
    return sums


def accumulate(
    x: Tensor,
    indices: Tensor,
    factor: Tensor | None,
    valid: Tensor,
    partials: Tensor | None,
    batch: Statistics,
    pending: PendingStatistics,
) -> None:
    """Add a batch to what is pending, in place. partials: its centroid sums (S, E, D); None: taken from x here."""
    if pending.sums.numel() and partials is not None:
        pending.sums.add_(partials.sum(0))
    elif pending.sums.numel():
        _add_centroid_sums_(pending.sums, x, indices, factor, valid)
    pending.counts.add_(batch.counts)
    pending.std_sum.add_(batch.score_std.sum())
    pending.num_tokens.add_(valid.sum())
    pending.num_dropped.add_(batch.num_dropped)
    if pending.margin_hist.numel() and batch.margin_hist is not None:
        pending.margin_hist.add_(batch.margin_hist)


def commit(state: RouterState, pending: PendingStatistics, skip: Tensor | None, options: CommitOptions) -> None:
    """Fold what is pending into the state and empty it, in place; with a true `skip` () bool both stay as they are."""
    go = pending.num_tokens > 0 if skip is None else (pending.num_tokens > 0) & ~skip
    old = State(*(getattr(state, name) for name in State._fields))
    num_tokens = pending.num_tokens * go
    new = commit_reference(old, pending.sums, pending.counts, pending.std_sum, num_tokens, pending.margin_hist, options)
    state.turn.copy_(torch.where(go, metrics.centroid_turn(old.weight, new.weight), state.turn))
    for buffer, value in zip(old, new, strict=True):
        if buffer is not None and value is not None:
            buffer.copy_(value)
    state.dropped_total.add_(pending.num_dropped if skip is None else pending.num_dropped * ~skip)
    state.tokens_per_expert.copy_(torch.where(go, pending.counts, state.tokens_per_expert))
    for each in pending:
        each.zero_() if skip is None else each.masked_fill_(~skip, 0)


def _add_sums_by_bags_(sums: Tensor, x: Tensor, indices: Tensor, factor: Tensor, valid: Tensor) -> Tensor:
    """The sums on CPU: one bag for each (chunk of tokens, expert), then the chunks in order.

    A one-hot product does E / K times the arithmetic: 1.4 to 3 times the time at the benchmarked shapes. A chunk of
    512 tokens stays in cache while its bags are read; a token that is not valid is in no bag, so its NaN meets nothing.
    """
    (num_tokens, top_k), (num_experts, hidden_size) = indices.shape, sums.shape
    chunk = max(512, 32 * num_experts // top_k)
    together = max(1, BAG_BYTES // (num_experts * hidden_size * sums.element_size()))
    together = together if x.dtype == sums.dtype else 1
    all_valid = bool(valid.all())
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
    return sums


def dispatch_fwd(x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor, *, copies: bool) -> Dispatch:
    """Rows in expert order, by a stable sort; tokens that are not valid last."""
    num_experts = counts.shape[0]
    all_valid = _all_true(valid)
    key = indices if all_valid else torch.where(valid[:, None], indices, num_experts)
    small = torch.int16 if num_experts < 2**15 else torch.int64  # a radix sort reads fewer bytes
    order = key.flatten().to(small).sort(stable=True).indices
    token_of_row = order // indices.shape[1]
    positions = torch.empty_like(order)
    positions[order] = torch.arange(order.numel(), device=x.device)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=x.device)
    offsets[1:] = counts.cumsum(0)
    x_sorted = x.index_select(0, token_of_row) if copies else x.new_empty(0, x.shape[1])
    if not all_valid and copies:
        zero_past_end_(x_sorted, offsets)
    return Dispatch(x_sorted, positions.view_as(indices), token_of_row, offsets)


def zero_past_end_(rows: Tensor, offsets: Tensor) -> Tensor:
    """Zero the rows at offsets[E] and after, in place. On a CPU it costs what it writes, elsewhere one pass."""
    if rows.device.type == "cpu":
        end = int(offsets[-1])
        if end < rows.shape[0]:
            rows[end:] = 0.0
        return rows
    past = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
    return rows.masked_fill_(past[:, None], 0.0)


def combine_fwd(rows: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor) -> Tensor:
    """y_t = sum over k of weights_tk rows[positions_tk] in fp32, in the dtype of rows; 0 if not valid. (T, D).

    This is combine forward, and with weights None the backward of dispatch.
    """
    dtype = compute_dtype(rows.dtype)
    y = rows.new_empty(positions.shape[0], rows.shape[1])
    if rows.dtype == dtype and rows.device.type == "cpu":
        factor = None if weights is None else weights.to(dtype)
        return _zero_rows(F.embedding_bag(positions, rows.contiguous(), per_sample_weights=factor, mode="sum"), valid)
    for c in chunks(y):
        total = rows.new_zeros(y[c].shape, dtype=dtype)
        for k in range(positions.shape[1]):
            row = rows.index_select(0, positions[c, k]).to(dtype)
            total = total + row if weights is None else total.addcmul_(row, weights[c, k : k + 1].to(dtype))
        y[c] = total
    return _zero_rows(y, valid)


def combine_bwd(
    dy: Tensor,
    y_sorted: Tensor,
    weights: Tensor,
    positions: Tensor,
    token_of_row: Tensor,
    offsets: Tensor,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """d y_sorted (T*K, D), zero at offsets[E] and after, and d weights (T, K), zero where not valid."""
    dtype = compute_dtype(y_sorted.dtype)
    weight_of_row = weights.new_empty(positions.numel(), dtype=dtype)
    weight_of_row[positions.flatten()] = weights.flatten().to(dtype)
    d_rows = torch.empty_like(y_sorted, memory_format=torch.contiguous_format)
    dot_of_row = torch.empty_like(weight_of_row)
    for c in chunks(d_rows):
        dy_c = dy.index_select(0, token_of_row[c]).to(dtype)
        dot_of_row[c] = product(dy_c[:, None], y_sorted[c].to(dtype)[:, :, None]).flatten()  # 3x vecdot
        d_rows[c] = dy_c.mul_(weight_of_row[c][:, None])
    d_weights = dot_of_row[positions].to(weights.dtype)
    if not _all_true(valid):
        zero_past_end_(d_rows, offsets)
        d_weights.masked_fill_(~valid[:, None], 0.0)
    return d_rows, d_weights
