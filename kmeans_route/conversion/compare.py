"""How alike the routers of two models choose, and the passes over text that this takes.

A model runs over batches in eval mode, without gradients; what is hooked to its routers sees the hidden states and the
choices.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kmeans_route import metrics
from kmeans_route.checks import flatten_mask
from kmeans_route.functional import route
from kmeans_route.reference import candidates_reference, stable_topk, validity_reference
from kmeans_route.routing.base import StatefulRouter
from kmeans_route.routing.kmeans import KMeansRouter
from kmeans_route.types import RouteOptions, RouterOutput, Routing

Forward = Callable[[nn.Module, Any], Any]
"""(model, batch) -> its loss, a () tensor or something with a `loss`; anything else says that there is none."""
Tick = Callable[[], Any]
Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x (V, D) -> ids and gates, (V, K) both."""


class Seen(NamedTuple):
    """One forward of one router, the tokens that are not valid left out.

    x: (V, D) hidden states. indices: (V, K) expert ids. weights: (V, K) gate weights.
    """

    x: Tensor
    indices: Tensor
    weights: Tensor


class Agreement(NamedTuple):
    """How alike two routers choose for the same hidden states.

    num_tokens: how many of them; rows that are masked, zero or not finite are left out.
    top1: share of tokens whose largest gate belongs to the same expert.
    overlap: mean share of a token's top_k experts that both choose.
    gate_error: mean over tokens of half the sum over experts of |g - g'|; 0 where all gates agree.
    counts_before, counts_after: (E,) int64 tokens of each expert, each router in its own model where there are two.
    """

    num_tokens: int
    top1: float
    overlap: float
    gate_error: float
    counts_before: Tensor
    counts_after: Tensor


class Comparison(NamedTuple):
    """Two models on the same text, router by router. Printed, it is a table.

    routers: name -> Agreement. loss_before, loss_after: mean over tokens, None where the forward returns no loss or
    there is no second model.
    """

    routers: dict[str, Agreement]
    loss_before: float | None
    loss_after: float | None

    def mean(self, name: str) -> float:
        """Mean over the routers of "top1", "overlap", "gate_error", "max_vio_before" or "max_vio_after"."""
        return sum(self._value(one, name) for one in self.routers.values()) / len(self.routers)

    @staticmethod
    def _value(one: Agreement, name: str) -> float:
        if name.startswith("max_vio"):
            return float(metrics.max_vio(getattr(one, name.replace("max_vio", "counts"))))
        return float(getattr(one, name))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("top1", "overlap", "gate_error", "max_vio_before", "max_vio_after")
        return {
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "mean": {name: self.mean(name) for name in names},
            "routers": {
                router: {"num_tokens": one.num_tokens, **{name: self._value(one, name) for name in names}}
                for router, one in self.routers.items()
            },
        }

    def __str__(self) -> str:
        width = max(6, *(len(name) for name in self.routers))
        head = f"{'router':{width}}  tokens   top-1   top-k  gate error  MaxVio before  after"
        lines = [
            f"{name:{width}} {one.num_tokens:7d} {one.top1:7.1%} {one.overlap:7.1%} {one.gate_error:11.3f} "
            f"{self._value(one, 'max_vio_before'):14.3f} {self._value(one, 'max_vio_after'):6.3f}"
            for name, one in self.routers.items()
        ]
        if self.loss_before is not None and self.loss_after is not None:
            change = self.loss_after - self.loss_before
            lines.append(f"loss {self.loss_before:.4f} -> {self.loss_after:.4f} ({change:+.4f})")
        return "\n".join([head, *lines])


def shared_choices(one: Tensor, other: Tensor) -> float:
    """Sum over tokens of the share of their experts (T, K) that both choose."""
    return float((one[:, :, None] == other[:, None, :]).sum()) / one.shape[1]


def gate_error(num_experts: int, ids: Tensor, gates: Tensor, other_ids: Tensor, other_gates: Tensor) -> float:
    """Sum over tokens of half the sum over experts of |g - g'|: wrong choices and wrong gates in one number."""
    dense = torch.zeros(len(ids), num_experts, dtype=torch.float32, device=ids.device)
    dense.scatter_(1, ids, gates.float()).scatter_add_(1, other_ids, -other_gates.float())
    return float(dense.abs().sum()) / 2


def select(ranking: Tensor, options: RouteOptions, extra: int = 0) -> Tensor:
    """Ids (T, K) of the largest of a ranking (T, E) within the best groups; `extra` more where there are any."""
    if options.grouped:
        ranking = ranking.masked_fill(~candidates_reference(ranking, options), -torch.inf)
    return stable_topk(ranking, options.top_k + extra)


