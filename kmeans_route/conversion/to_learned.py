"""The way back: linear gates, as ordinary mixtures have them, that choose as K-Means routers do."""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kmeans_route.checks import check_choice, check_module, check_range
from kmeans_route.conversion import compare as agreement
from kmeans_route.conversion.compare import Comparison, Forward, Seen, Tick, select, shared_choices, watch
from kmeans_route.reference import product
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.routing.learned import KINDS, LearnedRouter
from kmeans_route.types import RouteOptions

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
        ids = select(p if self.score_bias is None else p + self.score_bias, self.options)
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
        kind: "softmax" (Mixtral) or "sigmoid" (DeepSeek-V3) of the logits.
        bias: where the selection bias goes. "rows": there is no place, so it is folded into the rows along the
            direction that all hidden states share, kept where that gives the greater overlap of the choices. "score":
            added to p for selection only (DeepSeek-V3's e_score_correction_bias, `LearnedRouter` with balance "sign"
            or "quantile") and fitted to the greatest overlap, or left 0 and folded into the rows where that makes the
            smaller gate error. "logit": added to the logits, so to the gates as well (GPT-OSS). "none": lost.
        held_out, forward, progress: as in `calibrate`.

    Returns:
        Export: the gates, and how far they agree with the K-Means routers.

    Raises:
        ValueError, TypeError: a model, batches, a target or an option that do not fit; the target is then as before.
    """
    check_module("model", model)
    check_choice("kind", kind, KINDS)
    check_choice("bias", bias, BIASES)
    routers = agreement.kmeans_routers(model)
    if not routers:
        raise ValueError(f"model must contain at least one KMeansRouter, got none in {type(model).__name__}")
    places = {} if target is None else _places(target, routers, kind, bias)
    held, reported = agreement.reread(batches, held_out)
    total = len(held) + len(reported) * (1 if target is None else 2)
    with agreement.ticking(forward, progress, "exporting", total) as run, torch.no_grad(), ExitStack() as on_error:
        gates = fit_gates(model, routers, held, kind, bias, run)
        for name, place in places.items():
            for tensor in place:
                if tensor is not None:
                    on_error.callback(tensor.copy_, tensor.clone())
            write_gate(gates[name], *place)
        choose = {name: gate.choose for name, gate in gates.items()}
        watched = agreement.to_watch(routers)
        comparison = agreement.compare(model, watched, choose, reported, forward=run, target=target)
        on_error.pop_all()
    return Export(gates, comparison)


def _places(
    target: nn.Module, routers: Mapping[str, KMeansRouter], kind: str, bias: str
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of the gates that a target has, by the names of the routers."""
    modules = agreement.modules_of(target)
    places: dict[str, tuple[Tensor, Tensor | None]] = {}
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
        if isinstance(place, nn.Linear):
            if bias == "score" or (bias == "logit") != (place.bias is not None):
                raise ValueError(
                    f"target's {name!r} must have a place for bias={bias!r}, got {place}: choose bias as the target "
                    "has it"
                )
            places[name] = (place.weight, place.bias)
            continue
        has_place = bias in ("none", "rows") or (bias == "score" and place.balance in ("sign", "quantile"))
        want = router.options._replace(gate="softmax", tau=place.options.tau, normalize=True)
        if place.kind != kind or place.options != want or not has_place:
            raise ValueError(
                f"target's {name!r} must be of kind {kind!r} with top_k={router.top_k}, scaling={want.scaling:g}, no "
                f"groups and a place for bias={bias!r}, got {place} with scaling={place.scaling:g}: choose kind and "
                "bias as the target has them"
            )
        places[name] = (place.weight, place.expert_bias)
    return places


def write_gate(gate: VanillaGate, weight: Tensor, bias: Tensor | None) -> None:
    """Write a gate where a model has its own: weight (E, D) and E values of bias, 0 where the gate has none."""
    weight.copy_(gate.linear.weight)
    if bias is not None:
        own: Tensor | None = gate.linear.bias if gate.score_bias is None else gate.score_bias
        bias.copy_(torch.zeros_like(bias) if own is None else own.view_as(bias))


class Sample(NamedTuple):
    """Tokens to fit on: scores (N, E), norms (N,) of the hidden states, ids (N, K), gates (N, K) without scaling."""

    scores: Tensor
    norms: Tensor
    ids: Tensor
    gates: Tensor

    def thinned(self, limit: int) -> "Sample":
        """At most `limit` of them, evenly."""
        return Sample(*(part[:: math.ceil(len(self.ids) / limit)] for part in self))


