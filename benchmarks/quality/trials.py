"""Changes to a K-Means router that its options do not offer, tried on a run before any of them becomes an option.

Each takes the trainer of a run before its first step; what it returns, if anything, is called after every step and
after a checkpoint was loaded.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmeans_route import KMeansRouter, MoE
from kmeans_route.functional import dispatch
from kmeans_route.lm.trainer import Trainer, learning_rate
from kmeans_route.types import Dispatch, Routing, Tokens

AfterStep = Callable[[], None] | None
Answer = tuple[Routing, Dispatch]


def _routers(trainer: Trainer) -> list[tuple[MoE, KMeansRouter]]:
    found = [(layer, layer.router) for layer in trainer.model.moe_layers]
    return [(layer, router) for layer, router in found if isinstance(router, KMeansRouter)]


def _train(trainer: Trainer, parameters: list[nn.Parameter]) -> None:
    trainer.optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})


def learnable_tau(trainer: Trainer, *, per_expert: bool) -> AfterStep:
    """The temperature of the gates is trained, one a layer or one an expert."""
    parameters = []
    for layer, router in _routers(trainer):
        size = router.num_experts if per_expert else 1
        log_tau = nn.Parameter(router.weight.new_full((size,), router.options.tau).log())
        layer.register_parameter("trial_log_tau", log_tau)
        parameters.append(log_tau)
        plain = router.route_dispatch

        def forward(*args: Any, plain: Any = plain, log_tau: Tensor = log_tau, **kwargs: Any) -> Answer:
            routing, sent = plain(*args, **kwargs)
            tau = log_tau.exp()[routing.indices] if log_tau.numel() > 1 else log_tau.exp()
            weights = torch.softmax(routing.selected_scores / tau, 1)
            return routing._replace(weights=weights * routing.valid[:, None]), sent

        router.route_dispatch = forward  # type: ignore[method-assign]
    _train(trainer, parameters)
    return None


def learned_offset(trainer: Trainer) -> AfterStep:
    """Each direction gets a trained offset, of the directions' own scale, in selection and gates: the router's option
    learned_offset, which came of it."""
    parameters = []
    for layer, router in _routers(trainer):
        offset = nn.Parameter(torch.zeros_like(router.weight))
        layer.register_parameter("trial_offset", offset)
        parameters.append(offset)
        plain = router.route_dispatch

        def forward(
            tokens: Tokens, *args: Any, plain: Any = plain, offset: Tensor = offset, router: Any = router, **kwargs: Any
        ) -> Answer:
            rows = F.normalize(router.weight, dim=1) + offset
            kept = router.weight.clone()
            with torch.no_grad():
                router.weight.copy_(rows)
            routing, sent = plain(tokens, *args, **kwargs)
            with torch.no_grad():
                router.weight.copy_(kept)
            scores = F.normalize(tokens.x, dim=1) @ F.normalize(rows, dim=1).T
            weights = torch.softmax(scores.gather(1, routing.indices) / router.options.tau, 1)
            return routing._replace(weights=weights * routing.valid[:, None]), sent

        router.route_dispatch = forward  # type: ignore[method-assign]
    _train(trainer, parameters)
    return None


def weighted_tokens(trainer: Trainer, *, by: str) -> AfterStep:
    """A token counts in an expert's mean by its gate there, by the size of the loss's gradient on that gate, or by
    benefit: by how much the loss would fall if its score there rose, 0 where it would not."""
    for _, router in _routers(trainer):
        plain = router.route_dispatch

        def forward(tokens: Tokens, *args: Any, plain: Any = plain, router: Any = router, **kwargs: Any) -> Answer:
            routing, sent = plain(tokens, *args, **kwargs)
            if router.training and torch.is_grad_enabled():
                # Without routing itself: its weights would keep the hook that keeps them.
                gates, unit = routing.weights.detach(), tokens.x.detach() * routing.inv_norm[:, None]
                gather = partial(_add_weighted, router, unit, routing.indices)
                if by == "gate":
                    gather(gates)
                elif by == "gradient":
                    routing.weights.register_hook(lambda grad: gather(grad.abs()))
                else:
                    routing.weights.register_hook(lambda grad: gather(_benefit(gates, grad)))
            return routing, sent

        router.route_dispatch = forward  # type: ignore[method-assign]
    return None


def _benefit(gates: Tensor, grad: Tensor) -> Tensor:
    """The positive part of -dL/ds of softmax gates, times tau. (T, K)"""
    return (gates * ((gates * grad).sum(1, keepdim=True) - grad)).clamp_min(0.0)


def _add_weighted(router: KMeansRouter, unit: Tensor, indices: Tensor, weights: Tensor) -> None:
    """Turn the pending sum of equal tokens into a weighted one; the mean weight is 1."""
    extra = weights / weights.mean().clamp_min(1e-30) - 1.0
    for k in range(extra.shape[1]):
        router.pending.sums.index_add_(0, indices[:, k], unit * extra[:, k, None])


def by_rank(trainer: Trainer, *, share: float, residual: bool = False) -> AfterStep:
    """An expert's mean weighs a token by share^(k-1) where the expert was the token's k-th choice; with 0 only first
    choices count, and an expert that was nobody's stays. Rank-weighted means are those of neural gas (Martinetz and
    Schulten 1991). residual: a choice gets what those before it have left, x / ||x|| less its part along each of their
    directions in turn (matching pursuit, Mallat and Zhang 1993), so that experts that are chosen together part ways.
    For one forward a step."""
    for _, router in _routers(trainer):
        plain = router.route_dispatch

        def forward(tokens: Tokens, *args: Any, plain: Any = plain, router: Any = router, **kwargs: Any) -> Answer:
            routing, sent = plain(tokens, *args, **kwargs)
            if router.counts_now() and bool(router.initialized):
                rows = tokens.x.detach() * routing.inv_norm[:, None]
                sums, total = torch.zeros_like(router.weight), torch.zeros_like(router.expert_bias)
                unit = F.normalize(router.weight, dim=1)
                for k, chosen in enumerate(routing.indices.T):
                    sums.index_add_(0, chosen, rows, alpha=share**k)
                    total.index_add_(0, chosen, routing.valid.float(), alpha=share**k)
                    if residual:
                        rows = rows - (rows * unit[chosen]).sum(1, keepdim=True) * unit[chosen]
                mean = torch.where(total[:, None] > 0, sums / total[:, None].clamp_min(1e-30), router.centroids)
                router.pending.sums.copy_(mean * router.pending.counts[:, None])  # a commit divides by the counts
            return routing, sent

        router.route_dispatch = forward  # type: ignore[method-assign]
    return None


def winner(trainer: Trainer) -> AfterStep:
    """Only the best expert by s plus a bias of its own averages a token; that bias balances first choices, by the
    proportional rule of `commit`, and the selection does not see it. For one forward a step."""
    for layer, router in _routers(trainer):
        layer.register_buffer("trial_winner_bias", torch.zeros_like(router.expert_bias))
        bias, plain = layer.get_buffer("trial_winner_bias"), router.route_dispatch

        def forward(
            tokens: Tokens, *args: Any, plain: Any = plain, router: Any = router, bias: Tensor = bias, **kwargs: Any
        ) -> Answer:
            routing, sent = plain(tokens, *args, **kwargs)
            if router.counts_now() and router.initialized:
                rows = tokens.x.detach() * routing.inv_norm[:, None]
                chosen = (rows @ F.normalize(router.weight, dim=1).T + bias).argmax(1)
                counts = torch.bincount(chosen, minlength=router.num_experts)
                sums = torch.zeros_like(router.weight).index_add_(0, chosen, rows)
                mean = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), router.centroids)
                router.pending.sums.copy_(mean * router.pending.counts[:, None])  # a commit divides by the counts
                short = (1.0 - router.num_experts * counts / len(rows)).clamp(-1.0, 1.0)
                bias += router.commit_options.bias_rate * router.score_std * short
                bias -= bias.mean()
            return routing, sent

        router.route_dispatch = forward  # type: ignore[method-assign]
    return None


def fan_in_start(trainer: Trainer) -> AfterStep:
    """Every matrix starts at a standard deviation of 1 / sqrt(fan in) in place of 0.02, less by the same root of the
    number of layers where a branch meets the residual stream, and the embedding at 1. Routers are left alone: K-Means
    has no weights, and a learned one starts by its own rule."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name.startswith("embedding"):
                parameter /= 0.02
            elif parameter.ndim > 1 and ".router." not in name:
                parameter /= 0.02 * math.sqrt(parameter.shape[-1])
    return None


