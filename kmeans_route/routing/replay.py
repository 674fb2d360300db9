"""Router replay: the expert ids of one forward, kept and used again by another.

Reinforcement learning samples with one engine and trains with another. Where the two choose other experts, the
policy that is trained is not the one that sampled; replay makes the choice equal (arXiv 2510.11370).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kmeans_route import ops
from kmeans_route.checks import check_module
from kmeans_route.reference import replay_or_choose
from kmeans_route.routing.base import StatefulRouter, called
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.types import Replay, Routing, Tokens


class Recording:
    """The expert ids that `record` has seen, of each router in the order of `model.modules()`."""

    def __init__(self, routers: Sequence[StatefulRouter]) -> None:
        self._seen: list[list[Tensor]] = [[] for _ in routers]

    @property
    def ids(self) -> list[Tensor]:
        """(T, K) int64 of each router, forwards one after another; (0, 0) where a router has seen none."""
        return [torch.cat(parts) if parts else torch.empty(0, 0, dtype=torch.int64) for parts in self._seen]


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Keep the expert ids of every forward inside, of each router of the model.

    A recomputation in a backward pass is not kept again. Tokens that are not valid have the ids 0..K-1, as in
    `Routing`.

    Args:
        model: holds at least one router, `KMeansRouter` or `LearnedRouter`.

    Returns:
        A context manager that gives a `Recording`; its `ids` may be read inside and afterwards.

    Raises:
        ValueError: the model has no router.

    Example:
        >>> import torch, kmeans_route
        >>> layer = kmeans_route.MoE(16, 32, num_experts=4, top_k=2).eval()
        >>> x = torch.randn(5, 16)
        >>> with kmeans_route.record(layer) as seen:
        ...     y = layer(x)
        >>> with kmeans_route.replay(layer, seen.ids):
        ...     again = layer(x)
        >>> bool((y == again).all())
        True
    """
    check_module("model", model)
    routers = [module for module in model.modules() if isinstance(module, StatefulRouter)]
    if not routers:
        raise ValueError(f"model must have a router, got {type(model).__name__} without: nothing to record")
    recording = Recording(routers)

    def keep(place: int) -> Any:
        def see(_: Tokens, routing: Routing) -> None:
            if torch.compiler.is_compiling() or not ops.in_backward():
                recording._seen[place].append(routing.indices.detach())

        return see

    handles = [router.observe(keep(place)) for place, router in enumerate(routers)]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay(
    model: nn.Module,
    ids: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
    mask: Tensor | None = None,
    *,
    count: bool = True,
) -> Iterator[None]:
    """Send the tokens of every forward inside to given experts; gates are those of their own scores.

    Open one for each (micro-)batch, around its forward and its backward pass, so that a recomputation gets the same
    ids. Gradients flow as if the ids had been chosen.

    Args:
        model: its K-Means routers replay, and it has no other ones.
        ids: (T, K) of each router, any integer dtype, as `Recording.ids` has them: a sequence in the order of
            `model.modules()`, one tensor (layers, T, K), or a dict by module path, whose other routers choose. A row
            with an id outside of [0, E), or with one twice, is routed as without replay. Of an array (T, layers, K),
            as vLLM returns, pass `torch.from_numpy(array).movedim(1, 0)`, or its columns by path.
        mask: bool, (T,) or the leading shape of the hidden states; rows where it is false are routed as without
            replay.
        count: whether these forwards count in the statistics, with the experts that were used.

    Returns:
        A context manager. At its end the routers are as they were.

    Raises:
        ValueError: another number of routers or tokens, or a model without K-Means routers. TypeError: ids that are
            no integers. RuntimeError: a backward pass that recomputes after the end of this.
    """
    targets = _targets(model, ids)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype}: convert it with mask.bool()")
    given = [(router, router.replayed, Replay(usable_ids(router, own, mask), count)) for router, own in targets]
    for router, _, now in given:
        router.replayed = now
    try:
        yield
    finally:
        for router, before, _ in given:
            router.replayed = before


def _targets(model: nn.Module, ids: Any) -> list[tuple[KMeansRouter, Tensor]]:
    check_module("model", model)
    named = {path: module for path, module in model.named_modules() if isinstance(module, StatefulRouter)}
    others = [path for path, router in named.items() if not isinstance(router, KMeansRouter)]
    if others or not named:
        got = f"a {named[others[0]].__class__.__name__} at {others[0]!r}" if others else "none"
        raise ValueError(f"model must have K-Means routers alone to replay, got {got}: only K-Means replays")
    if isinstance(ids, Mapping):
        unknown = [path for path in ids if path not in named]
        if unknown:
            raise ValueError(f"ids must name routers, got {unknown[0]!r}: there are {list(named)}")
        return [(named[path], given) for path, given in ids.items()]  # type: ignore[misc]
    if len(ids) != len(named):
        raise ValueError(
            f"ids must hold one (T, K) tensor for each of the {len(named)} routers, got {len(ids)}: record this model, "
            "or pass a dict by module path"
        )
    return list(zip(named.values(), ids, strict=True))  # type: ignore[arg-type]


def usable_ids(router: KMeansRouter, given: Tensor, mask: Tensor | None = None) -> Tensor:
    """Ids (T, K) of any integer dtype as int64 on the router's device, -1 in every row that is to be routed: where it
    cannot be replayed, or mask (T,) is false."""
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"ids of {called(router)} must be integers, got {given.dtype}: pass those recorded")
    if given.dim() < 2 or given.shape[-1] != router.top_k:
        raise ValueError(
            f"ids of {called(router)} must have shape (T, {router.top_k}), got {tuple(given.shape)}: pass those "
            "recorded with this top_k"
        )
    ids = given.to(device=router.weight.device, dtype=torch.int64).reshape(-1, router.top_k)
    ids = replay_or_choose(ids, torch.full_like(ids, -1), router.num_experts)
    if mask is None:
        return ids
    if mask.numel() != len(ids):
        raise ValueError(f"mask must have an element for each of the {len(ids)} tokens of ids, got {mask.numel()}")
    return torch.where(mask.to(ids.device).reshape(-1, 1), ids, -1)
