"""Backend "torch": the bodies of the operators in plain PyTorch, tuned for CPU, correct on any device.

No autograd here and no argument checks; `ops` adds the first, `functional` the second. Rows are taken in chunks
that stay in cache where that bounds a temporary, such as the fp32 copy that 16-bit inputs need. On CPU a branch on data
costs nothing and saves passes (are all tokens valid? is there a tie?); on other devices it would stall the stream, so
there the general path always runs.

Legend: T tokens, D hidden size, E experts, K top_k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kmeans_route.backends import chunks
from kmeans_route.backends.torch_statistics import (
    MAX_NORM,
    all_true,
    all_within,
    count_experts,
    margin_hist,
    ordinary_unit_rows,
    score_std,
)
from kmeans_route.backends.torch_statistics import accumulate as accumulate
from kmeans_route.backends.torch_statistics import centroid_sums as centroid_sums
from kmeans_route.backends.torch_statistics import commit as commit
from kmeans_route.backends.torch_statistics import count_among as count_among
from kmeans_route.backends.torch_statistics import count_pairs_ as count_pairs_
from kmeans_route.backends.torch_topk import exact_topk
from kmeans_route.backends.whitening import whitened as whitened
from kmeans_route.reference import (
    MIN_COSINE_GATE,
    MIN_SQUARED_NORM,
    candidates_reference,
    compute_dtype,
    directions_reference,
    finite_bias,
    gates_reference,
    product,
    replay_or_choose,
    rounds_fp32,
)
from kmeans_route.types import Dispatch, Routed, RouteInputs, RouteOptions, RoutingGrads, SavedRouting, Wanted

NAME, PLAIN, FUSED = "torch", False, False
MIN_NORM = MIN_SQUARED_NORM**0.5
FEW = 256  # elements up to which one call is quicker than several that are vectorised
MANY = 1 << 15  # from which a product with ones sums short rows quicker than a sum


def cosine_scores(x: Tensor, directions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, bool]:
    """s (T, E), 1 / ||x|| (T,), validity (T,), and whether all are known to be valid.

    One product for all rows, since threads wait for each other at the end of each; what has to be cast goes by chunks.
    """
    dtype = compute_dtype(x.dtype)
    d_DE = directions.to(dtype).T
    at_once = x.dtype == dtype and not rounds_fp32(x.device.type)
    if at_once or x.numel() * dtype.itemsize <= chunks.BYTES:
        x_c = x.to(dtype)
        norm, scores = torch.linalg.vector_norm(x_c, dim=1), product(x_c, d_DE)
    else:
        scores = x.new_empty(x.shape[0], directions.shape[0], dtype=dtype)
        norm = x.new_empty(x.shape[0], dtype=dtype)
        for c in chunks.of(x):
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
    if mask is None and all_within(norm, MIN_NORM, MAX_NORM):
        return torch.ones_like(norm, dtype=torch.bool), True
    valid = (norm >= MIN_NORM) & (norm <= MAX_NORM)
    if mask is not None:
        valid &= mask
    return valid, all_true(valid)


def directions(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows of weight (E, D) in `dtype`; rows of ordinary length in two passes in place of five."""
    if weight.dtype == torch.float32 and dtype != torch.float64:
        unit = ordinary_unit_rows(weight.detach() if weight.requires_grad else weight)
        if unit is not None:
            return unit.to(dtype)
    return directions_reference(weight, dtype)


