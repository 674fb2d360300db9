"""A small language model trained on several ranks, each step held against one process with the same state."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kmeans_route import MoE, attach
from kmeans_route.lm.config import TrainConfig
from kmeans_route.lm.data import BatchSampler, load_corpus
from kmeans_route.lm.model import DecoderLM, next_byte_loss
from kmeans_route.types import Routing, Tokens
from tests.helpers.compare import routers_of

STATE = (
    "weight", "centroids", "expert_bias", "score_std", "steps", "initialized", "dropped_total", "tokens_per_expert",
)  # fmt: skip


class Run(NamedTuple):
    """What `train` returns.

    losses: nats a byte, one a step, the mean over the ranks. unequal: steps after which the ranks' router states were
    not the same bits. worst: for each entry of the state, the largest distance to one process over the entry's norm.
    choices, near_ties: (token, layer) pairs compared, and those that one process would have sent to other experts.
    """

    losses: list[float]
    unequal: int
    worst: dict[str, float]
    choices: int
    near_ties: int


class Seen:
    """What each router of a rank's model chose in the last forward."""

    def __init__(self, model: nn.Module) -> None:
        self.indices: dict[nn.Module, Tensor] = {}
        for router in routers_of(model):
            router.observe(partial(self._note, router))

    def _note(self, router: nn.Module, tokens: Tokens, routing: Routing) -> None:
        self.indices[router] = routing.indices

    def of_all_ranks(self) -> list[Tensor]:
        """Layer by layer, the ranks' rows one below the other."""
        return [torch.cat(all_ranks(tensor)) for tensor in self.indices.values()]


def all_ranks(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


class Witness:
    """One process with the whole batch. It follows the ranks' choices, and counts those that it would not make."""

    def __init__(self, config: TrainConfig, group: Any) -> None:
        self.model = DecoderLM(config).train()
        self.attachment = attach(self.model, torch.optim.SGD(self.model.parameters()), group)
        self.routers = routers_of(self.model)
        self.choices = self.near_ties = 0
        self.worst: dict[str, float] = {}
        for layer in self.model.moe_layers:
            layer.register_forward_pre_hook(self._follow, with_kwargs=True)

    def _follow(self, layer: MoE, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self.given[self.routers.index(layer.router)]
        own = layer.router.route(args[0]).indices
        self.choices += len(given)
        self.near_ties += int((own.sort(1).values != given.sort(1).values).any(1).sum())
        return args, {**kwargs, "indices": given}

    def step(self, before: dict[str, Tensor], windows: Tensor, given: list[Tensor], ranks: nn.Module) -> None:
        """From the ranks' state before their step: see the whole batch, commit, compare with their state after it."""
        self.model.load_state_dict(before)
        self.given = given
        next_byte_loss(self.model, windows)
        self.attachment.commit()
        for router, other in zip(self.routers, routers_of(ranks), strict=True):
            for name in STATE:
                got, want = getattr(router, name), getattr(other, name)
                distance = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
                self.worst[name] = max(self.worst.get(name, 0.0), distance)


def train(rank: int, num_ranks: int, config: TrainConfig, text: list[Path], *, check: bool) -> Run:
    """`config.steps` steps of `config.batch` windows of the text, which the ranks share."""
    torch.manual_seed(config.seed)
    model = DecoderLM(config).train()
    seen, root = Seen(model), model
    if num_ranks > 1:
        with warnings.catch_warnings():  # newer versions have another name for it
            warnings.simplefilter("ignore", FutureWarning)
            root = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95))
    attachment = attach(root, optimizer)
    sampler = BatchSampler(load_corpus(text).train, config.seq_len, config.batch, config.seed)
    alone = dist.new_group([0]) if check else None
    witness = Witness(config, alone) if check and rank == 0 else None
    losses, unequal = [], 0
    for _ in range(config.steps):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()} if witness else {}
        windows = sampler.next()
        loss = next_byte_loss(root, windows.chunk(num_ranks)[rank])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach() / num_ranks
        if num_ranks > 1:
            dist.all_reduce(mean)
        losses.append(float(mean))
        if check:
            state = torch.cat([getattr(r, name).double().flatten() for r in routers_of(model) for name in STATE])
            unequal += any(not torch.equal(other, state) for other in all_ranks(state))
            given = seen.of_all_ranks()
            if witness:
                witness.step(before, windows, given, model)
    attachment.remove()
    found = (witness.worst, witness.choices, witness.near_ties) if witness else ({}, 0, 0)
    return Run(losses, unequal, *found)
