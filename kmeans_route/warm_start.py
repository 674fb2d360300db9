"""Warm start: K-Means routers that take over from the learned routers of a trained model."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kmeans_route import functional, metrics, reference
from kmeans_route.agreement import Comparison, Forward, Router, Seen, Tick, compare, reread, ticking, watch
from kmeans_route.checks import RouteOptions, check_choice
from kmeans_route.router import KMeansRouter

STARTS = ("means", "rows")
TAUS = [10 ** (place / 20 - 2.5) for place in range(61)]
"""Temperatures tried by fit_tau, 0.003 to 3.2, 12% apart."""


def calibrate(
    model: nn.Module,
    target: nn.Module | Mapping[str, KMeansRouter],
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    start: str = "means",
    balance_steps: int = 0,
    fit_tau: bool = False,
    forward: Forward | None = None,
    progress: bool | Tick = True,
) -> Comparison:
    """Set the centroids of K-Means routers from the hidden states that a trained model's routers send to each expert.

    No gradient, no training step; of `model` nothing changes, of `target` the state of its K-Means routers and, with
    `fit_tau`, their tau. Both run in eval mode and get their own modes back. With balance_steps or fit_tau the scores
    of all tokens are held, T x E fp32 a router: some ten thousand tokens are enough.

    Args:
        model: the trained model. Its routers may be of any class that `kmeans_route.agreement.read` understands.
        target: the same model with a `KMeansRouter` in place of each router that is to be replaced (a deepcopy with
            swapped routers, say), or these routers by the names of the old ones in `model`.
        batches: what to run the models on, several times; anything iterable, of which a list is made.
        held_out: other batches to report on; None for `batches` again.
        start: "means", the mean of the hidden states x_t / ||x_t|| (x_t with accumulate="raw") that the old router
            sends to each expert, what a commit averages; or "rows" to keep the directions that the K-Means routers
            have, such as the old rows that `KMeansRouter.from_linear` gave them.
        balance_steps: steps of quantile balancing that set the selection bias for an even load on `batches`; of their
            biases the one of smallest MaxVio stays. 0 for no bias.
        fit_tau: choose the one tau, for all routers, whose gates are nearest to the old ones (smallest divergence over
            the experts that the old router chose) instead of keeping theirs.
        forward: (model, batch) -> loss, how to run a batch; None calls model(batch), model(**batch) for a mapping,
            model(*batch) for a tuple, and takes `.loss` of the output where there is one.
        progress: a bar on a terminal where rich is installed; or a function that is called after each batch.

    Returns:
        Comparison: top-1 and top-k agreement with the old routers on the same hidden states, loads, and the loss of
        both models. An expert to which the old router sent nothing keeps the direction that it had.

    Raises:
        ValueError: no batches, no routers, old routers that are not finite, or tokens that no router could use.
        TypeError: a target that is no K-Means router, or an old router whose output cannot be read. After any error
        the routers are as before.
    """
    check_choice("start", start, STARTS)
    if isinstance(balance_steps, bool) or not isinstance(balance_steps, int) or balance_steps < 0:
        raise ValueError(f"balance_steps must be an int of at least 0, got {balance_steps!r}: pass 0 for no bias")
    new = _kmeans_routers(target)
    old = _old_routers(model, new)
    held = reread(batches, "batches")
    reported = held if held_out is None else reread(held_out, "held_out")
    if fit_tau and any(router.options.gate not in ("softmax", "sigmoid") for router in new.values()):
        raise ValueError("fit_tau must have gates with a temperature, got 'cosine' or 'uniform': leave it False")
    second = target if isinstance(target, nn.Module) else None
    wants_scores = fit_tau or balance_steps > 0
    total = len(held) * ((start == "means") + wants_scores) + len(reported) * (1 + (second is not None))
    saved = {name: _Saved(router) for name, router in new.items()}
    try:
        with ticking(progress, "calibrating", total) as tick, torch.no_grad():
            if start == "means":
                _set_means(model, old, new, held, forward, tick)
            else:
                for router in new.values():
                    router.set_centroids(router.weight.clone())
            if wants_scores:
                _fit(model, old, new, held, balance_steps, fit_tau, forward, tick)
            choosers = {name: _chooser(router) for name, router in new.items()}
            after = None if second is None else (second, {name: _watched(router) for name, router in new.items()})
            return compare(model, old, choosers, reported, forward=forward, target=after, tick=tick)
    except BaseException:
        for one in saved.values():
            one.restore()
        raise


def _watched(router: KMeansRouter) -> Router:
    return Router(router, router.top_k, router.num_experts)


def _chooser(router: KMeansRouter) -> Any:
    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = router.route(x.to(router.weight.device))
        return routing.indices.to(x.device), routing.weights.to(x.device)

    return choose


def _kmeans_routers(target: nn.Module | Mapping[str, KMeansRouter]) -> dict[str, KMeansRouter]:
    if isinstance(target, nn.Module):
        found = {name or "router": m for name, m in target.named_modules() if isinstance(m, KMeansRouter)}
        where = type(target).__name__
    else:
        found, where = dict(target), "the mapping"
    if not found:
        raise ValueError(
            f"target must contain at least one KMeansRouter, got none in {where}: replace the routers first"
        )
    for name, router in found.items():
        if not isinstance(router, KMeansRouter):
            raise TypeError(f"target[{name!r}] must be a KMeansRouter, got {type(router).__name__}: use from_linear")
    return found


def _old_routers(model: nn.Module, new: Mapping[str, KMeansRouter]) -> dict[str, Router]:
    modules = dict(model.named_modules())
    old = {}
    for name, router in new.items():
        module = modules.get(name) or (model if name == "router" else None)
        if module is None:
            raise ValueError(f"model must hold the old router {name!r}, got none of that name: name it as in the model")
        if module is router:
            raise ValueError(f"router {name!r} must differ in model and target, got one and the same: copy the model")
        if not all(bool(value.isfinite().all()) for value in module.parameters()):
            raise ValueError(f"router {name!r} of model must be finite, got NaN or Inf in its weights: load another")
        old[name] = Router(module, router.top_k, router.num_experts)
    return old


class _Saved:
    """All that calibration changes of a router, to be put back after an error."""

    NAMES = ("options", "pending", "tokens_per_expert", "centroid_turn", "_initialized")

    def __init__(self, router: KMeansRouter) -> None:
        self.router = router
        self.plain = {name: getattr(router, name) for name in self.NAMES}
        self.buffers = {name: buffer.clone() for name, buffer in router.named_buffers(recurse=False)}

    def restore(self) -> None:
        for name, value in self.plain.items():
            setattr(self.router, name, value)
        with torch.no_grad():
            for name, value in self.buffers.items():
                self.router.get_buffer(name).copy_(value)
        self.router._cached = None
        self.router._seen = self.router._trace()


def _set_means(
    model: nn.Module,
    old: Mapping[str, Router],
    new: Mapping[str, KMeansRouter],
    batches: list[Any],
    forward: Forward | None,
    tick: Tick,
) -> None:
    sums = {name: torch.zeros_like(router.weight) for name, router in new.items()}
    counts = {name: torch.zeros_like(router.expert_bias, dtype=torch.int64) for name, router in new.items()}

    def add(name: str, seen: Seen) -> None:
        router = new[name]
        x, indices = seen.x.to(router.weight.device), seen.indices.to(router.weight.device)
        routing = router.route(x, indices=indices)
        batch_sums, batch_counts = functional.centroid_sums(
            x, routing, accumulate=router.accumulate, backend=router.backend
        )
        sums[name] += batch_sums
        counts[name] += batch_counts

    watch(model, old, batches, add, forward, tick)
    means = {}
    for name, router in new.items():
        mean = sums[name] / counts[name].clamp_min(1)[:, None]
        # Nothing was sent there, or it cancels: such an expert keeps its direction.
        has_direction = (functional.directions(mean, torch.float32) != 0).any(1, keepdim=True)
        means[name] = torch.where(has_direction, mean, router.weight)
    for name, router in new.items():
        router.set_centroids(means[name])
        if router.tokens_seen is not None:
            router.tokens_seen.copy_(counts[name])
        router.tokens_per_expert.copy_(counts[name])


def _fit(
    model: nn.Module,
    old: Mapping[str, Router],
    new: Mapping[str, KMeansRouter],
    batches: list[Any],
    balance_steps: int,
    fit_tau: bool,
    forward: Forward | None,
    tick: Tick,
) -> None:
    scores: dict[str, list[Tensor]] = {name: [] for name in new}
    divergence = torch.zeros(len(TAUS), dtype=torch.float64)

    def add(name: str, seen: Seen) -> None:
        router = new[name]
        x, indices = seen.x.to(router.weight.device), seen.indices.to(router.weight.device)
        routing = functional.route(
            x,
            router.weight,
            indices=indices,
            directions=router.directions(x.dtype),
            return_scores=True,
            **router.options._asdict(),
        )
        assert routing.scores is not None
        scores[name].append(routing.scores.float().cpu())
        if fit_tau:
            divergence.add_(_divergence(seen, routing.scores, indices, router.options).cpu())

    watch(model, old, batches, add, forward, tick)
    best = TAUS[int(divergence.argmin())]
    for name, router in new.items():
        if fit_tau:
            router.options = router.options._replace(tau=best)
        s_TE = torch.cat(scores[name])
        router.score_std.fill_(float(reference.score_std_reference(s_TE)) / len(s_TE))
        if balance_steps:
            bias, counts = balanced_bias(s_TE, router.options, balance_steps)
            router.expert_bias.copy_(bias)
            router.tokens_per_expert.copy_(counts)


def _divergence(seen: Seen, scores: Tensor, indices: Tensor, options: RouteOptions) -> Tensor:
    """For each of TAUS the sum over tokens of KL(old gates || new gates), both normalised over the old ids."""
    want = seen.weights.to(scores.device).double().clamp_min(1e-9)
    want = want / want.sum(1, keepdim=True)
    selected = scores.gather(1, indices).double()
    everything = torch.ones_like(scores, dtype=torch.bool)
    sums = []
    for tau in TAUS:
        tried = options._replace(tau=tau, normalize=True)
        gates = reference.gates_reference(selected, scores, everything, tried) / options.scaling
        sums.append((want * (want / gates.clamp_min(1e-9)).log()).sum())
    return torch.stack(sums)


def balanced_bias(scores: Tensor, options: RouteOptions, steps: int) -> tuple[Tensor, Tensor]:
    """The selection bias (E,) that evens the load on scores (T, E), and the loads (E,) with it.

    Each step moves every bias half way to where its expert would take its K / E of the tokens, the others as they are
    (the quantile rule of a commit, on the scores themselves instead of a histogram). In groups, where an expert may be
    no candidate of enough tokens, each step is of the proportional rule, and ever smaller.
    """
    num_tokens, num_experts = scores.shape
    place = min(num_tokens, options.top_k * num_tokens // num_experts + 1)
    spread = float(reference.score_std_reference(scores)) / num_tokens
    bias = torch.zeros(num_experts)
    best = (math.inf, bias, torch.zeros(num_experts, dtype=torch.int64))
    for step in range(steps + 1):
        ranking = scores + bias
        if options.grouped:
            ranking = ranking.masked_fill(~reference.candidates_reference(ranking, options), -torch.inf)
        ids = reference.stable_topk(ranking, min(num_experts, options.top_k + 1))
        counts = torch.bincount(ids[:, : options.top_k].flatten(), minlength=num_experts)
        max_vio = float(metrics.max_vio(counts))
        if max_vio < best[0]:
            best = (max_vio, bias, counts)
        if options.top_k == num_experts:
            break
        if options.grouped:
            change = 0.5 * 0.95**step * spread * (1 - metrics.load(counts)).clamp(-1, 1)
        else:
            alpha = ranking.gather(1, ids[:, -1:])
            change = (alpha - ranking).kthvalue(place, dim=0).values / 2
        bias = bias + change
        bias = (bias - bias.mean()).clamp(-2, 2)
    return best[1], best[2]
