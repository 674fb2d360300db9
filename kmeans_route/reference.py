"""The definition: plain PyTorch twins of every kernel, any device, fp64-capable, gradients by autograd.

Nothing here is tuned. Everything else in the package is held against it. The method is arXiv 2605.12476 (Ahrac,
Hochwald, Geva 2026): centroids are running averages of the hidden states routed to each expert, a token goes to the
K experts of largest cosine plus a small balance bias.

Legend: T tokens, D hidden size, E experts, K top_k. x_t hidden state, c_e centroid, d_e direction, b_e bias,
s_te score, g_te gate weight. Computation is in fp32, or fp64 when x is fp64.
"""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kmeans_route.types import CommitOptions, Dispatch, RouteOptions, Routing

MIN_SQUARED_NORM = 1e-30  # below it a row carries no direction
MAX_SQUARED_NORM = torch.finfo(torch.float32).max
MIN_CENTROID_NORM = 1e-12
MIN_COSINE_GATE = 1e-3
NUM_MARGIN_BINS = 1024
MARGIN_RANGE = 2.0  # margins are binned over [-2, 2]
WHITENING_EPS = 0.01  # of the mean eigenvalue, added to all of them
GIVEN_TOKENS = 10_000_000  # that a given centroid stands for in a cumulative mean
MAX_BIAS = 1024.0  # the state's own biases lie within 2; beyond this s + b would lose s


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in fp32 as exact as fp32 is, whatever `torch.set_float32_matmul_precision` says.

    "medium" would round fp32 factors to bf16 on a CPU, "high" to TF32 on a GPU: errors of 1e-3 in a score, where
    hidden states share an offset as large as the margins between experts. The setting belongs to all threads of the
    process and cannot be changed for one product, so there the product is taken in fp64.
    """
    if a.dtype == torch.float32 and rounds_fp32(a.device.type):
        return (a.double() @ b.double()).float()
    return a @ b


_MATMUL = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}  # type: ignore[attr-defined]


def rounds_fp32(device_type: str) -> bool:
    """Whether a product of fp32 would be rounded, so that `product` takes it in fp64."""
    if device_type not in _MATMUL:
        return False
    if torch.compiler.is_dynamo_compiling():  # which cannot ask
        return True
    return _MATMUL[device_type].fp32_precision in ("bf16", "tf32")


def exporting_onnx() -> bool:
    """Whether torch.onnx.export is at work; PyTorch imports torch.onnx when somebody asks for it."""
    onnx = None if torch.compiler.is_dynamo_compiling() else sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())


def stable_order(values: Tensor, k: int, *, descending: bool) -> Tensor:
    """Ids (..., k) of the first k in the order of the last dimension, ties to the lower id."""
    if exporting_onnx():  # which has no stable sort; its TopK, unlike PyTorch's, gives ties to the lower id
        return values.topk(k, largest=descending).indices
    return values.sort(dim=-1, descending=descending, stable=True).indices[..., :k]


def stable_topk(values: Tensor, k: int) -> Tensor:
    """Ids (..., k) of the k largest along the last dimension, by decreasing value, ties to the lower id."""
    return stable_order(values, k, descending=True)


def finite_bias(bias: Tensor) -> Tensor:
    """The bias as it enters selection: within MAX_BIAS of 0, NaN at the low end, so that s + b always has an order."""
    return bias.nan_to_num(nan=-MAX_BIAS).clamp(-MAX_BIAS, MAX_BIAS)


def replay_or_choose(given: Tensor, chosen: Tensor, num_experts: int) -> Tensor:
    """Given ids (T, K), but a row that has one outside of [0, E), or one twice, is the chosen one."""
    ordered = given.sort(dim=1).values
    usable = (ordered[:, 0] >= 0) & (ordered[:, -1] < num_experts) & (ordered[:, 1:] != ordered[:, :-1]).all(1)
    return torch.where(usable[:, None], given, chosen)


def directions_reference(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """d_e = c_e / ||c_e|| rounded to `dtype`; 0 where ||c_e|| < 1e-12 or is not finite. (E, D), no gradient."""
    c = weight.detach().to(torch.promote_types(compute_dtype(weight.dtype), compute_dtype(dtype)))
    largest = c.abs().amax(1, keepdim=True)
    c = c / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(c, dim=1, keepdim=True)
    usable = (norm * largest >= MIN_CENTROID_NORM) & norm.isfinite()
    return torch.where(usable, c / torch.where(usable, norm, 1.0), 0.0).to(dtype)


def unit_rows(rows: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """r / ||r|| of rows (..., D); `otherwise`, or 0, where a row has no direction: ||r|| < 1e-12, or not finite.

    Of centroids, with the old `weight` otherwise, it is what a commit writes into `weight`.
    """
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    norm = torch.where(norm >= MIN_CENTROID_NORM, norm, math.inf)
    unit = rows.nan_to_num(0.0, 0.0, 0.0) / norm
    return unit if otherwise is None else torch.where(norm < math.inf, unit, otherwise)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """What is promised in a dtype is computed in it; the meta device knows no autocast."""
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if autocast else nullcontext()


def shifted_directions(unit: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows of unit + offset, (E, D) both, rounded to `dtype`, with a gradient; 0 where there is no direction."""
    with no_autocast(unit):
        return unit_rows(unit + offset.to(unit.dtype)).to(dtype)


