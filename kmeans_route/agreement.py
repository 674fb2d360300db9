"""How alike the routers of two models choose: what warm start and the way back report.

A model runs over batches in eval mode, without gradients; hooks on its routers see the hidden states and the choices.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kmeans_route import metrics
from kmeans_route.checks import flatten_mask
from kmeans_route.reference import stable_topk, validity_reference
from kmeans_route.types import RouterOutput, Routing

Forward = Callable[[nn.Module, Any], Any]
"""(model, batch) -> its loss, a () tensor or something with a `loss`; anything else says that there is none."""
Tick = Callable[[], None]


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


class Tally:
    """Sums of an `Agreement`, batch by batch."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts, self.num_tokens = num_experts, 0
        self.top1 = self.overlap = self.gate_error = 0.0
        self.before = torch.zeros(num_experts, dtype=torch.int64)
        self.after = torch.zeros(num_experts, dtype=torch.int64)

    def add(self, old: Seen, indices: Tensor, weights: Tensor) -> None:
        """Count the choices (V, K) of the other router for the same tokens."""
        first = old.indices.gather(1, old.weights.argmax(1, keepdim=True))
        self.top1 += float((first == indices.gather(1, weights.argmax(1, keepdim=True))).sum())
        self.overlap += float((old.indices[:, :, None] == indices[:, None, :]).sum()) / indices.shape[1]
        gates = torch.zeros(len(indices), self.num_experts, dtype=torch.float32, device=indices.device)
        gates.scatter_(1, indices, weights.float()).scatter_add_(1, old.indices, -old.weights.float())
        self.gate_error += float(gates.abs().sum()) / 2
        self.num_tokens += len(indices)
        self.before += self.count(old.indices)
        self.after += self.count(indices)

    def count(self, indices: Tensor) -> Tensor:
        """(E,) tokens of each expert, on the CPU."""
        return torch.bincount(indices.flatten(), minlength=self.num_experts).cpu()

    def result(self) -> Agreement:
        """The means so far."""
        total = max(1, self.num_tokens)
        shares = (self.top1 / total, self.overlap / total, self.gate_error / total)
        return Agreement(self.num_tokens, *shares, self.before, self.after)


class Router(NamedTuple):
    """A router to be watched: the module, its top_k and number of experts."""

    module: nn.Module
    top_k: int
    num_experts: int


def compare(
    model: nn.Module,
    watched: Mapping[str, Router],
    choose: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]],
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    target: tuple[nn.Module, Mapping[str, Router]] | None = None,
    tick: Tick = lambda: None,
) -> Comparison:
    """Agreement of the routers of `model` with other choices for the same hidden states.

    Args:
        model, watched: the model and its routers by name.
        choose: name -> function of x (V, D) that gives indices and weights, (V, K) both.
        batches: what to run on.
        forward: how to run a batch, see `Forward`; None for `run_batch`.
        target: a second model and its routers, for its loss and for its loads on hidden states of its own.
        tick: called after each batch of each model.
    """
    tallies = {name: Tally(router.num_experts) for name, router in watched.items()}
    loss_before = watch(
        model, watched, batches, lambda name, seen: tallies[name].add(seen, *choose[name](seen.x)), forward, tick
    )
    loss_after = None
    if target is not None:
        for tally in tallies.values():
            tally.after.zero_()

        def count(name: str, seen: Seen) -> None:
            tallies[name].after += tallies[name].count(seen.indices)

        loss_after = watch(target[0], target[1], batches, count, forward, tick)
    return Comparison({name: tally.result() for name, tally in tallies.items()}, loss_before, loss_after)