class Router(NamedTuple):
    """A router to be watched: the module, its top_k and number of experts."""

    module: nn.Module
    top_k: int
    num_experts: int


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name; a model that is a router itself has the name "router"."""
    return {name or "router": module for name, module in model.named_modules()}


def kmeans_routers(model: nn.Module) -> dict[str, KMeansRouter]:
    """Those of them that are K-Means routers."""
    return {name: module for name, module in modules_of(model).items() if isinstance(module, KMeansRouter)}


def to_watch(routers: Mapping[str, KMeansRouter]) -> dict[str, Router]:
    """K-Means routers as `watch` takes them."""
    return {name: Router(router, router.top_k, router.num_experts) for name, router in routers.items()}


def replay(router: KMeansRouter, seen: Seen) -> Routing:
    """The choices of another router as the K-Means router would weigh them, with all scores."""
    x, ids = seen.x.to(router.weight.device), seen.indices.to(router.weight.device)
    directions, options = router.directions(x.dtype), router.options._asdict()
    return route(
        x, router.weight, indices=ids, directions=directions, return_scores=True, backend=router.backend, **options
    )


def compare(
    model: nn.Module,
    watched: Mapping[str, Router],
    choose: Mapping[str, Choose],
    batches: Iterable[Any],
    *,
    forward: Forward,
    target: nn.Module | None,
) -> Comparison:
    """Agreement of the routers of a model with other choices for the same hidden states, by name.

    With a target, a second model with routers of these names, also its loss, and its loads on hidden states of its own.
    """
    sums = {name: torch.zeros(4, dtype=torch.float64, device="cpu") for name in watched}
    loads = {
        name: torch.zeros(2, router.num_experts, dtype=torch.int64, device="cpu") for name, router in watched.items()
    }

    def count(name: str, side: int, ids: Tensor) -> None:
        loads[name][side] += torch.bincount(ids.flatten(), minlength=watched[name].num_experts).cpu()

    def add(name: str, seen: Seen) -> None:
        indices, weights = choose[name](seen.x)
        pairs = ((seen.indices, seen.weights), (indices, weights))
        firsts = [ids.gather(1, w.argmax(1, keepdim=True)) for ids, w in pairs]
        same_first, shared = float((firsts[0] == firsts[1]).sum()), shared_choices(seen.indices, indices)
        error = gate_error(watched[name].num_experts, seen.indices, seen.weights, indices, weights)
        sums[name] += torch.tensor([len(indices), same_first, shared, error], dtype=torch.float64, device="cpu")
        count(name, 0, seen.indices)
        if target is None:
            count(name, 1, indices)

    loss_before, loss_after = watch(model, watched, batches, add, forward), None
    if target is not None:
        modules = modules_of(target)
        after = {name: router._replace(module=modules[name]) for name, router in watched.items()}
        loss_after = watch(target, after, batches, lambda name, seen: count(name, 1, seen.indices), forward)
    agreements = {}
    for name, each in sums.items():
        num_tokens, *of_tokens = each.tolist()
        agreements[name] = Agreement(int(num_tokens), *(total / num_tokens for total in of_tokens), *loads[name])
    return Comparison(agreements, loss_before, loss_after)


def watch(
    model: nn.Module,
    watched: Mapping[str, Router],
    batches: Iterable[Any],
    see: Callable[[str, Seen], None],
    forward: Forward | None = None,
) -> float | None:
    """Run the batches and show `see` what each router got and chose; returns the mean loss over tokens, if any.

    A batch that is a mapping with a two-dimensional `attention_mask`, as those of transformers, is not counted where
    that is 0.
    """
    run = forward or run_batch
    tokens = dict.fromkeys(watched, 0)
    mask: Tensor | None = None
    total, weight, first = 0.0, 0, next(iter(watched))

    def hook(name: str, router: Router) -> RemovableHandle:
        def look(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen = read(name, router, args, kwargs, output, mask)
            tokens[name] += len(seen.x)
            see(name, seen)

        if isinstance(router.module, StatefulRouter):  # a layer like `MoE` goes past its forward
            return router.module.observe(
                lambda at, routing: look(
                    router.module, (at.x, at.count_mask if at.mask is None else at.mask), {}, routing
                )
            )
        return router.module.register_forward_hook(look, with_kwargs=True)

    with ExitStack() as undo, torch.no_grad():
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        for name, router in watched.items():
            undo.callback(hook(name, router).remove)
        for batch in batches:
            before, mask = tokens[first], attention_mask_of(batch)
            loss = loss_of(run(model, batch))
            if loss is not None:
                total += loss * (tokens[first] - before)
                weight += tokens[first] - before
    for name, count in tokens.items():
        if not count:
            raise ValueError(
                f"batches must bring router {name!r} at least one valid token, got none: check the batches, the mask, "
                "and for NaN or zero hidden states"
            )
    return total / weight if weight else None


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: a mapping by keywords, a tuple or list by positions, else as its one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def attention_mask_of(batch: Any) -> Tensor | None:
    """The mask (B, S) of a batch as bool, if it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def loss_of(output: Any) -> float | None:
    """The loss in what a forward returned, if there is one."""
    loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else getattr(output, "loss", output)
    return float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def read(
    name: str, router: Router, args: Iterable[Any], kwargs: Mapping[str, Any], output: Any, around: Tensor | None = None
) -> Seen:
    """What a call of a router holds.

    It may return a `Routing` or `RouterOutput`; a tuple with int64 ids (..., K) and floating weights of that shape, as
    those of transformers do; a pair of gates and logits (..., E), as Llama4's does; or logits (..., E), as a plain
    linear gate does. A bool argument of x's leading shape is taken for its mask, else the model's, where that fits.
    """
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    x = next(value for value in given if value.is_floating_point())
    num_tokens = x.numel() // x.shape[-1]
    mask = next((v for v in given if v.dtype == torch.bool and v.numel() == num_tokens), None)
    if mask is None and around is not None and around.numel() == num_tokens:
        mask = around.reshape(-1).to(x.device)
    rows = x.detach().reshape(-1, x.shape[-1])
    valid = validity_reference(rows, None if mask is None else flatten_mask(mask, x))
    indices, weights = (part.detach().reshape(-1, router.top_k)[valid] for part in choices(name, router, output))
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < router.num_experts):
        raise ValueError(
            f"router {name!r} must choose among {router.num_experts} experts, got id {int(indices.max())}: give the "
            "new router as many experts as the old one"
        )
    return Seen(rows[valid], indices, weights)