def validity_reference(x: Tensor, mask: Tensor | None) -> Tensor:
    """A token counts when its mask is true and 1e-30 <= sum of x_t^2 < inf in fp32; NaN fails both. (T,) bool."""
    squared_norm = x.detach().to(compute_dtype(x.dtype)).square().sum(1)
    valid = (squared_norm >= MIN_SQUARED_NORM) & (squared_norm <= MAX_SQUARED_NORM)
    return valid if mask is None else valid & mask


def candidates_reference(ranking: Tensor, options: RouteOptions) -> Tensor:
    """The experts that a token may choose: those of its topk_group best groups. (T, E) bool."""
    num_tokens, num_experts = ranking.shape
    size = num_experts // options.n_group
    grouped = ranking.view(num_tokens, options.n_group, size)
    best = min(2, size) if options.group_score == "top2" else 1
    group_score = grouped.topk(best, dim=2).values.sum(2)
    kept = chosen_reference(stable_topk(group_score, options.topk_group), options.n_group) > 0
    return kept.repeat_interleave(size, dim=1)


def gates_reference(s_TK: Tensor, s_TE: Tensor, candidates: Tensor | None, options: RouteOptions) -> Tensor:
    """Gate weights (T, K) of the selected scores, before validity: the table of gates, times `scaling`.

    candidates: (T, E) bool; None for all experts.
    """
    tau, normalize = options.tau, options.normalize
    if options.gate == "softmax":
        if normalize:
            g = (s_TK / tau).softmax(1)
        else:
            over_all = s_TE / tau if candidates is None else (s_TE / tau).masked_fill(~candidates, -torch.inf)
            g = (s_TK / tau - over_all.logsumexp(1, keepdim=True)).exp()
    elif options.gate == "sigmoid":
        # p / sum p, taken in logs: for a small tau every sigmoid of a negative cosine underflows to 0.
        g = F.logsigmoid(s_TK / tau).softmax(1) if normalize else (s_TK / tau).sigmoid()
    elif options.gate == "cosine":
        g = s_TK.clamp_min(MIN_COSINE_GATE)
        g = g / g.sum(1, keepdim=True) if normalize else g
    else:
        g = torch.full_like(s_TK, 1.0 / options.top_k)
    return g * options.scaling


def route_reference(
    x: Tensor,
    directions: Tensor,
    expert_bias: Tensor | None,
    mask: Tensor | None,
    indices: Tensor | None,
    options: RouteOptions,
) -> Routing:
    """Route x (T, D) by directions (E, D) in x's dtype; `scores` is always filled."""
    with no_autocast(x):
        dtype = compute_dtype(x.dtype)
        num_experts = directions.shape[0]
        valid = validity_reference(x, mask)
        rows = torch.where(valid[:, None], x, 0.0).to(dtype)
        squared_norm = torch.where(valid, rows.square().sum(1), 1.0)
        inv_norm = torch.where(valid, squared_norm.rsqrt(), 0.0)
        s_TE = product(rows, directions.to(dtype).T) * inv_norm[:, None]

        ranking = s_TE.detach() if expert_bias is None else s_TE.detach() + finite_bias(expert_bias).to(dtype)
        candidates = candidates_reference(ranking, options)
        chosen = stable_topk(ranking.masked_fill(~candidates, -torch.inf), options.top_k)
        indices = chosen if indices is None else replay_or_choose(indices, chosen, num_experts)
        first_ids = torch.arange(options.top_k, device=x.device)
        indices = torch.where(valid[:, None], indices, first_ids)
        candidates = candidates | (chosen_reference(indices, num_experts) > 0)  # replayed ids count as candidates

        s_TK = s_TE.gather(1, indices)
        g_TK = gates_reference(s_TK, s_TE, candidates, options)
        weights = torch.where(valid[:, None], g_TK, 0.0)
        counts = loads_reference(indices, valid, num_experts)
        return Routing(indices, weights, s_TK, s_TE, counts, inv_norm.detach(), valid)