def centred(trainer: Trainer) -> AfterStep:
    """The running mean of all hidden states is taken off before scoring and averaging."""
    for layer, router in _routers(trainer):
        layer.register_buffer("trial_mean", router.weight.new_zeros(router.hidden_size))
        mean = layer.get_buffer("trial_mean")

        def forward(tokens: Tokens, *_: Any, mean: Tensor = mean, router: Any = router, **__: Any) -> Answer:
            x = tokens.x
            routing = router.route(tokens._replace(x=x - mean), gather=True)
            if router.training and torch.is_grad_enabled():
                mean.lerp_(x.detach().mean(0), 0.01)
            return routing, dispatch(x, routing)

        router.route_dispatch = forward  # type: ignore[method-assign]
    return None


def follows_the_learning_rate(trainer: Trainer, *, what: str) -> AfterStep:
    """1 - decay goes with the learning rate, from 0.01 at its peak (arXiv 2611.09501 does so for clustering); or the
    step of the balance bias does, from its full size: what jitters with each batch would then come to rest."""
    routers = [router for _, router in _routers(trainer)]
    full = [router.commit_options.bias_rate for router in routers]

    def after_step() -> None:
        rate = learning_rate(trainer.config, trainer.step) / trainer.config.lr
        for router, bias_rate in zip(routers, full, strict=True):
            new = {"decay": 1.0 - 0.01 * rate} if what == "decay" else {"bias_rate": bias_rate * rate}
            router.commit_options = router.commit_options._replace(**new)

    after_step()
    return after_step