def route_fwd(inputs: RouteInputs, options: RouteOptions, wanted: Wanted) -> Routed:
    """One routing, with its statistics."""
    x, directions, expert_bias, mask, count_mask, indices = inputs
    num_experts, top_k, over_all = directions.shape[0], options.top_k, options.over_all
    scores, inv_norm, valid, all_valid = cosine_scores(x, directions, mask)
    ranking = scores if expert_bias is None else scores + finite_bias(expert_bias).to(scores.dtype)
    candidates = candidates_reference(ranking, options) if options.grouped else None
    among = ranking if candidates is None else ranking.masked_fill(~candidates, -torch.inf)
    chosen = exact_topk(among, top_k)
    indices = chosen if indices is None else replay_or_choose(indices, chosen, num_experts)
    if not all_valid:
        indices = torch.where(valid[:, None], indices, torch.arange(top_k, device=x.device))

    selected = scores.gather(1, indices)
    if not over_all:
        candidates = None
    elif candidates is None:
        candidates = torch.ones_like(ranking, dtype=torch.bool)
    else:
        candidates.scatter_(1, indices, True)  # replayed ids count as candidates
    if options.gate == "softmax" and options.normalize:
        weights = softmax_rows(selected / options.tau)
        weights = weights if options.scaling == 1 else weights.mul_(options.scaling)
    else:
        weights = gates_reference(selected, scores, candidates, options)
    if not all_valid:
        weights.masked_fill_(~valid[:, None], 0.0)
    loads = count_experts(indices, valid, num_experts, all_valid=all_valid)
    counts = valid if count_mask is None else valid & count_mask
    std = score_std(scores) if wanted.std else None
    if std is not None and count_mask is not None:
        std.masked_fill_(~counts, 0.0)
    return Routed(
        *(indices, weights, selected, scores if wanted.scores or over_all else None, candidates),
        *(loads, inv_norm, valid),
        counted=None if count_mask is None else count_among(indices, counts, num_experts),
        score_std=std,
        margin_hist=margin_hist(among, counts, top_k) if wanted.hist else None,
        num_dropped=loads.new_zeros(()) if all_valid else _num_dropped(mask, count_mask, valid),
    )


def _num_dropped(mask: Tensor | None, count_mask: Tensor | None, valid: Tensor) -> Tensor:
    """() int64: tokens that the masks let in and that are not valid."""
    bad = ~valid
    for each in (mask, count_mask):
        bad = bad if each is None else bad & each
    return bad.sum()


def softmax_rows(z: Tensor) -> Tensor:
    """Softmax over the few columns of (T, K), in vectorised passes: PyTorch's own takes rows that are shorter than a
    vector register (16 fp32 with AVX-512, 8 with AVX2) element by element."""
    if z.numel() <= FEW:
        return z.softmax(1)
    if z.shape[1] == 2:
        return torch.sigmoid(z - z.flip(1))
    p = (z - z.amax(1, keepdim=True)).exp_()
    return p.div_(row_sums(p))


def row_sums(values: Tensor) -> Tensor:
    """(T, K) -> (T, 1); of many as a product with ones: quicker than a sum over so short a dimension."""
    if values.numel() < MANY:
        return values.sum(1, keepdim=True)
    return product(values, values.new_ones(values.shape[1], 1))


def gates_bwd(d_weights: Tensor, selected: Tensor, options: RouteOptions) -> Tensor:
    """ds (T, K) from dg (T, K), for the gates that look at the selected scores only."""
    tau, normalize = options.tau, options.normalize
    if options.gate == "softmax":
        p = softmax_rows(selected / tau)
        return (d_weights - row_sums(p * d_weights)).mul_(p).mul_(options.scaling / tau)
    dg = d_weights * options.scaling
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
    inv_norm, d_ED, along = saved.inv_norm[:, None], directions.to(saved.inv_norm.dtype), None
    if ds_TK is not None:
        ds_TK = ds_TK * inv_norm
        along = row_sums(ds_TK * saved.selected_scores)
    if ds_TE is not None:
        ds_TE = ds_TE * inv_norm
        over_all = (ds_TE * saved.scores).sum(1, keepdim=True)
        along = over_all if along is None else along.add_(over_all)
    along = torch.zeros_like(inv_norm) if along is None else along.mul_(inv_norm)
    sparse = ds_TK is not None and ds_TE is None and x.device.type == "cpu"
    ds = ds_TK if sparse else _of_all_experts(ds_TK, ds_TE, saved, d_ED.shape[0])
    assert ds is not None

    def rows(ds: Tensor, indices: Tensor) -> Tensor:
        return bags(d_ED, indices, ds) if sparse else product(ds, d_ED)

    if x.dtype == ds.dtype:
        dx = rows(ds, saved.indices).addcmul_(x, along, value=-1)
    else:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for c in chunks.of(x):
            dx[c] = rows(ds[c], saved.indices[c]).addcmul_(x[c].to(ds.dtype), along[c], value=-1)
    dx = _zero_rows(dx, saved.valid)
    if d_x_sorted is not None:
        assert positions is not None
        dx += combine_fwd(d_x_sorted, positions, None, saved.valid)
    return dx