def loads_reference(indices: Tensor, valid: Tensor, num_experts: int) -> Tensor:
    """The number of valid tokens that chose each expert, (E,) int64."""
    return (chosen_reference(indices, num_experts) * valid[:, None]).sum(0)


def chosen_reference(indices: Tensor, num_experts: int) -> Tensor:
    """How often each expert stands in each row of ids, (T, E) int64; F.one_hot looks at values, as vmap forbids."""
    return (indices[:, :, None] == torch.arange(num_experts, device=indices.device)).sum(1)


def score_std_reference(scores: Tensor) -> Tensor:
    """Population standard deviation over experts of s_te, (T,); 0 in rows that are not valid."""
    s_TE = scores.detach()
    return (s_TE - s_TE.mean(1, keepdim=True)).square().mean(1).sqrt()


def margins_reference(
    scores: Tensor, expert_bias: Tensor | None, valid: Tensor, options: RouteOptions
) -> tuple[Tensor, Tensor]:
    """Margins m_te = alpha_t - (s_te + b_e) of valid tokens and whether each expert was a candidate. (V, E) both.

    alpha_t is the (K+1)-th largest s + b among the token's candidates (quantile balancing: Kimi K3 report 2.3.3).
    """
    ranking = scores.detach()[valid]
    ranking = ranking if expert_bias is None else ranking + finite_bias(expert_bias).to(ranking.dtype)
    candidates = candidates_reference(ranking, options)
    among = ranking.masked_fill(~candidates, -torch.inf)
    alpha = among.sort(dim=1, descending=True).values[:, options.top_k : options.top_k + 1]
    return alpha - ranking, candidates


def margin_hist_reference(margins: Tensor, candidates: Tensor) -> Tensor:
    """Histogram of margins per expert: 1024 bins over [-2, 2], ends clamped, no candidate in the last. (E, 1024)."""
    num_experts = margins.shape[1]
    bins = ((margins + MARGIN_RANGE) * (NUM_MARGIN_BINS / (2 * MARGIN_RANGE))).floor()
    bins = bins.clamp(0, NUM_MARGIN_BINS - 1).long().masked_fill(~candidates, NUM_MARGIN_BINS - 1)
    flat = bins + torch.arange(num_experts, device=bins.device) * NUM_MARGIN_BINS
    hist = torch.zeros(num_experts * NUM_MARGIN_BINS, dtype=torch.int64, device=bins.device)
    hist.index_add_(0, flat.flatten(), torch.ones_like(flat.flatten()))
    return hist.view(num_experts, NUM_MARGIN_BINS).int()


def dispatch_reference(x: Tensor, indices: Tensor, tokens_per_expert: Tensor, valid: Tensor) -> Dispatch:
    """Copy each valid token to the rows of its K experts, in expert order; the others to zero rows at the end."""
    num_experts, top_k = tokens_per_expert.shape[0], indices.shape[1]
    key = torch.where(valid[:, None], indices, num_experts).flatten()
    order = stable_order(key, key.shape[0], descending=False)
    token_of_row = order // top_k
    positions = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=x.device))
    offsets = F.pad(tokens_per_expert.cumsum(0), (1, 0)).int()
    x_sorted = torch.where(valid[:, None], x, 0.0)[token_of_row]
    return Dispatch(x_sorted, positions.view_as(indices), token_of_row, offsets)