def fit_gates(
    model: nn.Module,
    routers: Mapping[str, KMeansRouter],
    batches: Iterable[Any],
    kind: str,
    bias: str,
    forward: Forward,
) -> dict[str, VanillaGate]:
    """The gates of `export_gates`, from one pass over the batches."""
    parts: dict[str, list[Sample]] = {name: [] for name in routers}

    def add(name: str, seen: Seen) -> None:
        routing = agreement.replay(routers[name], seen)
        assert routing.scores is not None
        gates = seen.weights.float() / routers[name].options.scaling
        parts[name].append(Sample(routing.scores.float(), 1 / routing.inv_norm.float(), routing.indices, gates))

    watch(model, agreement.to_watch(routers), batches, add, forward)
    texts = {name: Sample(*map(torch.cat, zip(*part, strict=True))) for name, part in parts.items()}
    return {name: fit_gate(routers[name], text.thinned(MAX_FIT_TOKENS), kind, bias) for name, text in texts.items()}


class _Form(NamedTuple):
    """A way to write the rows, direction_e + along_e * (v @ directions), and where the selection bias goes then.

    Their unit of length is still free.
    """

    along_E: Tensor
    v_E: Tensor
    place: str

    def of(self, values: Tensor) -> Tensor:
        """(..., E): what the rows have where directions have these values."""
        return values + self.along_E * product(values, self.v_E)[..., None]


def fit_gate(router: KMeansRouter, text: Sample, kind: str, bias: str) -> VanillaGate:
    """The gate of one router; see `export_gates`."""
    b_E, options = router.expert_bias, router.options
    few = text.thinned(MAX_GRID_TOKENS)
    unit = 1 / (options.tau * float(text.norms.mean()))
    allowed = MAX_SATURATED if bool((b_E != 0).any()) else 0.0
    tried: list[tuple[bool, float, float, _Form]] = []
    for form in _forms(router, text, kind, bias):
        scores = form.of(few.scores)
        for scale in (factor * unit for factor in SCALES):
            logits = scale * few.norms[:, None] * scores
            extra = _first_bias(b_E, logits, scale, few, kind, form.place)
            if form.place == "logit":
                logits, extra = logits + extra, torch.zeros_like(extra)
            p = _probabilities(logits, kind)
            ids = select(p + extra, options)
            # Without a bias of p its order is that of the logits, but where p saturates.
            lost = 0.0 if form.place == "score" else 1 - shared_choices(ids, select(logits, options)) / len(ids)
            gates = _gates(p, ids, options._replace(scaling=1.0))
            error = agreement.gate_error(router.num_experts, few.ids, few.gates, ids, gates)
            tried.append((lost > allowed, error, scale, form))
    # Saturation is chosen only where nothing else is left.
    _, _, scale, form = min(tried, key=lambda one: one[:2])
    logits = scale * text.norms[:, None] * form.of(text.scores)
    extra = _first_bias(b_E, logits, scale, text, kind, form.place)
    if form.place == "score":
        extra = _refined(extra, _probabilities(logits, kind), text, options)
    linear = _linear(form.of(router.directions().T).T * scale, extra if bias == "logit" else None)
    return VanillaGate(linear, extra if bias == "score" else None, kind, options, scale)


def _forms(router: KMeansRouter, text: Sample, kind: str, bias: str) -> list[_Form]:
    """The forms to be tried."""
    s, b_E = text.scores.double(), router.expert_bias
    # v makes the sum over e of v_e s_te as near to 1 as it gets: along the row v_e d_e all hidden states look alike.
    ridge = 1e-6 * len(s) * torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
    v_E = torch.linalg.solve(s.T @ s + ridge, s.sum(0)).float()
    plain, folded = _Form(torch.zeros_like(b_E), v_E, "none"), _Form(b_E, v_E, "none")

    def overlap(form: _Form) -> float:
        return shared_choices(select(form.of(text.scores), router.options), text.ids)

    if not bool((b_E != 0).any()):
        forms = [plain]
    elif bias == "rows":
        forms = [max(folded, plain, key=overlap)]
    else:
        forms = [plain._replace(place=bias), *([folded] if bias == "score" else [])]
    # What all rows share changes no order of the logits. It brings them to where a sigmoid is an exponential, and its
    # normalised values are those of a softmax.
    top = max(float(text.scores.amax(1).mean()), 0.0)
    shifts = (0.0, 1.0, 2.0) if kind == "sigmoid" else (0.0,)
    return [form._replace(along_E=form.along_E - shift * top) for shift in shifts for form in forms]


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
        return shared_choices(select(p + one, options), text.ids)

    best = now = max((bias * size for size in (1.0, 0.5, 0.7, 0.85, 1.2, 1.5, 2.0)), key=overlap)
    most = overlap(best)
    for step in range(REFINEMENTS):
        load = torch.bincount(select(p + now, options).flatten(), minlength=p.shape[1])
        now = now + (wanted - load) / wanted.clamp_min(1) * best.abs().max() * 0.3 * 0.9**step
        if overlap(now) > most:
            best, most = now, overlap(now)
    return best


def _probabilities(logits: Tensor, kind: str) -> Tensor:
    return logits.softmax(1) if kind == "softmax" else logits.sigmoid()


def _gates(p: Tensor, ids: Tensor, options: RouteOptions) -> Tensor:
    selected = p.gather(1, ids)
    if options.normalize:
        selected = selected / selected.sum(1, keepdim=True)
    return selected * options.scaling