def choices(name: str, router: Router, output: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights (..., K) in what a router returned; see `read`."""

    def has_logits(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] == router.num_experts

    if isinstance(output, (Routing, RouterOutput)) and output.indices.shape[-1] == router.top_k:
        return output.indices, output.weights
    if has_logits(output):
        logits = output.detach().float()
        indices = stable_topk(logits, router.top_k)
        return indices, logits.gather(-1, indices).softmax(-1)
    if isinstance(output, (tuple, list)):
        tensors = [value for value in output if isinstance(value, Tensor)]
        ids = [v for v in tensors if v.dtype == torch.int64 and v.dim() and v.shape[-1] == router.top_k]
        weights = [v for v in tensors if ids and v.is_floating_point() and v.shape == ids[0].shape]
        if weights:
            return ids[0], weights[-1]
        if len(tensors) == 2 and all(map(has_logits, tensors)):
            indices = stable_topk(tensors[0].detach().float(), router.top_k)
            return indices, tensors[0].gather(-1, indices)
    raise TypeError(
        f"router {name!r} must return int64 ids and weights (..., {router.top_k}) or logits (..., "
        f"{router.num_experts}), got {type(output).__name__}: give the new router the old one's top_k and number of "
        "experts"
    )


def reread(batches: Iterable[Any], held_out: Iterable[Any] | None) -> tuple[list[Any], list[Any]]:
    """Batches to go by and to report on, as lists, since several passes are made over them."""
    for name, one in (("batches", batches), ("held_out", held_out)):
        if isinstance(one, Mapping):
            raise TypeError(f"{name} must be a list of batches, got a single {type(one).__name__}: put it into a list")
    held = list(batches)
    reported = held if held_out is None else list(held_out)
    for name, one in (("batches", held), ("held_out", reported)):
        if not one:
            raise ValueError(f"{name} must hold at least one batch, got none: pass a DataLoader, or a list of batches")
    return held, reported


@contextmanager
def ticking(forward: Forward | None, progress: bool | Tick, description: str, total: int) -> Iterator[Forward]:
    """`forward` with one tick a batch: the caller's own, or a bar on stderr where that is a terminal with rich."""
    run = forward or run_batch
    if not isinstance(progress, bool):
        yield _with_tick(run, progress)
    elif progress and sys.stderr.isatty() and find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            yield _with_tick(run, partial(bar.advance, bar.add_task(description, total=total)))
    else:
        yield run


def _with_tick(run: Forward, tick: Tick) -> Forward:
    def forward(model: nn.Module, batch: Any) -> Any:
        output = run(model, batch)
        tick()
        return output

    return forward
