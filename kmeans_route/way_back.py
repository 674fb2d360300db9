"""The way back: linear gates, as ordinary mixtures have them, that choose as K-Means routers do."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kmeans_route import functional, reference
from kmeans_route.agreement import Comparison, Forward, Router, Seen, Tick, compare, reread, ticking, watch
from kmeans_route.checks import RouteOptions, check_choice, check_range
from kmeans_route.learned import KINDS, LearnedRouter
from kmeans_route.router import KMeansRouter

BIASES = ("none", "rows", "score", "logit")
SCALES = [2 ** (place / 6 - 4) for place in range(43)]
"""Scales tried, in units of 1 / (tau mean ||x||): 1/16 to 8, 12% apart."""
MAX_FIT_TOKENS = 16384
MAX_GRID_TOKENS = 4096
MAX_SATURATED = 1e-3  # of the choices, where a bias makes them unequal anyway
REFINEMENTS = 30


def to_linear(router: KMeansRouter, scale: float | None = None) -> nn.Linear:
    """A linear gate without bias whose rows are `scale` times the directions of the router.

    Where every bias of the router is 0 the top_k largest logits belong to the experts that it chooses, whatever the
    scale, but for ties within rounding: a positive factor on x changes no order. Otherwise the bias is lost, and
    `export_gates` measures what that costs. The softmax of the selected logits is the router's softmax gate where
    ||x|| is 1 / (scale tau).

    Args:
        router: its state is not changed.
        scale: > 0; None for 1 / (tau sqrt(D)), right for hidden states of an RMS norm with weights of 1.

    Returns:
        nn.Linear (E, D) in fp32, on the router's device.

    Raises:
        ValueError: a scale out of its range. TypeError: no `KMeansRouter`.

    Example:
        >>> import torch, kmeans_route
        >>> router, x = kmeans_route.KMeansRouter(16, 4, top_k=2).eval(), torch.randn(10, 16)
        >>> torch.equal(kmeans_route.to_linear(router)(x).topk(2).indices, router(x).indices)
        True
    """
    if not isinstance(router, KMeansRouter):
        raise TypeError(f"router must be a KMeansRouter, got {type(router).__name__}: pass one that K-Means set")
    if scale is None:
        scale = 1 / (router.options.tau * math.sqrt(router.hidden_size))
    check_range("scale", scale, 0.0, math.inf, low_open=True)
    return _linear(router.directions() * scale)


def _linear(rows: Tensor, bias: Tensor | None = None) -> nn.Linear:
    gate = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None, device=rows.device)
    with torch.no_grad():
        gate.weight.copy_(rows)
        if bias is not None:
            gate.bias.copy_(bias)
    return gate


class VanillaGate(NamedTuple):
    """An ordinary gate. p = softmax or sigmoid of the logits; the K largest p + score_bias are chosen.

    linear: x -> logits, fp32. score_bias: (E,) added to p for selection only, or None. kind: "softmax" or "sigmoid".
    options: top_k, groups, whether gates are normalised over the selected experts, and their scaling.
    scale: of the directions in the rows, before anything was added to them.
    """

    linear: nn.Linear
    score_bias: Tensor | None
    kind: str
    options: RouteOptions
    scale: float

    @torch.no_grad()
    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and gates (T, K) of hidden states (T, D), in fp32."""
        p = _probabilities(self.linear(x.float()), self.kind)
        ids = _select(p if self.score_bias is None else p + self.score_bias, self.options)
        return ids, _gates(p, ids, self.options)


class Export(NamedTuple):
    """What `export_gates` returns.

    gates: name -> VanillaGate. comparison: `Comparison` of the K-Means model (before) with them (after).
    """

    gates: dict[str, VanillaGate]
    comparison: Comparison


