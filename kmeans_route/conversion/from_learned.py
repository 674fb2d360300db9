"""Warm start: K-Means routers that take over from the learned routers of a trained model."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kmeans_route import metrics, reference
from kmeans_route.checks import check_choice, check_module
from kmeans_route.conversion import compare as agreement
from kmeans_route.conversion.compare import Choose, Comparison, Forward, Router, Seen, Tick
from kmeans_route.functional import centroid_sums, directions
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.types import RouteOptions, Routing

STARTS = ("means", "rows")
TAUS = [10 ** (place / 20 - 2.5) for place in range(61)]
"""Temperatures tried by fit_tau, 0.003 to 3.2, 12% apart."""
OverText = Callable[[Callable[[str, Seen], None]], object]
"""Shows a function what the old routers see and choose, by one pass over the batches."""


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

    No training step; only the state of the K-Means routers changes and, with `fit_tau`, their tau. With balance_steps
    or fit_tau all scores are held, T x E fp32 a router: some ten thousand tokens are enough.

    Args:
        model: the trained model, with routers of any class that `kmeans_route.conversion.compare.read` understands.
        target: the same model with a `KMeansRouter` in place of each router that is to be replaced (a deepcopy with
            swapped routers, say), or these routers by the names of the old ones in `model`.
        batches: what to run the models on, in eval mode and several times; anything iterable.
        held_out: other batches to report on; None for `batches` again.
        start: "means" of the hidden states x_t / ||x_t|| (x_t with accumulate="raw") that the old router sends to each
            expert; or "rows" to keep the directions that `KMeansRouter.from_linear` gave them.
        balance_steps: steps of quantile balancing that set the selection bias for an even load on `batches`; of their
            biases the one of smallest MaxVio stays. 0 for no bias.
        fit_tau: choose the one tau for all routers whose gates diverge least from the old ones on the old experts.
        forward: (model, batch) -> loss, how to run a batch; None calls model(batch), model(**batch) for a mapping,
            model(*batch) for a tuple, and takes `.loss` of the output where there is one.
        progress: a bar on a terminal where rich is installed; or a function that is called after each batch.

    Returns:
        Comparison with the old routers. An expert to which the old router sent nothing keeps its centroid. Means become
        directions by the router's rule at once; kept rows do at its first commit, so keep them with
        directions="centroids".

    Raises:
        ValueError, TypeError: models, batches or an option do not fit; the routers are then as before.
    """
    check_module("model", model)
    check_choice("start", start, STARTS)
    if isinstance(balance_steps, bool) or not isinstance(balance_steps, int) or balance_steps < 0:
        raise ValueError(f"balance_steps must be an int of at least 0, got {balance_steps!r}: pass 0 for no bias")
    new = _new_routers(target)
    old = _old_routers(model, new)
    held, reported = agreement.reread(batches, held_out)
    if fit_tau and any(router.options.gate not in ("softmax", "sigmoid") for router in new.values()):
        raise ValueError("fit_tau must have gates with a temperature, got 'cosine' or 'uniform': leave it False")
    second = target if isinstance(target, nn.Module) else None
    wants_scores = fit_tau or balance_steps > 0
    total = len(held) * ((start == "means") + wants_scores) + len(reported) * (1 if second is None else 2)
    with agreement.ticking(forward, progress, "calibrating", total) as run, torch.no_grad(), ExitStack() as on_error:
        for router in new.values():
            on_error.callback(router.restore, router.snapshot())
        over_text = partial(agreement.watch, model, old, held, forward=run)
        _set_centroids(new, over_text if start == "means" else None)
        if wants_scores:
            _fit(new, over_text, balance_steps, fit_tau)
        choose = {name: _chooser(router) for name, router in new.items()}
        result = agreement.compare(model, old, choose, reported, forward=run, target=second)
        on_error.pop_all()
    return result


