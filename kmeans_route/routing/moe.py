"""A sparse mixture-of-experts layer whose router is a flag: "kmeans", "softmax" or "sigmoid"."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kmeans_route import ops
from kmeans_route.checks import check_choice, check_option_names, check_positive_int
from kmeans_route.routing.base import StatefulRouter, option_names
from kmeans_route.routing.experts import Experts, SharedExpert
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.routing.learned import LearnedRouter
from kmeans_route.types import Dispatch, MoEDetails, Routing, Tokens

ROUTERS = ("kmeans", "softmax", "sigmoid")


class MoE(nn.Module):
    """A mixture of SwiGLU experts behind one of three routers.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: D, I, E, K.
        router: "kmeans" (`KMeansRouter`), "softmax" or "sigmoid" (`LearnedRouter`).
        balance: the router's balance rule; None for its default: "proportional", "aux" and "sign".
        num_shared_experts: experts that see every token, as one SwiGLU network of that many times I; 0 for none.
        seed, name: of the router's private generator; give each layer its own name.
        device, dtype: of the parameters, as of any module of torch; the router's own state stays fp32.
        router_options: anything else that the router class takes.

    Shape:
        x (..., D), mask x.shape[:-1] bool -> y like x. Tokens that are not valid get 0.

    After a forward `tokens_per_expert` (E,) holds its loads, until the next one writes over them, and `aux_loss` ()
    what to add to the training loss (0 for routers without one). The weights of the experts come from torch's global
    generator and do not depend on the router.

    Example:
        >>> import torch, kmeans_route
        >>> layer = kmeans_route.MoE(16, 32, num_experts=4, top_k=2, router="kmeans").eval()
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        router: str = "kmeans",
        *,
        balance: str | None = None,
        num_shared_experts: int = 0,
        seed: int = 0,
        name: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        check_choice("router", router, ROUTERS)
        check_positive_int("intermediate_size", intermediate_size)
        if num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be at least 0, got {num_shared_experts}: pass 0 for none")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype}: pass that of the model's parameters")
        kind = KMeansRouter if router == "kmeans" else LearnedRouter
        own = ("balance", "num_shared_experts", "seed", "name", "device", "dtype")
        taken = {*own, *option_names(kind)} - {"kind"}  # of which `router` is one
        check_option_names(f"MoE(router={router!r})", router_options, taken)
        if balance is not None:
            router_options["balance"] = balance
        if router != "kmeans":
            router_options["kind"] = router
        options = {"seed": seed, "name": name, "device": device, **router_options}
        self.router: StatefulRouter = kind(hidden_size, num_experts, top_k, **options)
        if dtype is not None:
            self.router.to(dtype)
        self.hidden_size = hidden_size
        self.experts = Experts(num_experts, hidden_size, intermediate_size, device=device, dtype=dtype)
        shared_size = num_shared_experts * intermediate_size
        self.shared = SharedExpert(hidden_size, shared_size, device=device, dtype=dtype) if num_shared_experts else None
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)

    @property
    def aux_loss(self) -> Tensor:
        """() the auxiliary loss of the last training forward, already times its coefficient; 0 without one."""
        return self.router.aux_loss

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        loads, device = self.tokens_per_expert, self.router.expert_bias.device
        if loads.device != device:
            self.tokens_per_expert = torch.zeros_like(loads, device=device) if loads.is_meta else loads.to(device)
        return self

    def forward(self, x: Tensor, mask: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
        """Route, dispatch, apply the experts, combine.

        Args:
            x: (..., D). mask: bool, x.shape[:-1], false for padding.
            indices: (T, K) ids to replay instead of choosing, router="kmeans" only; gates are those of its scores.
        """
        tokens = self.router.enter(x, mask, indices)
        if type(self.experts) is Experts:  # fully_shard makes a class of its own, which has DTensors until it runs
            self.experts.check_plain()
        routing, sent = self.router.route_dispatch(tokens, gather=True)
        self.router.call_hooks(tokens, (routing, sent))
        self._record_loads(routing.tokens_per_expert)
        return self._apply_experts(tokens, routing, sent)[0].view(x.shape)

    def _record_loads(self, loads: Tensor) -> None:
        """In place, so that a captured graph writes where one reads, and because torch.compile takes a checkpointed
        layer into its graph only where the forward reassigns no attribute."""
        if ops.traced():  # a program holds no more than what it computes with
            return
        held = self.tokens_per_expert
        # Loading with assign=True may bring the state to another device without a word.
        if held.device != loads.device or (not torch.compiler.is_compiling() and held.is_inference()):
            self.tokens_per_expert = loads.clone()
        else:
            held.copy_(loads)

    def _apply_experts(self, tokens: Tokens, routing: Routing, sent: Dispatch) -> tuple[Tensor, Tensor]:
        x = tokens.x
        y_sorted = self.experts(sent.x_sorted, sent.offsets)
        y = ops.combine(y_sorted, routing.weights, sent, routing.valid, tokens.backend).to(x.dtype)
        if self.shared is not None:
            clean = torch.where(routing.valid[:, None], x, 0.0)  # 0 * NaN would reach the shared weights' gradients
            y = y + self.shared(clean).to(x.dtype)
        return y, y_sorted

    @torch.no_grad()
    def details(self, x: Tensor, mask: Tensor | None = None) -> MoEDetails:
        """One forward laid open, for metrics: no gradient, and no statistics gathered."""
        tokens = self.router.enter(x, mask)
        routing, sent = self.router.route_dispatch(tokens)
        y, y_sorted = self._apply_experts(tokens, routing, sent)
        return MoEDetails(routing, sent, y_sorted, y.view(x.shape))
