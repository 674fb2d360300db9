"""The learned routers that K-Means is compared with, as honest baselines.

softmax: gates are softmax probabilities of the selected experts, renormalised; the load is balanced by the auxiliary
loss of the Switch Transformer (arXiv 2101.03961, eq. 4): E * sum over e of f_e P_e.
sigmoid: gates are sigmoid affinities, renormalised; the load is balanced without a loss by a selection bias, moved by
the sign of the load error (DeepSeek-V3, arXiv 2412.19437, 2.1.2) or by quantiles (Kimi K3 report 2.3.3).
"""

import math
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmeans_route import backends, metrics, ops, reference
from kmeans_route.backends.torch_statistics import count_experts, margin_hist
from kmeans_route.backends.torch_topk import exact_topk
from kmeans_route.checks import (
    MAX_FACTOR,
    check_choice,
    check_range,
    check_route_options,
)
from kmeans_route.reference import stable_topk
from kmeans_route.routing.base import StatefulRouter, called, checks_option_names, scalars
from kmeans_route.routing.pending import Pending
from kmeans_route.types import CommitOptions, Routing, Statistics, Tokens

KINDS = ("softmax", "sigmoid")
BALANCES = ("aux", "sign", "quantile", "none")
BIAS_RATES = {"aux": 0.0, "sign": 0.01, "quantile": 0.1, "none": 0.0}