def export_gates(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: nn.Module | None = None,
    held_out: Iterable[Any] | None = None,
    kind: str = "softmax",
    bias: str = "none",
    forward: Forward | None = None,
    progress: bool | Tick = True,
) -> Export:
    """Fit an ordinary gate to each K-Means router of a model, for serving engines that know no other.

    The rows are scale * direction, for sigmoids with one vector added to all rows, which changes no order. The scale
    is the one of smallest gate error (half the sum over experts of |g - g'|) at which p does not saturate. The choices
    are equal, but for ties within rounding, only where every bias of the router is 0; otherwise nothing is promised,
    and the report says how far they agree.

    Args:
        model: with K-Means routers; it runs in eval mode and is not changed.
        batches: calibration text, as in `calibrate`.
        target: a copy of the model with a `LearnedRouter` or an nn.Linear in place of each K-Means router, which gets
            the gates; its loss is then reported. None returns the gates only.
        held_out: other batches to report on; None for `batches` again.
        kind: "softmax" (Mixtral) or "sigmoid" (DeepSeek-V3) of the logits.
        bias: where the selection bias goes. "rows": there is no place, so it is folded into the rows along the
            direction that all hidden states share, kept where that gives the greater overlap of the choices. "score":
            added to p for selection only (DeepSeek-V3's e_score_correction_bias, `LearnedRouter` with balance "sign"
            or "quantile") and fitted to the greatest overlap, or left 0 and folded into the rows where that makes the
            smaller gate error. "logit": added to the logits, so to the gates as well (GPT-OSS). "none": lost.
        forward, progress: as in `calibrate`.

    Returns:
        Export: the gates, and a `Comparison` of the K-Means model (before) with them (after): agreement on the same
        hidden states, loads, loss.

    Raises:
        ValueError: no batches, no K-Means routers, a target that does not fit, or an option. TypeError: a target's
            router that takes no gate. After any error the target is as before.
    """
    check_choice("kind", kind, KINDS)
    check_choice("bias", bias, BIASES)
    routers = {name or "router": m for name, m in model.named_modules() if isinstance(m, KMeansRouter)}
    if not routers:
        raise ValueError(f"model must contain at least one KMeansRouter, got none in {type(model).__name__}")
    places = None if target is None else _places(target, routers, kind, bias)
    held = reread(batches, "batches")
    reported = held if held_out is None else reread(held_out, "held_out")
    watched = watched_routers(routers)
    total = len(held) + len(reported) * (1 + (target is not None))
    with ticking(progress, "exporting", total) as tick, torch.no_grad():
        gates = fit_gates(model, routers, held, kind, bias, forward, tick)
        choosers = {name: gate.choose for name, gate in gates.items()}
        if target is None or places is None:
            return Export(gates, compare(model, watched, choosers, reported, forward=forward, tick=tick))
        saved = {name: {k: v.clone() for k, v in place.state_dict().items()} for name, place in places.items()}
        try:
            for name, gate in gates.items():
                _put(places[name], gate)
            after = {name: watched[name]._replace(module=place) for name, place in places.items()}
            result = compare(model, watched, choosers, reported, forward=forward, target=(target, after), tick=tick)
        except BaseException:
            for name, place in places.items():
                place.load_state_dict(saved[name])
            raise
        return Export(gates, result)


def watched_routers(routers: Mapping[str, KMeansRouter]) -> dict[str, Router]:
    """The routers as `watch` takes them."""
    return {name: Router(router, router.top_k, router.num_experts) for name, router in routers.items()}


def fit_gates(
    model: nn.Module,
    routers: Mapping[str, KMeansRouter],
    batches: Iterable[Any],
    kind: str,
    bias: str,
    forward: Forward | None,
    tick: Tick,
) -> dict[str, VanillaGate]:
    """The gates of `export_gates`, from one pass over the batches."""
    texts = {name: _Text(router) for name, router in routers.items()}
    watch(model, watched_routers(routers), batches, lambda name, seen: texts[name].add(seen), forward, tick)
    return {name: fit_gate(routers[name], text.sample(), kind, bias) for name, text in texts.items()}


class Sample(NamedTuple):
    """Tokens to fit on: scores (N, E), norms (N,) of the hidden states, ids (N, K), gates (N, K) without scaling."""

    scores: Tensor
    norms: Tensor
    ids: Tensor
    gates: Tensor


class _Text:
    """Gathers a `Sample` of at most MAX_FIT_TOKENS tokens, the first of each batch as evenly as they come."""

    def __init__(self, router: KMeansRouter) -> None:
        self.router, self.parts = router, list[Sample]()

    def add(self, seen: Seen) -> None:
        router, x = self.router, seen.x.to(self.router.weight.device)
        routing = functional.route(
            x,
            router.weight,
            indices=seen.indices.to(x.device),
            directions=router.directions(x.dtype),
            return_scores=True,
            **router.options._asdict(),
        )
        assert routing.scores is not None
        gates = seen.weights.float() / router.options.scaling
        self.parts.append(Sample(routing.scores.float(), 1 / routing.inv_norm.float(), routing.indices, gates))

    def sample(self) -> Sample:
        whole = Sample(*(torch.cat(parts) for parts in zip(*self.parts, strict=True)))
        every = math.ceil(len(whole.ids) / MAX_FIT_TOKENS)
        return Sample(*(part[::every] for part in whole))