def bags(rows: Tensor, ids: Tensor, factor: Tensor | None) -> Tensor:
    """y_t = sum over k of factor_tk rows[ids_tk], (T, D): `F.embedding_bag` without its checks, a third of a call."""
    offsets = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
    factor = None if factor is None else factor.reshape(-1)
    y: Tensor = torch.embedding_bag(rows, ids.reshape(-1), offsets, False, 0, False, factor)[0]
    return y


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


def _of_all_experts(ds_TK: Tensor | None, ds_TE: Tensor | None, saved: SavedRouting, num_experts: int) -> Tensor:
    """The sum (T, E) of what `score_grads` gives in two parts, in a tensor of its own."""
    ds = saved.selected_scores.new_zeros(saved.valid.shape[0], num_experts) if ds_TE is None else ds_TE.clone()
    return ds if ds_TK is None else ds.scatter_add_(1, saved.indices, ds_TK)


def directions_bwd(
    x: Tensor, num_experts: int, saved: SavedRouting, grads: RoutingGrads, options: RouteOptions
) -> Tensor:
    """dd_e = sum over valid t of ds_te x_t inv_norm_t, (E, D) in x's dtype: one product, as of a learned router.

    The same on every backend.
    """
    ds_TK, ds_TE = score_grads(saved, grads, options)
    ds = _of_all_experts(ds_TK, ds_TE, saved, num_experts) * saved.inv_norm[:, None]
    if not all_true(saved.valid):  # a factor 0 would leave the NaN of a bad row standing
        bad = ~saved.valid[:, None]
        ds, x = ds.masked_fill(bad, 0.0), x.masked_fill(bad, 0.0)
    return product(ds.T, x.to(ds.dtype)).to(x.dtype)


def _zero_rows(rows: Tensor, valid: Tensor) -> Tensor:
    """Zero what is not valid in place: a factor 0 would leave the NaN of a bad row standing."""
    return rows if all_true(valid) else rows.masked_fill_(~valid[:, None], 0.0)


def dispatch_fwd(x: Tensor, indices: Tensor, counts: Tensor, valid: Tensor, *, copies: bool) -> Dispatch:
    """Rows in expert order, by a stable sort; tokens that are not valid last."""
    num_experts = counts.shape[0]
    all_valid = all_true(valid)
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
    if rows.dtype == dtype and rows.device.type == "cpu":
        factor = None if weights is None else weights.to(dtype)
        return _zero_rows(bags(rows.contiguous(), positions, factor), valid)
    y = rows.new_empty(positions.shape[0], rows.shape[1])
    for c in chunks.of(y):
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
    for c in chunks.of(d_rows):
        dy_c = dy.index_select(0, token_of_row[c]).to(dtype)
        dot_of_row[c] = product(dy_c[:, None], y_sorted[c].to(dtype)[:, :, None]).flatten()  # 3x vecdot
        d_rows[c] = dy_c.mul_(weight_of_row[c][:, None])
    d_weights = dot_of_row[positions].to(weights.dtype)
    if not all_true(valid):
        zero_past_end_(d_rows, offsets)
        d_weights.masked_fill_(~valid[:, None], 0.0)
    return d_rows, d_weights