def grouped_linear_reference(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows[offsets[e] : offsets[e+1]] @ weight[e].T for every e: (M, N) from (M, D), (E, N, D), (E+1,).

    Every expert multiplies all rows, so that nothing hangs on the offsets but a mask: E times the arithmetic.
    """
    row = torch.arange(rows.shape[0], device=rows.device)[:, None]
    rows = torch.where(row < offsets[-1], rows, 0.0)
    y = rows.new_zeros(rows.shape[0], weight.shape[1])
    for e in range(weight.shape[0]):
        own = (row >= offsets[e]) & (row < offsets[e + 1])
        y = y + torch.where(own, rows @ weight[e].T, 0.0)
    return y


def combine_reference(y_sorted: Tensor, positions: Tensor, weights: Tensor | None, valid: Tensor) -> Tensor:
    """y_t = sum over k of g_tk y_sorted[positions_tk], accumulated in fp32, in y_sorted's dtype; 0 if not valid.

    Without weights a plain sum. Rows of tokens that are not valid may hold anything.
    """
    dtype = compute_dtype(y_sorted.dtype)
    rows_TKD = torch.where(valid[:, None, None], y_sorted[positions].to(dtype), 0.0)
    y = (rows_TKD if weights is None else rows_TKD * weights.to(dtype)[..., None]).sum(1)
    return torch.where(valid[:, None], y, 0.0).to(y_sorted.dtype)


def centroid_sums_reference(
    x: Tensor, indices: Tensor, factor: Tensor | None, valid: Tensor, num_experts: int
) -> Tensor:
    """sums_e = sum of factor_t x_t over valid t with e in sel_t, (E, D); factor (T,): 1 / ||x_t||, or None for 1."""
    dtype = compute_dtype(x.dtype)
    rows = torch.where(valid[:, None], x.detach(), 0.0).to(dtype)
    rows = rows if factor is None else rows * factor[:, None]
    member = chosen_reference(indices, num_experts).to(dtype) * valid[:, None]
    with no_autocast(x):
        return product(member.T, rows)


class State(NamedTuple):
    """What a commit reads and writes: weight and c (E, D), b (E,), sigma (), steps () int64, N (E,) int64 or None."""

    weight: Tensor
    centroids: Tensor
    expert_bias: Tensor
    score_std: Tensor
    steps: Tensor
    tokens_seen: Tensor | None


def balance_bias(
    bias: Tensor, counts: Tensor, sigma: Tensor | float, margin_hist: Tensor | None, options: CommitOptions
) -> Tensor:
    """The bias after one step of the balance rule, centred and clamped to [-2, 2]. (E,)."""
    num_experts = bias.shape[0]
    if options.balance == "none" or options.top_k == num_experts:
        return bias
    total = counts.sum()
    load = (counts * num_experts).to(bias.dtype) / total.clamp_min(1)  # E f_e, 1 when balanced
    if options.balance == "proportional":
        bias = bias + options.bias_rate * sigma * (1 - load).clamp(-1, 1)
    elif options.balance == "sign":  # of integers, so that an exactly balanced expert stays
        bias = bias + options.bias_rate * torch.sign(total - counts * num_experts).to(bias.dtype)
    else:
        assert margin_hist is not None
        target = bias + hist_quantile(margin_hist, options.top_k / num_experts).to(bias.dtype)
        bias = (1 - options.bias_rate) * bias + options.bias_rate * target
    return (bias - bias.mean()).clamp(-2, 2)


def hist_quantile(hist: Tensor, q: float) -> Tensor:
    """The q-quantile of each row of a margin histogram (E, 1024), linear between order statistics. (E,) fp64.

    Within one bin width (1/256) of torch.quantile on the margins themselves, clamped to the histogram's range: each of
    the two order statistics is known to its bin, and taken at its even place inside it.
    """
    total = hist.sum(1).to(torch.float64)
    below = hist.cumsum(1, dtype=torch.int64).to(torch.float64)
    rank = q * (total - 1).clamp_min(0)

    def order_statistic(place: Tensor) -> Tensor:
        index = (below <= place[:, None]).sum(1).clamp_max(NUM_MARGIN_BINS - 1)[:, None]
        inside = hist.gather(1, index).squeeze(1).to(torch.float64).clamp_min(1)
        before = below.gather(1, index).squeeze(1) - inside
        fraction = ((place - before + 0.5) / inside).clamp(0, 1)
        return -MARGIN_RANGE + (index.squeeze(1) + fraction) * (2 * MARGIN_RANGE / NUM_MARGIN_BINS)

    return order_statistic(rank.floor()).lerp(order_statistic(rank.ceil()), rank - rank.floor())


def whitened_reference(centroids: Tensor, weight: Tensor) -> Tensor:
    """The other rule for `weight`: differences from the mean of all centroids, decorrelated. (E, D).

        Delta_e = c_e - mu;  A = Delta Delta^T + eps tr(Delta Delta^T) / E I;  W = A^(-1/2) Delta
        weight_e = unit(mu + n unit(W_e)),  n the mean norm of Delta_e

    Symmetric decorrelation (Hyvarinen and Oja 2000), in fp64 by eigenvalues. An expert without a centroid is in neither
    mean nor A, and keeps its direction; exact copies stay copies; one expert alone keeps its own direction.
    """
    norm = torch.linalg.vector_norm(centroids, dim=1)
    here = (norm >= MIN_CENTROID_NORM) & (norm < math.inf)
    if not bool(here.any()):
        return weight
    c = centroids[here].double()
    mu = c.mean(0)
    delta = c - mu
    gram = delta @ delta.T
    a = gram + WHITENING_EPS * gram.trace() / c.shape[0] * torch.eye(c.shape[0], dtype=c.dtype, device=c.device)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.clamp_min(torch.finfo(c.dtype).tiny).rsqrt()) @ vectors.T
    n = torch.linalg.vector_norm(delta, dim=1).mean()
    unit = F.normalize(mu + n * F.normalize(root @ delta, dim=1), dim=1)
    return weight.clone().masked_scatter(here[:, None].expand_as(weight), unit.to(weight.dtype))


def given_steps(decay: float) -> int:
    """Steps of centroids that were given, so that the next commit moves them by no more than a late one."""
    return round(decay / (1 - decay))


def counters_kept(state: State, decay: float) -> tuple[Tensor, Tensor | None]:
    """steps and N as they count; where both were lost on the way (a tool that copies floats alone), those of given
    centroids: there is a scale of the scores, and a commit that sets one counts a step."""
    lost = (state.steps == 0) & (state.score_std > 0)
    steps = torch.where(lost, given_steps(decay), state.steps)
    if state.tokens_seen is None:
        return steps, None
    return steps, torch.where(lost & (state.tokens_seen == 0), GIVEN_TOKENS, state.tokens_seen)


def commit_reference(
    state: State,
    sums: Tensor,
    counts: Tensor,
    std_sum: Tensor,
    num_tokens: Tensor,
    margin_hist: Tensor | None,
    options: CommitOptions,
) -> State:
    """The state after one optimizer step: running average, directions, scale of the scores, balance bias.

    Whitened directions are another step, of all layers at once: `whitened_reference` of the new centroids. With
    num_tokens = 0 the state comes back unchanged, decided on the device.
    """
    moved = moved_reference(state, sums, counts, std_sum, num_tokens, margin_hist, options)
    some = num_tokens > 0
    weight, c, bias, sigma, steps = (
        old if new is old else torch.where(some, new, old) for old, new in zip(state[:5], moved[:5], strict=True)
    )
    seen, seen_before = moved.tokens_seen, state.tokens_seen
    seen = None if seen is None or seen_before is None else torch.where(some, seen, seen_before)
    return State(weight, c, bias, sigma, steps, seen)


def moved_reference(
    state: State,
    sums: Tensor,
    counts: Tensor,
    std_sum: Tensor,
    num_tokens: Tensor,
    margin_hist: Tensor | None,
    options: CommitOptions,
) -> State:
    """The same where there are tokens. A value that is not finite, which only somebody else can have written, counts
    as 0."""
    dtype = state.centroids.dtype
    c, old_bias, old_sigma = (
        value.nan_to_num(0.0, 0.0, 0.0) for value in (state.centroids, state.expert_bias, state.score_std)
    )
    sd = std_sum.to(dtype) / num_tokens.clamp_min(1).to(dtype)
    first = old_sigma == 0  # no scale yet; `steps` cannot tell, since given centroids start it high
    sigma = torch.where(first, sd, 0.99 * old_sigma + 0.01 * sd)
    steps, seen = counters_kept(state, options.decay)

    mean = sums.to(dtype) / counts.clamp_min(1)[:, None].to(dtype)
    if options.average == "cumulative":
        assert seen is not None
        beta = (seen.to(dtype) / (seen + counts).clamp_min(1).to(dtype))[:, None]
    else:
        beta = (steps.to(dtype) / (steps + 1).to(dtype)).clamp_max(options.decay)
    largest = torch.linalg.vector_norm(c, ord=math.inf, dim=1, keepdim=True)
    beta = torch.where(largest > 0, beta, 0.0)  # the first average of an expert stands for itself
    moved = torch.where((counts > 0)[:, None], torch.lerp(mean, c, beta), c)
    bias = balance_bias(old_bias, counts, sigma, margin_hist, options)

    weight = unit_rows(moved, state.weight) if options.directions == "centroids" else state.weight
    return State(weight, moved, bias, sigma, steps + 1, None if seen is None else seen + counts)