class _Form(NamedTuple):
    """A way to write the rows: their unit of length is still free. place is where the selection bias goes then."""

    rows: Tensor
    scores: Tensor
    place: str


def fit_gate(router: KMeansRouter, text: Sample, kind: str, bias: str) -> VanillaGate:
    """The gate of one router; see `export_gates`."""
    b_E, options = router.expert_bias, router.options
    few = Sample(*(part[:: math.ceil(len(text.ids) / MAX_GRID_TOKENS)] for part in text))
    unit = 1 / (options.tau * float(text.norms.mean()))
    allowed = MAX_SATURATED if bool((b_E != 0).any()) else 0.0
    tried: list[tuple[bool, float, float, _Form]] = []
    for form, few_form in _forms(router, text, few, kind, bias):
        for factor in SCALES:
            scale = factor * unit
            logits = scale * few.norms[:, None] * few_form.scores
            extra = _first_bias(b_E, logits, scale, few, kind, form.place)
            logits, extra = (logits + extra, torch.zeros_like(extra)) if form.place == "logit" else (logits, extra)
            p = _probabilities(logits, kind)
            ids = _select(p + extra, options)
            # Without a bias of p its order is that of the logits, but where p saturates.
            saturated = 0.0 if form.place == "score" else 1 - _overlap(ids, _select(logits, options))
            gates = _gates(p, ids, options._replace(scaling=1.0))
            tried.append((saturated > allowed, _gate_error(few, ids, gates), scale, form))
    # Saturation is chosen only where nothing else is left.
    _, _, scale, form = min(tried, key=lambda one: one[:2])
    logits = scale * text.norms[:, None] * form.scores
    extra = _first_bias(b_E, logits, scale, text, kind, form.place)
    if form.place == "score":
        extra = _refined(extra, _probabilities(logits, kind), text, options)
    linear = _linear(form.rows * scale, extra if bias == "logit" else None)
    return VanillaGate(linear, extra if bias == "score" else None, kind, options, scale)


def _forms(router: KMeansRouter, text: Sample, few: Sample, kind: str, bias: str) -> list[tuple[_Form, ...]]:
    """The forms to be tried, each with its scores on all of the text and on few of its tokens."""
    directions = router.directions()
    b_E = router.expert_bias
    biased = bool((b_E != 0).any())
    # v makes the sum over e of v_e s_te as near to 1 as it gets: along the row v_e d_e all hidden states look alike.
    s = text.scores.double()
    ridge = 1e-6 * len(s) * torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
    v_E: Tensor = torch.linalg.solve(s.T @ s + ridge, s.sum(0)).float()

    def scores_along(part: Sample, row_E: Tensor) -> Tensor:
        return part.scores + row_E * (part.scores @ v_E)[:, None]

    place = bias if biased and bias in ("score", "logit") else "none"
    ways = [(torch.zeros_like(b_E), place)]
    if biased and bias in ("rows", "score"):
        ways.append((b_E, "none"))
    if biased and bias == "rows":
        ways.sort(key=lambda way: _overlap(_select(scores_along(text, way[0]), router.options), text.ids))
        del ways[0]
    # What all rows share changes no order of the logits. It brings them to where a sigmoid is an exponential, and its
    # normalised values are those of a softmax.
    top = float(text.scores.amax(1).mean())
    forms = []
    for shift in (0.0, 1.0, 2.0) if kind == "sigmoid" else (0.0,):
        for row, where in ways:
            along = row - shift * max(top, 0.0)
            rows = directions + along[:, None] * (v_E @ directions)
            forms.append(tuple(_Form(rows, scores_along(part, along), where) for part in (text, few)))
    return forms


def _gate_error(text: Sample, ids: Tensor, gates: Tensor) -> float:
    """Mean over tokens of half the sum over experts of |g - g'|: wrong choices and wrong gates in one number."""
    dense = torch.zeros_like(text.scores).scatter_(1, ids, gates).scatter_add_(1, text.ids, -text.gates)
    return float(dense.abs().sum(1).mean()) / 2


