"""The K-Means router: centroids as buffers, routing in forward, learning in commit.

Source of the method: arXiv 2605.12476 (Ahrac, Hochwald, Geva 2026).
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from kmeans_route import backends, ops, reference
from kmeans_route.checks import (
    ACCUMULATES,
    MAX_FACTOR,
    check_bias,
    check_choice,
    check_option_names,
    check_range,
    check_route_options,
    default_directions,
    default_tau,
)
from kmeans_route.routing.base import called, checks_option_names, option_names
from kmeans_route.routing.commit import CentroidCommit, point
from kmeans_route.types import CommitOptions, Dispatch, Replay, Routed, Routing, Statistics, Tokens, Wanted

AVERAGES = ("ema", "cumulative")
BALANCES = ("proportional", "sign", "quantile", "none")
INITS = ("tokens", "normal")
DIRECTIONS = ("centroids", "whitened")
BIAS_RATES = {"proportional": 0.05, "sign": 0.001, "quantile": 0.1, "none": 0.0}


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class KMeansRouter(CentroidCommit):
    """Route each hidden state to the top_k experts whose running-average centroids have the largest cosine with it.

    No parameters (but see learned_offset): a training forward gathers statistics, and `commit` (once per optimizer
    step, see `kmeans_route.attach`) moves the centroids and the balance bias. All state is fp32, however the model is
    cast. Two buffers (E, D): `weight`, the directions that score, and `centroids`, the averages, zero until there is
    data. A forward routes by `weight` as it is at that moment, whoever wrote it; a commit writes it from `centroids`.

    Args:
        hidden_size: D, at least 1.
        num_experts: E, at least 1.
        top_k: K, experts a token, in [1, E].
        decay: of the running average, in [0, 1): beta = min(decay, steps / (steps + 1)), a plain mean at first.
        average: "ema", or "cumulative", the mean over all tokens ever seen: it stops following a drifting model.
        accumulate: "unit" averages x_t / ||x_t||, "raw" averages x_t.
        balance: how the selection bias learns: "proportional" to the excess load in units of the score's spread,
            "sign" (the paper's), "quantile" (Kimi K3 report 2.3.3), or "none".
        bias_rate: step of that rule, in [0, 1e30); None for 0.05 (proportional), 0.001 (sign), 0.1 (quantile). Where a
            commit has fewer than about 100 tokens an expert, 0.015 (proportional) leaves half of the imbalance, and
            takes twice as long to follow a change.
        directions: how a commit writes `weight`: "centroids", their directions (the paper's), or "whitened", their
            differences from the mean of all, decorrelated (`reference.whitened_reference`). With top_k > 1 plain
            averages drift to the first principal axis and experts become one; whitened ones stay apart. None for
            "whitened" with top_k > 1, for "centroids" with 1.
        tau: temperature of the gates, at least 1e-6; None for 0.2 with directions="centroids", for 0.1 with "whitened",
            about one standard deviation of the scores.
        gate, normalize, scaling, n_group, topk_group, group_score: as in `kmeans_route.route`.
        init: how the first commit sets the centroids: "tokens" (about where the token lies that is farthest along a
            random direction, see `backends.first`), or "normal" (the first averages over Gaussian directions). Until
            then 2 E D fp64 are kept for "tokens"; for 58 layers of E = 256, D = 7168 that is 1.7 GB.
        detach_gates: stop the gradient from the gates to x.
        learned_offset: add a parameter `offset` (E, D), zero at first and trained through the gates, to the unit
            centroids: tokens are scored with unit rows of the sum, averages are gathered as ever. Weight decay pulls
            a direction back to its centroid. In the optimizer like any other parameter, in the model's dtype.
        return_scores: fill `scores` in the output.
        seed, name: seed of the router's private generator; give each layer its own name.
        backend: "auto", "torch", "triton" or "reference".
        device: where the state is made; "meta" for a later `to_empty` and `reset_parameters`.

    Shape:
        x: (..., D), tokens of norm below 1e-15 or not finite are left out. weights, indices: (T, K). scores: (T, E).

    Copies (deepcopy, pickle, AveragedModel) are not attached. `torch.optim.swa_utils.AveragedModel` with its default
    use_buffers=False takes over the latest state at each update, which is an average in itself: the one to evaluate
    with. With use_buffers=True it averages averages, and an EMA rounds `steps` down. `torch.export` is for eval mode.

    After the first data no tensor of the state moves in forward, backward, commit or a load of such state, so that CUDA
    graphs may hold them; resetting and moving the router make new ones.

    Raises:
        ValueError, TypeError: an option or a tensor is out of its range, see the message.

    Example:
        >>> import torch, kmeans_route
        >>> router = kmeans_route.KMeansRouter(hidden_size=16, num_experts=4, top_k=2)
        >>> weights, indices, _ = router.eval()(torch.randn(2, 5, 16))
        >>> weights.shape, indices.shape
        (torch.Size([10, 2]), torch.Size([10, 2]))
    """

    @checks_option_names
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        decay: float = 0.999,
        average: str = "ema",
        accumulate: str = "unit",
        balance: str = "proportional",
        bias_rate: float | None = None,
        directions: str | None = None,
        gate: str = "softmax",
        tau: float | None = None,
        normalize: bool = True,
        scaling: float = 1.0,
        n_group: int | None = None,
        topk_group: int | None = None,
        group_score: str = "top2",
        init: str = "tokens",
        detach_gates: bool = False,
        learned_offset: bool = False,
        return_scores: bool = False,
        seed: int = 0,
        name: str = "",
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("average", average, AVERAGES)
        check_choice("accumulate", accumulate, ACCUMULATES)
        check_choice("balance", balance, BALANCES)
        check_choice("init", init, INITS)
        directions = default_directions(top_k) if directions is None else directions
        check_choice("directions", directions, DIRECTIONS)
        tau = default_tau(directions) if tau is None else tau
        check_range("decay", decay, 0.0, 1.0)
        bias_rate = BIAS_RATES[balance] if bias_rate is None else bias_rate
        check_range("bias_rate", bias_rate, 0.0, MAX_FACTOR)
        super().__init__(hidden_size, num_experts, seed=seed, name=name)
        self.options = check_route_options(
            num_experts, top_k, gate=gate, tau=tau, normalize=normalize, scaling=scaling, n_group=n_group,
            topk_group=topk_group, group_score=group_score,
        )  # fmt: skip
        self.top_k = top_k
        self.average, self.accumulate, self.init = average, accumulate, init
        self.detach_gates, self.return_scores = detach_gates, return_scores
        self.commit_options = CommitOptions(top_k, decay, average, balance, bias_rate, directions)
        self._check_together(gate, learned_offset=learned_offset)
        self.backend = backend
        self.replayed: Replay | None = None
        self._has_replayed = False
        # The name, whether Triton is there, the number of experts; the device comes with x.
        backends.choose(backend, torch.device("cuda"), num_experts=num_experts)
        self._make_state(device, cumulative=average == "cumulative", learned_offset=learned_offset)

    @classmethod
    def from_linear(cls, gate: nn.Module | Tensor, top_k: int, /, **options: Any) -> Self:
        """A router whose first directions are the rows of a learned gate.

        Lengths of rows and biases are left out, since a cosine has no place for them: how often the two then choose
        alike, `kmeans_route.calibrate` measures. `directions` is "centroids" unless named: the first commit of
        whitened ones turns the rows away from the gate's.

        Args:
            gate: nn.Linear, `LearnedRouter`, anything else with a weight (E, D), or that tensor.
            top_k: K, in [1, E].
            options: anything else that the router takes; device is the gate's unless named.

        Raises:
            TypeError: gate has no weight. ValueError: a weight that is no matrix, or a row that is zero or not finite.
        """
        weight = gate if isinstance(gate, Tensor) else getattr(gate, "weight", None)
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"gate must be an (E, D) tensor or have one as its weight, got {type(gate).__name__}: pass an "
                "nn.Linear, a LearnedRouter or a tensor"
            )
        if weight.dim() != 2:
            raise ValueError(f"gate must have a weight (E, D), got {tuple(weight.shape)}: one row an expert")
        check_option_names(f"{cls.__name__}.from_linear", options, option_names(cls))
        options = {"device": weight.device, "directions": "centroids", **options}
        router = cls(weight.shape[1], weight.shape[0], top_k, **options)
        router.set_centroids(weight)
        return router

    def extra_repr(self) -> str:
        """The options that matter, as the constructor names them."""
        o, c = self.options, self.commit_options
        groups = f", n_group={o.n_group}, topk_group={o.topk_group}" if o.grouped else ""
        groups += "" if self.offset is None else ", learned_offset=True"
        name = f", name={self.name!r}" if self.name else ""
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"directions={c.directions!r}, gate={o.gate!r}, tau={o.tau:g}, balance={c.balance!r}, "
            f"bias_rate={c.bias_rate:g}, decay={c.decay:g}, average={c.average!r}, init={self.init!r}{groups}{name}"
        )

    def _check_together(self, gate: str, *, learned_offset: bool) -> None:
        """Options that exclude each other."""
        candidates = self.options.topk_group * self.num_experts // self.options.n_group
        if self.want_hist and candidates == self.top_k:
            raise ValueError(
                f"balance='quantile' must have more candidates than top_k={self.top_k}, got {candidates}: raise "
                "topk_group or choose another balance"
            )
        if learned_offset and (self.detach_gates or gate == "uniform"):
            raise ValueError(
                "learned_offset must have gates that it can learn from, got it with "
                f"{'detach_gates=True' if self.detach_gates else 'gate=' + repr(gate)}: leave one of the two out"
            )

    def route(
        self,
        x: Tensor | Tokens,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        count_mask: Tensor | None = None,
        expert_bias: Tensor | None = None,
        gather: bool = False,
    ) -> Routing:
        """Route x with the state as it is: see `StatefulRouter.route`.

        Args:
            expert_bias: (E,) fp32 selection bias in place of the router's own, of a block that balances by itself.
        """
        tokens = self.enter(x, mask, indices, count_mask)
        gather = gather and self.counts_now()
        scored = tokens._replace(x=tokens.x.detach()) if self.detach_gates else tokens
        bias = self.expert_bias if expert_bias is None else self._check_bias(expert_bias)
        directions = self._directions(tokens.x.dtype, tokens.backend)
        routed = ops.route(scored, directions, bias, self.options, self._wanted(gather))
        if gather:
            self._gather(tokens, routed, None)
        return self._tell(tokens, routed.routing(want_scores=self.return_scores))

    def route_dispatch(
        self,
        x: Tensor | Tokens,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        count_mask: Tensor | None = None,
        expert_bias: Tensor | None = None,
        gather: bool = False,
    ) -> tuple[Routing, Dispatch]:
        """`route`, and the hidden states in expert order; on the Triton backend one operator with one backward pass."""
        tokens = self.enter(x, mask, indices, count_mask)
        gather = gather and self.counts_now()
        bias = self.expert_bias if expert_bias is None else self._check_bias(expert_bias)
        directions = self._directions(tokens.x.dtype, tokens.backend)
        routed, sent, partials = ops.route_dispatch(
            tokens, directions, bias, self.options, self._wanted(gather), self.accumulate if gather else ""
        )
        if gather:
            self._gather(tokens, routed, partials)
        routing = routed.routing(want_scores=self.return_scores)
        if self.detach_gates:
            routing = routing._replace(
                weights=routing.weights.detach(),
                selected_scores=routing.selected_scores.detach(),
                scores=None if routing.scores is None else routing.scores.detach(),
            )
        return self._tell(tokens, routing), sent

    def enter(
        self,
        x: Tensor | Tokens,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        count_mask: Tensor | None = None,
    ) -> Tokens:
        """See `StatefulRouter.enter`; inside `kmeans_route.replay` the ids are those it was given."""
        tokens = super().enter(x, mask, indices, count_mask)
        if self.replayed is None and not self._has_replayed:
            return tokens
        return self._replay(tokens)

    def _replay(self, tokens: Tokens) -> Tokens:
        recomputes = not torch.compiler.is_compiling() and ops.in_backward()
        if self.replayed is None:
            if recomputes:
                raise RuntimeError(
                    f"{called(self)} must recompute inside of the replay that its forward had, got a backward "
                    "pass after its end: open kmeans_route.replay around forward and backward"
                )
            self._has_replayed = False
            return tokens
        self._has_replayed = True
        ids = self.replayed.ids
        if ids.shape[0] != tokens.x.shape[0]:
            raise ValueError(
                f"ids of {called(self)} must have a row for each of the {tokens.x.shape[0]} tokens, got "
                f"{ids.shape[0]}: open kmeans_route.replay for each micro-batch"
            )
        return tokens if tokens.indices is not None else tokens._replace(indices=ids)

    def counts_now(self) -> bool:
        """See `StatefulRouter.counts_now`; `kmeans_route.replay` may leave its forwards out."""
        return super().counts_now() and (self.replayed is None or self.replayed.counts)

    def _wanted(self, gather: bool) -> Wanted:
        return Wanted(self.return_scores, gather, gather and self.want_hist)

    def _check_bias(self, given: Tensor) -> Tensor:
        check_bias(given, self.num_experts, self.weight.device, "the router's state")
        return given

    def _gather(self, tokens: Tokens, routed: Routed, partials: Tensor | None) -> None:
        p, unit = self.pending, self.accumulate == "unit"
        assert routed.score_std is not None, "gathered routings have statistics"
        counted, loads = routed.valid, routed.tokens_per_expert
        if tokens.count_mask is not None and routed.counted is not None:
            counted, loads = counted & tokens.count_mask, routed.counted
        batch = Statistics(loads, routed.score_std, routed.margin_hist, routed.num_dropped)
        ops.accumulate(
            tokens.x, routed.indices, routed.inv_norm if unit else None, counted, partials, batch, p.statistics,
            p.pairs if self.top_k > 1 else None, tokens.backend,
        )  # fmt: skip
        if p.moments.numel():
            factor = routed.inv_norm.detach() if unit else counted.float()
            ops.first_moments(tokens.x.detach(), factor, counted, self.weight, p.moments)

    def directions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(E, D): what hidden states of `dtype` are scored with, unit rows of `weight` with the learned offset."""
        backend = backends.choose("auto", self.weight.device, dtype, self.num_experts)
        rows = self._directions(dtype, backend).detach()
        return rows.clone() if self.frozen else rows  # those that are pinned are not the caller's to write

    def _directions(self, dtype: torch.dtype, backend: Any) -> Tensor:
        if self.offset is None:
            return self._unit_rows(dtype, backend)
        unit = self._unit_rows(reference.compute_dtype(dtype), backend)
        return reference.shifted_directions(unit, self.offset, dtype)

    def _unit_rows(self, dtype: torch.dtype, backend: Any) -> Tensor:
        """Unit rows of `weight` as it is now, whoever wrote it; of a frozen router those that are pinned.

        Nothing tells for certain that a buffer was written: not its address, which memory of another use may take, and
        not its version, which `.data`, collectives and other processes leave alone.
        """
        weight = self.weight
        if not self.frozen or torch.compiler.is_compiling() or ops.traced() or _is_capturing(weight.device):
            return ops.directions(weight, dtype, backend)
        whose, pinned = self._pinned.get(dtype, (None, weight))
        if whose is not weight:  # functional_call, for one, puts another tensor in its place
            with torch.inference_mode(False), torch.no_grad():  # autograd may want what is kept
                pinned = ops.directions(weight.clone() if weight.is_inference() else weight, dtype, backend)
            self._pinned[dtype] = (weight, pinned)
        return pinned

    def freeze(self, frozen: bool = True) -> Self:
        """Stop (or with False, resume) gathering and committing, and pin the directions, as for serving.

        The first forward after it in each dtype keeps what it scores with, so that routing in eval is two launches.
        After a write into `weight` by anybody but this class, `load_state_dict` or a move of the module, call it again.
        """
        self._pinned = {}
        super().freeze(frozen)
        return self

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the centroids from the tokens of x (..., D) now, instead of at the first commit.

        With init="normal" they come from one step of averaging over x. What was pending is dropped, and steps, bias,
        score scale and a learned offset start anew.

        Raises:
            ValueError: no token of x is valid.
        """
        tokens = self.enter(x, mask)
        if not bool(reference.validity_reference(tokens.x, tokens.mask).any()):
            raise ValueError("x must hold at least one valid token, got none: check the mask and for NaN or zero rows")
        self.reset_parameters()
        directions = self._directions(tokens.x.dtype, tokens.backend)
        routed = ops.route(tokens, directions, self.expert_bias, self.options, self._wanted(gather=True))
        self._gather(tokens, routed, None)
        self.commit_pending()
        point([self])