def bias_step_follows_the_average(trainer: Trainer, *, at_most: float = math.inf) -> AfterStep:
    """The step of the balance bias is 0.015 where the average's own has come to 1 - decay, and larger before, with the
    root of that: scores that still drift want large steps, scores that have come to rest small ones."""
    routers = [router for _, router in _routers(trainer)]

    def after_step() -> None:
        for router in routers:
            options = router.commit_options
            ramp = max(1.0, 1.0 / ((trainer.step + 1) * (1.0 - options.decay)))
            router.commit_options = options._replace(bias_rate=0.015 * math.sqrt(min(ramp, at_most)))

    after_step()
    return after_step


def routed_by_embedding(trainer: Trainer) -> AfterStep:
    """Every layer scores and averages the token's embedding in place of its hidden state: the byte alone decides."""
    seen: list[Tensor] = []
    trainer.model.embedding.register_forward_hook(lambda _, __, rows: seen.__setitem__(slice(None), [rows]))
    for _, router in _routers(trainer):

        def forward(tokens: Tokens, *_: Any, router: Any = router, **__: Any) -> Answer:
            routing = router.route(tokens._replace(x=seen[0].flatten(0, -2)), gather=True)
            return routing, dispatch(tokens.x, routing)

        router.route_dispatch = forward  # type: ignore[method-assign]
    return None


def frozen_after_a_third(trainer: Trainer) -> AfterStep:
    """Centroids and biases stand still for the last two thirds of the steps."""

    def after_step() -> None:
        for _, router in _routers(trainer):
            router.freeze(trainer.step >= trainer.config.steps // 3)

    return after_step


def fixed_at_first_tokens(trainer: Trainer) -> AfterStep:
    """Centroids stay what the first step set (tokens, in the committed runs); biases move. Averaging off."""
    kept = [(router, torch.zeros_like(router.weight)) for _, router in _routers(trainer)]

    def after_step() -> None:
        for router, first in kept:
            if first.any():
                router.weight.copy_(first)
            elif router.initialized:
                first.copy_(router.weight)

    return after_step


def offset_from_first_tokens(trainer: Trainer) -> AfterStep:
    """A learned offset on centroids that stay what the first step set: what the offset does by itself."""
    learned_offset(trainer)
    return fixed_at_first_tokens(trainer)


def no_ramp(trainer: Trainer) -> AfterStep:
    """The average keeps `decay` from the first commit on instead of a plain mean at first: centroids leave what they
    started as slowly."""
    routers = [router for _, router in _routers(trainer)]

    def after_step() -> None:
        for router in routers:
            if router.initialized:
                decay = router.commit_options.decay
                router.steps.clamp_(min=round(decay / (1 - decay)))

    return after_step


FAN_IN = "1/sqrt(fan in) start"
TRIALS: dict[str, Callable[[Trainer], AfterStep]] = {
    "learnable tau a layer": partial(learnable_tau, per_expert=False),
    "learnable tau an expert": partial(learnable_tau, per_expert=True),
    "learned offset": learned_offset,
    **{f"tokens weighted by {what}": partial(weighted_tokens, by=what) for what in ("gate", "gradient", "benefit")},
    "first choices alone": partial(by_rank, share=0.0),
    "k-th choices halved": partial(by_rank, share=0.5),
    "residuals": partial(by_rank, share=1.0, residual=True),
    "winner averages": winner,
    FAN_IN: fan_in_start,
    "centred": centred,
    "routed by the embedding": routed_by_embedding,
    "frozen after a third": frozen_after_a_third,
    "no ramp": no_ramp,
    "fixed at first tokens": fixed_at_first_tokens,
    "fixed at first tokens, learned offset": offset_from_first_tokens,
    "decay follows the rate": partial(follows_the_learning_rate, what="decay"),
    "bias step follows the rate": partial(follows_the_learning_rate, what="bias_rate"),
    "bias step follows the average": bias_step_follows_the_average,
    "bias step follows the average, bounded": partial(bias_step_follows_the_average, at_most=10.0),
}