def _chooser(router: KMeansRouter) -> Choose:
    def choose(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = router.route(x.to(router.weight.device))
        return routing.indices.to(x.device), routing.weights.to(x.device)

    return choose


def _new_routers(target: nn.Module | Mapping[str, KMeansRouter]) -> dict[str, KMeansRouter]:
    if isinstance(target, nn.Module):
        found, where = agreement.kmeans_routers(target), type(target).__name__
    elif isinstance(target, Mapping):
        found, where = dict(target), "the mapping"
    else:
        raise TypeError(
            f"target must be a model or a mapping from names to K-Means routers, got {type(target).__name__}: pass the "
            "model with the new routers"
        )
    if not found:
        raise ValueError(
            f"target must contain at least one KMeansRouter, got none in {where}: replace the routers first"
        )
    for name, router in found.items():
        if not isinstance(router, KMeansRouter):
            raise TypeError(f"target[{name!r}] must be a KMeansRouter, got {type(router).__name__}: use from_linear")
    return found


def _old_routers(model: nn.Module, new: Mapping[str, KMeansRouter]) -> dict[str, Router]:
    modules = agreement.modules_of(model)
    old = {}
    for name, watched in agreement.to_watch(new).items():
        module = modules.get(name)
        if module is None:
            raise ValueError(f"model must hold the old router {name!r}, got none of that name: name it as in the model")
        if module is watched.module:
            raise ValueError(f"router {name!r} must differ in model and target, got one and the same: copy the model")
        if not all(bool(value.isfinite().all()) for value in module.parameters()):
            raise ValueError(f"router {name!r} of model must be finite, got NaN or Inf in its weights: load another")
        old[name] = watched._replace(module=module)
    return old


def _set_centroids(new: Mapping[str, KMeansRouter], over_text: OverText | None) -> None:
    """The means of what the old routers send to each expert; without text the directions that are there."""
    sums = {name: torch.zeros_like(router.weight) for name, router in new.items()}
    counts = {name: torch.zeros_like(router.expert_bias, dtype=torch.int64) for name, router in new.items()}

    def add(name: str, seen: Seen) -> None:
        router = new[name]
        x = seen.x.to(router.weight.device)
        batch = centroid_sums(x, agreement.replay(router, seen), accumulate=router.accumulate, backend=router.backend)
        for total, part in zip((sums[name], counts[name]), batch, strict=True):
            total += part

    if over_text is not None:
        over_text(add)
    for name, router in new.items():
        mean = sums[name] / counts[name].clamp_min(1)[:, None]
        # Nothing was sent there, or it cancels: such an expert keeps its direction.
        has_direction = (directions(mean, torch.float32) != 0).any(1, keepdim=True)
        length = torch.linalg.vector_norm(mean, dim=1)[has_direction[:, 0]].mean().nan_to_num(1.0)
        kept = directions(router.weight, torch.float32) * length  # as long as the others: raw means keep theirs
        router.set_centroids(torch.where(has_direction, mean, kept), averages=over_text is not None)
        if over_text is not None:
            router.tokens_per_expert.copy_(counts[name])
            if router.tokens_seen is not None:  # a kept one counts as given, or one token would take its place
                router.tokens_seen.copy_(torch.where(has_direction[:, 0], counts[name], router.tokens_seen))


def _fit(new: Mapping[str, KMeansRouter], over_text: OverText, balance_steps: int, fit_tau: bool) -> None:
    """Score spread, and where asked for, tau and the selection bias."""
    scores: dict[str, list[Tensor]] = {name: [] for name in new}
    divergence = torch.zeros(len(TAUS), dtype=torch.float64, device="cpu")

    def add(name: str, seen: Seen) -> None:
        routing = agreement.replay(new[name], seen)
        assert routing.scores is not None
        scores[name].append(routing.scores.float().cpu())
        if fit_tau:
            divergence.add_(_divergence(seen, routing, new[name].options).cpu())

    over_text(add)
    best = TAUS[int(divergence.argmin())]
    for name, router in new.items():
        if fit_tau:
            router.options = router.options._replace(tau=best)
        s_TE = torch.cat(scores[name])
        router.score_std.fill_(float(reference.score_std_reference(s_TE).mean()))
        if balance_steps:
            bias, counts = balanced_bias(s_TE, router.options, balance_steps)
            router.expert_bias.copy_(bias)
            router.tokens_per_expert.copy_(counts)


def _divergence(seen: Seen, routing: Routing, options: RouteOptions) -> Tensor:
    """For each of TAUS the sum over tokens of KL(old gates || new gates), both normalised over the old ids."""
    assert routing.scores is not None
    want = seen.weights.to(routing.scores.device).double().clamp_min(1e-9)
    want = want / want.sum(1, keepdim=True)
    selected = routing.scores.gather(1, routing.indices).double()
    everything = torch.ones_like(routing.scores, dtype=torch.bool)
    sums = []
    for tau in TAUS:
        tried = options._replace(tau=tau, normalize=True, scaling=1.0)
        gates = reference.gates_reference(selected, routing.scores, everything, tried)
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
    spread = float(reference.score_std_reference(scores).sum()) / num_tokens
    bias = scores.new_zeros(num_experts)
    best = (math.inf, bias, scores.new_zeros(num_experts, dtype=torch.int64))
    for step in range(steps + 1):
        ids = agreement.select(scores + bias, options, extra=1)
        counts = torch.bincount(ids[:, : options.top_k].flatten(), minlength=num_experts)
        max_vio = float(metrics.max_vio(counts))
        if max_vio < best[0]:
            best = (max_vio, bias, counts)
        if options.top_k == num_experts:
            break
        if options.grouped:
            change = 0.5 * 0.95**step * spread * (1 - metrics.load(counts)).clamp(-1, 1)
        else:
            ranking = scores + bias
            alpha = ranking.gather(1, ids[:, -1:])
            change = (alpha - ranking).kthvalue(place, dim=0).values / 2
        bias = bias + change
        bias = (bias - bias.mean()).clamp(-2, 2)
    return best[1], best[2]