class LearnedRouter(StatefulRouter):
    """A linear router with a balance rule, with the interface of `KMeansRouter`.

    Args:
        hidden_size, num_experts, top_k: D, E, K.
        kind: "softmax" or "sigmoid".
        balance: "aux" (Switch loss, add `aux_loss` to the training loss), "sign" or "quantile" bias, or "none";
            None for "aux" with softmax and "sign" with sigmoid.
        aux_loss_coef: factor on the Switch loss, >= 0.
        bias_rate: step of the bias rule, >= 0; None for 0.01 (sign), 0.1 (quantile).
        scaling: factor on the gates, in [1e-30, 1e30).
        seed, name: seed of the private generator that draws the weights.
        device: where weights and state are made.

    Shape:
        x: (..., D). weights, indices: (T, K). scores: (T, E) logits.

    A router like this does not shield itself: NaN in a hidden state reaches its weights.
    """

    switch_loss: Tensor
    PLAIN_TENSORS = ("tokens_per_expert", "switch_loss")

    @checks_option_names
    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        kind: str = "softmax",
        balance: str | None = None,
        aux_loss_coef: float = 0.01,
        bias_rate: float | None = None,
        scaling: float = 1.0,
        seed: int = 0,
        name: str = "",
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("kind", kind, KINDS)
        balance = {"softmax": "aux", "sigmoid": "sign"}[kind] if balance is None else balance
        check_choice("balance", balance, BALANCES)
        check_range("aux_loss_coef", aux_loss_coef, 0.0, math.inf)
        bias_rate = BIAS_RATES[balance] if bias_rate is None else bias_rate
        check_range("bias_rate", bias_rate, 0.0, MAX_FACTOR)
        super().__init__(hidden_size, num_experts, seed=seed, name=name)
        self.options = check_route_options(num_experts, top_k, scaling=scaling)
        self.top_k, self.kind, self.balance, self.scaling = top_k, kind, balance, scaling
        self.aux_loss_coef = aux_loss_coef
        rule = balance if balance in ("sign", "quantile") else "none"
        self.commit_options = CommitOptions(top_k, 0.0, "ema", rule, bias_rate)
        self.learns = rule != "none" and top_k < num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device))
        self.register_buffer("expert_bias", torch.empty(num_experts, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian weights of standard deviation 1 / sqrt(D), no bias, nothing pending."""
        device = self.weight.device
        self.pending = Pending(self.num_experts, 0, device, with_hist=self.want_hist)
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        self.switch_loss = torch.zeros((), dtype=torch.float32, device=device)
        if self.weight.is_meta:
            return
        with torch.no_grad():
            self.weight.copy_(self._gaussian_rows() * self.hidden_size**-0.5)
            self.expert_bias.zero_()

    def extra_repr(self) -> str:
        """The options that matter, as the constructor names them."""
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, kind={self.kind!r}, "
            f"balance={self.balance!r}"
        )

    def route(
        self,
        x: Tensor | Tokens,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        *,
        count_mask: Tensor | None = None,
        gather: bool = False,
    ) -> Routing:
        """Route x (..., D); with gather, in training, also set `aux_loss` and gather the loads."""
        tokens = self.enter(x, mask, indices, count_mask)
        if tokens.indices is not None:
            raise ValueError(f"indices must be None with router={self.kind!r}, got ids: only K-Means replays")
        if tokens.count_mask is not None:
            raise ValueError(f"count_mask must be None with router={self.kind!r}, got a mask: only K-Means takes one")
        x_TD = tokens.x
        if tokens.mask is not None:  # 0 * NaN of padding would reach the weight's gradient
            x_TD = torch.where(tokens.mask[:, None], x_TD, 0.0)
        logits = F.linear(x_TD, self.weight).float()
        probabilities = logits.softmax(1) if self.kind == "softmax" else logits.sigmoid()
        routing = self._select(logits, probabilities, tokens.mask)
        if gather:
            self._learn(x_TD, probabilities, routing)
        return self._tell(tokens, routing)

    def _learn(self, x: Tensor, probabilities: Tensor, routing: Routing) -> None:
        if self.balance == "aux" and not ops.traced():
            self._check_aux_loss_trains()
            self.switch_loss = loss = self._switch_loss(probabilities, routing)
            if not torch.compiler.is_compiling() and ops.in_backward():
                ops.call_after_node(partial(self._let_go, loss))
        if self.counts_now():
            self._gather(x, probabilities.detach(), routing)

    def _let_go(self, loss: Tensor) -> None:
        """Keep the value alone: no pass frees the graph that non-reentrant checkpointing has recomputed, and a block
        reads the loss while it is recomputed, if at all."""
        if self.switch_loss is loss:
            self.switch_loss = loss.detach()

    @property
    def aux_loss(self) -> Tensor:
        """() the Switch loss of the last training forward times its coefficient; 0 with another balance."""
        return self.switch_loss

    def _check_aux_loss_trains(self) -> None:
        """Reentrant checkpointing runs the forward without gradients, and so an auxiliary loss that trains nothing."""
        counts = self._scope is not None and self._scope.active
        if counts and not torch.is_grad_enabled() and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(
                f"the auxiliary loss of {called(self)} trains nothing under reentrant activation checkpointing: "
                "checkpoint with use_reentrant=False",
                stacklevel=4,
            )

    def _select(self, logits: Tensor, probabilities: Tensor, mask: Tensor | None) -> Routing:
        num_tokens = logits.shape[0]
        valid = logits.new_ones(num_tokens, dtype=torch.bool) if mask is None else mask
        if self.balance in ("sign", "quantile"):
            plain = torch.compiler.is_compiling() or ops.traced()  # the other branches on data
            choose = stable_topk if plain else exact_topk
            indices = choose(probabilities.detach() + self.expert_bias, self.top_k)
            selected = probabilities.gather(1, indices)
        else:
            selected, indices = probabilities.topk(self.top_k, dim=1)
        weights = selected / selected.sum(1, keepdim=True) * self.scaling
        if mask is not None:
            first_ids = torch.arange(self.top_k, device=indices.device)
            indices = torch.where(mask[:, None], indices, first_ids)
            weights = torch.where(mask[:, None], weights, 0.0)
        if ops.traced():
            counts = reference.loads_reference(indices, valid, self.num_experts)
        else:
            counts = count_experts(indices, valid, self.num_experts, all_valid=mask is None)
        inv_norm = logits.new_zeros(num_tokens)
        return Routing(indices, weights, selected, logits, counts, inv_norm, valid)

    def _switch_loss(self, probabilities: Tensor, routing: Routing) -> Tensor:
        if not self.training:
            return probabilities.new_zeros(())
        num_valid = routing.valid.sum().clamp_min(1)
        f = routing.tokens_per_expert / (num_valid * self.top_k)
        p = (probabilities * routing.valid[:, None]).sum(0) / num_valid
        return self.aux_loss_coef * self.num_experts * (f * p).sum()

    def _gather(self, x: Tensor, probabilities: Tensor, routing: Routing) -> None:
        p = self.pending
        hist = margin_hist(probabilities + self.expert_bias, routing.valid, self.top_k) if self.want_hist else None
        none = p.std_sum.new_zeros(0)
        batch = Statistics(routing.tokens_per_expert, none, hist, p.num_dropped.new_zeros(()))
        ops.accumulate(
            x.detach(), routing.indices, None, routing.valid, None, batch, p.statistics, None, backends.get("torch")
        )

    @torch.no_grad()
    def commit_pending(self, skip: Tensor | None = None, batch: Pending | None = None) -> None:
        """Move the selection bias by its rule; see `commit`."""
        p = self.pending if batch is None else batch
        go = p.num_tokens > 0 if skip is None else (p.num_tokens > 0) & ~skip
        bias = reference.balance_bias(
            self.expert_bias, p.counts, torch.ones_like(p.std_sum), p.margin_hist, self.commit_options
        )
        self.expert_bias.copy_(torch.where(go, bias, self.expert_bias))
        self.tokens_per_expert.copy_(torch.where(go, p.counts, self.tokens_per_expert))
        self.pending.clear_(skip)

    def metrics(self) -> dict[str, float]:
        """Flat scalars of the last committed step, named as those of `KMeansRouter`; loads are NaN before the first.

        Where the weight is sharded over ranks `direction_cosine` is absent: it would take all ranks to read it.
        """
        counts = self.tokens_per_expert
        values = {
            "maxvio": metrics.max_vio(counts),
            "load_std": metrics.load_std(counts),
            "load_entropy": metrics.load_entropy(counts),
            "load_gini": metrics.gini(counts),
            "dead_experts": metrics.dead_experts(counts),
            "bias_abs_max": self.expert_bias.abs().max(),
        }
        if not hasattr(self.weight, "full_tensor"):
            values["direction_cosine"] = metrics.mean_pairwise_cosine(self.weight.detach())
        return scalars(values, counts)