def watch(
    model: nn.Module,
    watched: Mapping[str, Router],
    batches: Iterable[Any],
    see: Callable[[str, Seen], None],
    forward: Forward | None = None,
    tick: Tick = lambda: None,
) -> float | None:
    """Run the batches and show `see` what each router got and chose; returns the mean loss over tokens, if any.

    A batch that is a mapping with a two-dimensional `attention_mask`, as those of transformers, is not counted where
    that is 0.
    """
    run = run_batch if forward is None else forward
    tokens = dict.fromkeys(watched, 0)

    def hook_for(name: str, router: Router) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen = read(name, router, args, kwargs, output, mask)
            tokens[name] += len(seen.x)
            see(name, seen)

        return hook

    mask: Tensor | None = None
    total, weight, first = 0.0, 0, next(iter(watched))
    with evaluating(model):
        handles = [r.module.register_forward_hook(hook_for(n, r), with_kwargs=True) for n, r in watched.items()]
        try:
            for batch in batches:
                before, mask = tokens[first], _attention_mask(batch)
                loss = loss_of(run(model, batch))
                if loss is not None:
                    total += loss * (tokens[first] - before)
                    weight += tokens[first] - before
                tick()
        finally:
            for handle in handles:
                handle.remove()
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
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def _attention_mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def loss_of(output: Any) -> float | None:
    """The loss in what a forward returned, if there is one."""
    loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else getattr(output, "loss", output)
    return float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def read(
    name: str,
    router: Router,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
    model_mask: Tensor | None = None,
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
    if mask is None and model_mask is not None and model_mask.numel() == num_tokens:
        mask = model_mask.reshape(x.shape[:-1]).to(x.device)
    indices, weights = choices(name, router, output)
    rows = x.detach().reshape(-1, x.shape[-1])
    valid = validity_reference(rows, flatten_mask(mask, x))
    indices = indices.reshape(-1, router.top_k)[valid]
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < router.num_experts):
        raise ValueError(
            f"router {name!r} must choose among {router.num_experts} experts, got id {int(indices.max())}: give the "
            "new router as many experts as the old one"
        )
    return Seen(rows[valid], indices, weights.detach().reshape(-1, router.top_k)[valid])


def choices(name: str, router: Router, output: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights (..., K) in what a router returned; see `read`."""
    if isinstance(output, tuple) and output and isinstance(output[0], Routing):  # with its dispatch
        output = output[0]
    if isinstance(output, (Routing, RouterOutput)) and output.indices.shape[-1] == router.top_k:
        return output.indices, output.weights
    if isinstance(output, Tensor) and output.is_floating_point() and output.shape[-1] == router.num_experts:
        logits = output.detach().float()
        indices = stable_topk(logits, router.top_k)
        return indices, logits.gather(-1, indices).softmax(-1)
    if isinstance(output, (tuple, list)):
        tensors = [value for value in output if isinstance(value, Tensor)]
        ids = [v for v in tensors if v.dtype == torch.int64 and v.dim() and v.shape[-1] == router.top_k]
        weights = [v for v in tensors if ids and v.is_floating_point() and v.shape == ids[0].shape]
        if weights:
            return ids[0], weights[-1]
        if len(tensors) == 2 and all(v.is_floating_point() and v.shape[-1] == router.num_experts for v in tensors):
            indices = stable_topk(tensors[0].detach().float(), router.top_k)
            return indices, tensors[0].gather(-1, indices)
    raise TypeError(
        f"router {name!r} must return int64 ids and weights (..., {router.top_k}) or logits (..., "
        f"{router.num_experts}), got {type(output).__name__}: give the new router the old one's top_k and number of "
        "experts"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def reread(batches: Iterable[Any], name: str) -> list[Any]:
    """The batches as a list, since several passes are made over them."""
    held = list(batches)
    if not held:
        raise ValueError(f"{name} must hold at least one batch, got none: pass a DataLoader, or a list of batches")
    return held


@contextmanager
def ticking(progress: bool | Tick, description: str, total: int) -> Iterator[Tick]:
    """One tick a batch: the caller's own, or a bar on stderr where that is a terminal and rich is installed."""
    if not isinstance(progress, bool):
        yield progress
    elif progress and sys.stderr.isatty() and find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda: bar.advance(task)
    else:
        yield lambda: None
