"""The K-Means router: centroids as buffers, routing in forward, learning in commit.

Source of the method: arXiv 2605.12476 (Ahrac, Hochwald, Geva 2026).
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from kmeans_route import metrics, ops, reference
from kmeans_route.checks import (
    ACCUMULATES,
    DEFAULT_TAU,
    check_choice,
    check_device,
    check_index_values,
    check_indices,
    check_positive_int,
    check_range,
    check_route_options,
    flatten_hidden_states,
    flatten_mask,
)
from kmeans_route.functional import choose_backend, directions, directions_for, dispatch, route_checked
from kmeans_route.reservoir import EMPTY_HASH, kmeans_pp
from kmeans_route.state import Pending, StatefulRouter, seed_for
from kmeans_route.types import Dispatch, RouterOutput, Routing

AVERAGES = ("ema", "cumulative")
BALANCES = ("proportional", "sign", "quantile", "none")
INITS = ("tokens", "kmeans++", "normal")
BIAS_RATES = {"proportional": 0.05, "sign": 0.001, "quantile": 0.1, "none": 0.0}


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class KMeansRouter(StatefulRouter):
    """Route each hidden state to the top_k experts whose running-average centroids have the largest cosine with it.

    No parameters (but see learned_offset): a training forward gathers statistics, and `commit` (once per optimizer
    step, see `kmeans_route.attach`) moves the centroids and the balance bias. All state is fp32, however the model is
    cast.

    Args:
        hidden_size: D, at least 1.
        num_experts: E, at least 1.
        top_k: K, experts a token, in [1, E].
        decay: of the running average, in [0, 1): beta = min(decay, steps / (steps + 1)), a plain mean at first.
        average: "ema", or "cumulative", the mean over all tokens ever seen: it stops following a drifting model.
        accumulate: "unit" averages x_t / ||x_t||, "raw" averages x_t.
        balance: how the selection bias learns: "proportional" to the excess load in units of the score's spread,
            "sign" (the paper's), "quantile" (Kimi K3 report 2.3.3), or "none".
        bias_rate: step of that rule, >= 0; None for 0.05 (proportional), 0.001 (sign), 0.1 (quantile). Where a commit
            has fewer than about 100 tokens an expert, 0.015 (proportional) leaves half of the imbalance, and takes
            twice as long to follow a change.
        gate, tau, normalize, scaling, n_group, topk_group, group_score: as in `kmeans_route.route`.
        init: how the first commit sets the centroids: "tokens" (E hidden states), "kmeans++" (on 16 E of them), or
            "normal" (Gaussian directions, moved by the first averages).
        detach_gates: stop the gradient from the gates to x.
        learned_offset: add a parameter `offset` (E, D), zero at first and trained through the gates, to the unit
            centroids: tokens are scored with unit rows of the sum, averages are gathered as ever. Weight decay pulls
            a direction back to its centroid. In the optimizer like any other parameter, in the model's dtype.
        return_scores: fill `scores` in the output.
        seed, name: seed of the router's private generator; give each layer its own name.
        backend: "auto", "torch", "triton" or "reference".
        device: where the state is made; "meta" for a later `to_empty` and `reset_parameters`.

    Shape:
        x: (..., D). weights, indices: (T, K), T the product of the leading dimensions. scores: (T, E).

    Copies (deepcopy, pickle, AveragedModel) are not attached. `torch.optim.swa_utils.AveragedModel` with its default
    use_buffers=False takes over the latest state at each update, which is an average in itself: the one to evaluate
    with. With use_buffers=True it averages averages: an EMA rounds `steps` down, and PyTorch's own SWA rule refuses the
    bool `initialized`. `torch.export` is for eval mode.

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

    weight: Tensor
    offset: nn.Parameter | None
    score_std: Tensor
    dropped_total: Tensor
    steps: Tensor
    initialized: Tensor
    unsaved: Tensor
    tokens_seen: Tensor | None
    FP32_STATE = ("weight", "expert_bias", "score_std")
    PLAIN_TENSORS = ("tokens_per_expert", "centroid_turn")

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
        gate: str = "softmax",
        tau: float = DEFAULT_TAU,
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
        check_positive_int("hidden_size", hidden_size)
        check_positive_int("num_experts", num_experts)
        check_choice("average", average, AVERAGES)
        check_choice("accumulate", accumulate, ACCUMULATES)
        check_choice("balance", balance, BALANCES)
        check_choice("init", init, INITS)
        check_range("decay", decay, 0.0, 1.0)
        bias_rate = BIAS_RATES[balance] if bias_rate is None else bias_rate
        check_range("bias_rate", bias_rate, 0.0, math.inf)
        super().__init__(hidden_size, num_experts, seed=seed, name=name)
        self.options = check_route_options(
            num_experts,
            top_k,
            gate=gate,
            tau=tau,
            normalize=normalize,
            scaling=scaling,
            n_group=n_group,
            topk_group=topk_group,
            group_score=group_score,
        )
        self.top_k = top_k
        self.average, self.accumulate, self.init = average, accumulate, init
        self.detach_gates, self.return_scores = detach_gates, return_scores
        self.commit_options = reference.CommitOptions(top_k, decay, average, balance, bias_rate)
        self._want_hist = balance == "quantile" and top_k < num_experts
        candidates = self.options.topk_group * num_experts // self.options.n_group
        if self._want_hist and candidates == top_k:
            raise ValueError(
                f"balance='quantile' must have more candidates than top_k={top_k}, got {candidates}: raise topk_group "
                "or choose another balance"
            )
        if learned_offset and (detach_gates or gate == "uniform"):
            raise ValueError(
                "learned_offset must have gates that it can learn from, got it with "
                f"{'detach_gates=True' if detach_gates else 'gate=' + repr(gate)}: leave one of the two out"
            )
        self.backend = backend
        self._reservoir_seed = seed_for(seed, "reservoir")
        # The name, whether Triton is there, the number of experts; the device comes with x.
        choose_backend(backend, torch.device("cuda"), num_experts=num_experts)

        self.register_buffer("weight", torch.empty(num_experts, hidden_size, dtype=torch.float32, device=device))
        self.register_buffer("expert_bias", torch.empty(num_experts, dtype=torch.float32, device=device))
        self.register_buffer("score_std", torch.empty((), dtype=torch.float32, device=device))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64, device=device))
        self.register_buffer("dropped_total", torch.empty((), dtype=torch.int64, device=device))
        self.register_buffer("initialized", torch.empty((), dtype=torch.bool, device=device))
        self.register_buffer("unsaved", torch.empty((), dtype=torch.bool, device=device), persistent=False)
        seen = torch.empty(num_experts, dtype=torch.int64, device=device) if average == "cumulative" else None
        self.register_buffer("tokens_seen", seen)
        shape = (num_experts, hidden_size)
        offset = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)) if learned_offset else None
        self.register_parameter("offset", offset)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, gate: nn.Module | Tensor, top_k: int, /, **options: Any) -> Self:
        """A router whose first directions are the rows of a learned gate.

        Lengths of rows and biases are left out, since a cosine has no place for them: how often the two then choose
        alike, `kmeans_route.calibrate` measures.

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
        router = cls(weight.shape[1], weight.shape[0], top_k, **{"device": weight.device, **options})
        router.set_centroids(weight)
        return router

    def reset_parameters(self) -> None:
        """Gaussian unit rows from the private generator, no bias, no offset, nothing pending. After `to_empty`, too."""
        self._initialized = False
        self._cached: tuple[tuple[int, int, torch.dtype], Tensor] | None = None
        self._seen: tuple[int, int] | None = None
        self._new_pending()
        self.centroid_turn = torch.zeros(2, self.num_experts, dtype=torch.float32, device=self.weight.device)
        if self.weight.is_meta:
            return
        with torch.no_grad():
            rows = torch.randn(
                self.num_experts, self.hidden_size, generator=self._private_generator(), dtype=torch.float32
            )
            self.weight.copy_(rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True))
            for tensor in (
                self.expert_bias, self.score_std, self.steps, self.dropped_total, self.initialized, self.unsaved,
                self.tokens_seen, self.offset,
            ):  # fmt: skip
                if tensor is not None:
                    tensor.zero_()

    def _new_pending(self) -> None:
        self.pending = Pending(
            self.num_experts,
            self.hidden_size,
            self.weight.device,
            with_hist=self._want_hist,
            with_reservoir=not self._initialized and self.init != "normal",
        )
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=self.weight.device)

    def extra_repr(self) -> str:
        """The options that matter, as the constructor names them."""
        o, c = self.options, self.commit_options
        groups = f", n_group={o.n_group}, topk_group={o.topk_group}" if o.grouped else ""
        groups += "" if self.offset is None else ", learned_offset=True"
        name = f", name={self.name!r}" if self.name else ""
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, gate={o.gate!r}, "
            f"tau={o.tau:g}, balance={c.balance!r}, bias_rate={c.bias_rate:g}, decay={c.decay:g}, "
            f"average={c.average!r}, init={self.init!r}{groups}{name}"
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        expert_bias: Tensor | None = None,
        details: bool = False,
        with_dispatch: bool = False,
    ) -> RouterOutput | Routing | tuple[Routing, Dispatch]:
        """Route x, and in training gather its statistics.

        Args:
            x: hidden states (..., D), floating point.
            mask: bool, x.shape[:-1], false for padding.
            indices: (T, K) ids to replay.
            expert_bias: (E,) fp32 selection bias in place of the router's own, of a block that balances by itself.
            details: return the whole `Routing` (which `dispatch` and `combine` take) instead of `RouterOutput`.
            with_dispatch: return that and its `Dispatch`; on the Triton backend one operator with one backward pass.
        """
        if with_dispatch:
            return self._route_dispatch(x, mask, indices, expert_bias)
        routing = self._route(x, mask, indices, expert_bias, gather=self.counts_now())
        if details:
            return routing
        return RouterOutput(routing.weights, routing.indices, routing.scores)

    def route(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        expert_bias: Tensor | None = None,
    ) -> Routing:
        """Route x with the state as it is and gather nothing, in training too."""
        return self._route(x, mask, indices, expert_bias, gather=False)

    def _bias(self, given: Tensor | None) -> Tensor:
        if given is None:
            return self.expert_bias
        if tuple(given.shape) != (self.num_experts,):
            raise ValueError(
                f"expert_bias must have shape {(self.num_experts,)}, got {tuple(given.shape)}: one value an expert"
            )
        check_device("expert_bias", given, self.weight.device, "the router's state")
        return given

    def _backend_for(self, x: Tensor) -> str:
        return choose_backend(self.backend, x.device, x.dtype, self.num_experts)

    def _route(
        self,
        x: Tensor,
        mask: Tensor | None,
        indices: Tensor | None,
        expert_bias: Tensor | None = None,
        *,
        gather: bool,
    ) -> Routing:
        x_TD = flatten_hidden_states(x, self.hidden_size)
        check_device("x", x, self.weight.device, "the router's state")
        mask = flatten_mask(mask, x)
        indices = check_indices(indices, x, self.top_k)
        backend = self._backend_for(x)
        d, bias = self._directions(x.dtype, backend), self._bias(expert_bias)
        rows = x_TD.detach() if self.detach_gates else x_TD
        if not gather:
            return route_checked(
                rows, d, bias, mask, indices, self.options,
                return_scores=self.return_scores, backend=backend,
            )  # fmt: skip
        if backend == "reference":
            return self._gather_reference(rows, d, bias, mask, indices)
        routing, stats = ops.route_with_stats(
            rows, d, bias, mask, indices, self.options,
            want_scores=self.return_scores, want_std=True, want_hist=self._want_hist, backend=backend,
        )  # fmt: skip
        self._gather(x_TD, routing, stats, None, backend)
        return routing

    def _route_dispatch(
        self, x: Tensor, mask: Tensor | None, indices: Tensor | None, expert_bias: Tensor | None
    ) -> tuple[Routing, Dispatch]:
        backend, gather = self._backend_for(x), self.counts_now()
        if backend != "triton":
            routing = self._route(x, mask, indices, expert_bias, gather=gather)
            return routing, dispatch(x, routing, backend=backend)
        x_TD = flatten_hidden_states(x, self.hidden_size)
        check_device("x", x, self.weight.device, "the router's state")
        mask, indices = flatten_mask(mask, x), check_indices(indices, x, self.top_k)
        routing, sent, stats, partials = ops.route_dispatch(
            x_TD, self._directions(x.dtype, backend), self._bias(expert_bias), mask, indices, self.options,
            want_scores=self.return_scores, want_std=gather, want_hist=gather and self._want_hist,
            accumulate=self.accumulate if gather else "", backend=backend,
        )  # fmt: skip
        if gather:
            self._gather(x_TD, routing, stats, partials, backend)
        if self.detach_gates:
            scores = None if routing.scores is None else routing.scores.detach()
            routing = routing._replace(
                weights=routing.weights.detach(), selected_scores=routing.selected_scores.detach(), scores=scores
            )
        return routing, sent

    def _gather(
        self, x: Tensor, routing: Routing, stats: ops.Statistics, partials: Tensor | None, backend: str
    ) -> None:
        if not torch.compiler.is_compiling():
            self._notice_load(committing=False)
        p, x = self.pending, x.detach()
        ops.accumulate(
            x, routing.indices, routing.inv_norm, routing.valid, partials,
            routing.tokens_per_expert, stats.score_std, stats.margin_hist, stats.num_dropped, self.accumulate,
            p.sums, p.counts, p.std_sum, p.num_tokens, p.num_dropped, p.margin_hist, backend,
        )  # fmt: skip
        if not self._initialized and self.init != "normal":
            factor = routing.inv_norm if self.accumulate == "unit" else routing.valid.float()
            ops.reservoir(x, factor, routing.valid, self._reservoir_seed, p.hashes, p.rows)

    def _gather_reference(
        self, x: Tensor, d: Tensor, bias: Tensor, mask: Tensor | None, indices: Tensor | None
    ) -> Routing:
        if indices is not None:
            check_index_values(indices, self.num_experts)
        routing = reference.route_reference(x, d, bias, mask, indices, self.options)
        assert routing.scores is not None
        hist = self.pending.margin_hist
        if self._want_hist:
            hist = reference.margin_hist_reference(
                *reference.margins_reference(routing.scores, bias, routing.valid, self.options)
            )
        wanted = torch.ones_like(routing.valid) if mask is None else mask
        stats = ops.Statistics(
            reference.score_std_reference(routing.scores).reshape(1), hist, (wanted & ~routing.valid).sum()
        )
        self._gather(x, routing, stats, None, "torch")
        return routing if self.return_scores else routing._replace(scores=None)

    def directions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(E, D): what hidden states of `dtype` are scored with, unit rows of the centroids with the learned offset."""
        return self._directions(dtype, choose_backend("auto", self.weight.device, dtype, self.num_experts)).detach()

    def _directions(self, dtype: torch.dtype, backend: str) -> Tensor:
        if self.offset is None:
            return self._unit_rows(dtype, backend)
        compute = reference.compute_dtype(dtype)
        return reference.shifted_directions(self._unit_rows(compute, backend), self.offset, dtype)

    def _unit_rows(self, dtype: torch.dtype, backend: str) -> Tensor:
        """Unit rows of the centroids; kept until these change."""
        if torch.compiler.is_compiling():
            return directions(self.weight, dtype)
        if _is_capturing(self.weight.device):  # a replay must follow the centroids, and knows no Python
            return directions_for(backend, self.weight, dtype)
        if self.weight.is_inference():  # such tensors have no version to tell a change by
            return directions_for(backend, self.weight, dtype)
        key = (self.weight.data_ptr(), self.weight._version, dtype)
        if self._cached is None or self._cached[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # autograd may want what is kept
                self._cached = (key, directions_for(backend, self.weight, dtype))
        return self._cached[1]

    @torch.no_grad()
    def commit_pending(self, skip: Tensor | None = None, batch: Pending | None = None) -> None:
        """Fold what forward has gathered into centroids and bias; see `commit`."""
        if self.frozen:
            return
        was_initialized = self._initialized
        self.before_commit()
        if was_initialized and not self._initialized:
            return  # nothing pending can set the first centroids
        batch = self.pending if batch is None else batch
        if not self._initialized:
            if int(batch.num_tokens) == 0 or (skip is not None and bool(skip)):
                return
            if self.init != "normal":
                self._commit_first_data(batch)
                return
            self._mark_initialized()
        self._commit_step(skip, batch)

    def _commit_first_data(self, batch: Pending) -> None:
        """Set the centroids from the reservoir and nothing else: steps, bias and sigma stay 0."""
        self._set_from_reservoir(batch.hashes, batch.rows)
        self.dropped_total.add_(batch.num_dropped)
        self.tokens_per_expert = batch.counts.clone()
        self.pending.clear_()
        self._mark_initialized()

    def _commit_step(self, skip: Tensor | None, p: Pending) -> None:
        if choose_backend(self.backend, self.weight.device, num_experts=self.num_experts) == "triton":
            self._commit_triton(skip, p)
            return
        go = p.num_tokens > 0 if skip is None else (p.num_tokens > 0) & ~skip
        old = reference.State(self.weight, self.expert_bias, self.score_std, self.steps, self.tokens_seen)
        new = reference.commit_reference(
            old, p.sums, p.counts, p.std_sum, p.num_tokens * go, p.margin_hist, self.commit_options
        )
        self.centroid_turn.copy_(torch.where(go, metrics.centroid_turn(old.weight, new.weight), self.centroid_turn))
        for buffer, value in zip(old, new, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        self.dropped_total.add_(p.num_dropped if skip is None else p.num_dropped * ~skip)
        self.tokens_per_expert.copy_(torch.where(go, p.counts, self.tokens_per_expert))
        self.pending.clear_(skip)

    def _commit_triton(self, skip: Tensor | None, p: Pending) -> None:
        """The same in one launch."""
        from kmeans_route.kernels import commit

        o = self.commit_options
        commit.commit(
            self.weight, self.expert_bias, self.score_std, self.steps, self.tokens_seen, self.dropped_total,
            self.tokens_per_expert, self.centroid_turn,
            p.sums, p.counts, p.std_sum, p.num_tokens, p.num_dropped, p.margin_hist, skip,
            o.top_k, o.decay, o.balance, o.bias_rate,
        )  # fmt: skip
        if p is not self.pending:
            self.pending.clear_(skip)
        self._cached = None  # a kernel's writes leave no trace in the version counter

    def before_commit(self) -> None:
        """Follow a load in place that no forward has noticed; see `StatefulRouter`."""
        self._notice_load(committing=True)

    def _notice_load(self, *, committing: bool) -> None:
        """Bring `_initialized` up to date when something else has written the buffer that it mirrors.

        torch.distributed.checkpoint.load copies into the tensors of `state_dict()` and calls nothing here; it leaves
        a trace in the version counter. Only then, and before the first data, is a value read back to the host.
        """
        flag = self.initialized
        now = self._trace()
        if flag.is_meta or (now == self._seen and (self._initialized or not committing)):
            return
        for name in self.FP32_STATE:
            if not bool(self.get_buffer(name).isfinite().all()):
                raise RuntimeError(
                    f"{name} of router {self.name!r} must be finite, got NaN or Inf written in place: load a "
                    "checkpoint from before that"
                )
        written, initialized = self._seen not in (None, now), bool(flag)
        turned = initialized != self._initialized
        if turned and initialized and committing:  # compiled forwards have gathered with the loaded state
            self._initialized = True
            self.pending.drop_reservoir()
        elif turned or (written and not committing):
            self._after_load()
        self._seen = now

    def _trace(self) -> tuple[int, int]:
        """What changes when `initialized` is replaced, or written by itself; writes of kernels leave no trace.

        The broadcast with which DDP begins a forward writes to all buffers alike, and counts as a write in torch 2.11
        and not in 2.13. It is no load, and has written to the one that no checkpoint holds, too.
        """
        flag, unsaved = self.initialized, self.unsaved
        untold = flag.is_inference() or unsaved.is_inference()
        return (flag.data_ptr(), 0 if untold else flag._version - unsaved._version)

    def _mark_initialized(self) -> None:
        self.initialized.fill_(True)
        self._initialized, self._seen = True, self._trace()
        self.pending.drop_reservoir()

    def _set_from_reservoir(self, hashes: Tensor, rows: Tensor) -> None:
        """Centroids from a sample sorted by hash; where it has fewer than E tokens, Gaussian rows stay."""
        chosen = torch.arange(self.num_experts, device=rows.device)
        if self.init == "kmeans++":
            chosen = kmeans_pp(hashes, rows, self.num_experts, self._private_generator())
        found = hashes[chosen] != EMPTY_HASH
        self.weight.copy_(torch.where(found[:, None], rows[chosen], self.weight))

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set the centroids from the tokens of x (..., D) now, instead of at the first commit.

        With init="normal" they come from one step of averaging over x. What was pending is dropped, and steps, bias
        and score scale start anew.

        Raises:
            ValueError: no token of x is valid.
        """
        x_TD = flatten_hidden_states(x, self.hidden_size)
        check_device("x", x, self.weight.device, "the router's state")
        flat_mask = flatten_mask(mask, x)
        if not bool(reference.validity_reference(x_TD, flat_mask).any()):
            raise ValueError("x must hold at least one valid token, got none: check the mask and for NaN or zero rows")
        self.reset_parameters()
        self._route(x_TD, flat_mask, None, gather=True)
        frozen, self.frozen = self.frozen, False
        self.commit_pending()
        self.frozen = frozen

    @torch.no_grad()
    def set_centroids(self, weight: Tensor, tokens_seen: int = 10_000_000) -> None:
        """Take given centroids, scaled to unit rows, with enough weight that the first commit cannot erase them.

        Args:
            weight: (E, D) floating point. `steps` becomes round(decay / (1 - decay)).
            tokens_seen: how many tokens each centroid stands for, with average="cumulative" only.

        Raises:
            ValueError: another shape, or a row that is zero or not finite.
        """
        if tuple(weight.shape) != (self.num_experts, self.hidden_size):
            raise ValueError(
                f"weight must have shape {(self.num_experts, self.hidden_size)}, got {tuple(weight.shape)}: "
                "one row an expert"
            )
        unit = directions(weight.detach().to(device=self.weight.device, dtype=torch.float32), torch.float32)
        if not bool((unit != 0).any(1).all()):
            raise ValueError("weight must have a direction in every row, got a zero or non-finite one: replace it")
        self.reset_parameters()
        self.weight.copy_(unit)
        decay = self.commit_options.decay
        self.steps.fill_(round(decay / (1 - decay)))
        if self.tokens_seen is not None:
            self.tokens_seen.fill_(tokens_seen)
        self._mark_initialized()

    def metrics(self) -> dict[str, float]:
        """Flat scalars of the last committed step, for any logger. Reads values back: not for the routing path."""
        counts = self.tokens_per_expert
        bias = self.expert_bias
        values = {
            "maxvio": metrics.max_vio(counts),
            "load_std": metrics.load_std(counts),
            "load_entropy": metrics.load_entropy(counts),
            "load_gini": metrics.gini(counts),
            "dead_experts": metrics.dead_experts(counts),
            "bias_abs_max": bias.abs().max(),
            "score_std": self.score_std,
            "direction_cosine": metrics.mean_pairwise_cosine(self.weight),
            "centroid_drift": metrics.angle_of_turn(self.centroid_turn).mean(),
            "steps": self.steps,
            "dropped_total": self.dropped_total,
        }
        return {name: float(value) for name, value in values.items()}

    def _apply(self, fn: Any, recurse: bool = True) -> "KMeansRouter":
        super()._apply(fn, recurse)
        self._cached = self._seen = None
        return self

    def _after_load(self) -> None:
        super()._after_load()
        self._initialized = not self.initialized.is_meta and bool(self.initialized)
        self._cached, self._seen = None, self._trace()
        if bool(self.pending.hashes.numel()) != (not self._initialized and self.init != "normal"):
            self._new_pending()
        else:
            self.tokens_per_expert.zero_()  # in place: a captured graph may write here

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cached": None, "_seen": None}