def _first_bias(b_E: Tensor, logits: Tensor, scale: float, text: Sample, kind: str, bias: str) -> Tensor:
    """The bias in units of the logits, or of p by its mean slope at the last expert chosen. (E,)."""
    if bias == "logit":
        return b_E * scale * text.norms.mean()
    if bias != "score":
        return torch.zeros_like(b_E)
    p_last = _probabilities(logits, kind).gather(1, text.ids[:, -1:]).squeeze(1)
    return b_E * (scale * text.norms * p_last * (1 - p_last)).mean()


def _refined(bias: Tensor, p: Tensor, text: Sample, options: RouteOptions) -> Tensor:
    """Of several sizes of the bias, then of small steps towards the loads of K-Means, the one of most overlap."""
    wanted = torch.bincount(text.ids.flatten(), minlength=p.shape[1])

    def overlap(one: Tensor) -> float:
        return _overlap(_select(p + one, options), text.ids)

    best = max((bias * size for size in (1.0, 0.5, 0.7, 0.85, 1.2, 1.5, 2.0)), key=overlap)
    most, now = overlap(best), best
    for step in range(REFINEMENTS):
        load = torch.bincount(_select(p + now, options).flatten(), minlength=p.shape[1])
        now = now + (wanted - load) / wanted.clamp_min(1) * best.abs().max() * 0.3 * 0.9**step
        if overlap(now) > most:
            best, most = now, overlap(now)
    return best


def _probabilities(logits: Tensor, kind: str) -> Tensor:
    return logits.softmax(1) if kind == "softmax" else logits.sigmoid()


def _select(ranking: Tensor, options: RouteOptions) -> Tensor:
    if options.grouped:
        ranking = ranking.masked_fill(~reference.candidates_reference(ranking, options), -torch.inf)
    return reference.stable_topk(ranking, options.top_k)


def _gates(p: Tensor, ids: Tensor, options: RouteOptions) -> Tensor:
    selected = p.gather(1, ids)
    if options.normalize:
        selected = selected / selected.sum(1, keepdim=True)
    return selected * options.scaling


def _overlap(one: Tensor, other: Tensor) -> float:
    """Mean share of a token's experts that both choose."""
    return float((one[:, :, None] == other[:, None, :]).sum()) / one.numel()


def _places(
    target: nn.Module, routers: Mapping[str, KMeansRouter], kind: str, bias: str
) -> dict[str, LearnedRouter | nn.Linear]:
    modules = dict(target.named_modules())
    places: dict[str, LearnedRouter | nn.Linear] = {}
    for name, router in routers.items():
        place = modules.get(name)
        if not isinstance(place, (LearnedRouter, nn.Linear)):
            raise TypeError(
                f"target must have a LearnedRouter or an nn.Linear as {name!r}, got {type(place).__name__}: replace "
                "the K-Means routers of the copy, or leave target out and take the gates"
            )
        if place.weight.shape != router.weight.shape:
            raise ValueError(
                f"target's {name!r} must have a weight {tuple(router.weight.shape)}, got {tuple(place.weight.shape)}: "
                "give it as many experts and the same hidden size"
            )
        if isinstance(place, LearnedRouter):
            has_place = bias in ("none", "rows") or (bias == "score" and place.balance in ("sign", "quantile"))
            want = router.options._replace(gate="softmax", tau=place.options.tau, normalize=True)
            if place.kind != kind or place.options != want or not has_place:
                raise ValueError(
                    f"target's {name!r} must be of kind {kind!r} with top_k={router.top_k}, scaling="
                    f"{want.scaling:g}, no groups and a place for bias={bias!r}, got {place} with scaling="
                    f"{place.scaling:g}: choose kind and bias as the target has them"
                )
        elif bias == "score" or (bias == "logit") != (place.bias is not None):
            raise ValueError(
                f"target's {name!r} must have a place for bias={bias!r}, got {place}: choose bias as the target has it"
            )
        places[name] = place
    return places


def _put(place: LearnedRouter | nn.Linear, gate: VanillaGate) -> None:
    place.weight.copy_(gate.linear.weight)
    if isinstance(place, LearnedRouter):
        place.expert_bias.zero_()
        if gate.score_bias is not None:
            place.expert_bias.copy_(gate.score_bias)
    elif place.bias is not None:
        place.bias.zero_()
        if gate.linear.bias is not None:
            place.bias.copy_(gate.linear.bias)
