"""Ranks that see different tokens: they commit what one process would, from gloo runs with 2 and 4 processes."""

import copy
import datetime
import os
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from kmeans_route import KMeansRouter, MoE, attach
from kmeans_route.training.exchange import Exchange
from tests.helpers.ranks import TIMEOUT_S, run_on_ranks, short_timeout

D_IN, D, E, K = 12, 16, 6, 2
SCENARIOS: dict[str, dict[str, Any]] = {
    # name: options of the router; share of each rank's tokens; whether gradients flow, through DDP
    "ddp": {"ddp": True},
    "ddp-no-buffers": {"ddp": True, "broadcast_buffers": False, "options": {"balance": "sign"}},
    "uneven": {"shares": "uneven"},
    "empty-rank": {"shares": "empty", "options": {"balance": "quantile"}},
    "cumulative": {"options": {"average": "cumulative"}},
    "normal": {"options": {"init": "normal", "accumulate": "raw"}, "shares": "uneven"},
    "every-2": {"every_n_steps": 2},
    "learned": {"router": "sigmoid", "ddp": True},
}


def make(router: str = "kmeans", options: dict[str, Any] | None = None) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(D_IN, D), MoE(D, 8, E, K, router, **(options or {})))


def batch(step: int) -> Tensor:
    return torch.randn(80, D_IN, generator=torch.Generator().manual_seed(step)) + 0.3


def shard(x: Tensor, rank: int, num_ranks: int, shares: str) -> Tensor:
    if shares == "even" or num_ranks == 1:
        return x.chunk(num_ranks)[rank]
    if shares == "empty":  # the last rank sees nothing
        return x[:0] if rank == num_ranks - 1 else x.chunk(num_ranks - 1)[rank]
    cuts = [0, *[7 * (r + 1) for r in range(num_ranks - 1)], len(x)]
    return x[cuts[rank] : cuts[rank + 1]]


def train(rank: int, num_ranks: int, scenario: dict[str, Any]) -> dict[str, Tensor]:
    """Four steps; what is left of the layer's state and parameters."""
    model = make(scenario.get("router", "kmeans"), scenario.get("options"))
    ddp, root = scenario.get("ddp", False), model
    if ddp and num_ranks > 1:
        with warnings.catch_warnings():  # newer versions have another name for it
            warnings.simplefilter("ignore", FutureWarning)
            root = DistributedDataParallel(model, broadcast_buffers=scenario.get("broadcast_buffers", True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if ddp else 0.0)
    attachment = attach(root, optimizer, every_n_steps=scenario.get("every_n_steps", 1))
    for step in range(4):
        optimizer.zero_grad()
        y = root(shard(batch(step), rank, num_ranks, scenario.get("shares", "even")))
        (y.square().sum() / max(1, y.numel())).backward()
        optimizer.step()
    attachment.remove()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train_all(rank: int, num_ranks: int) -> dict[str, dict[str, Tensor]]:
    return {name: train(rank, num_ranks, scenario) for name, scenario in SCENARIOS.items()}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_commit_what_one_process_would(tmp_path: Path, num_ranks: int) -> None:
    """Equal bits on all ranks; against one process equal counts, and state within the rounding of other sums."""
    alone = train_all(0, 1)
    ranks = run_on_ranks(train_all, num_ranks, tmp_path, num_ranks)
    for name, want in alone.items():
        for key, tensor in want.items():
            for rank in ranks:
                assert torch.equal(rank[name][key], ranks[0][name][key]), (name, key)
            torch.testing.assert_close(ranks[0][name][key], tensor, rtol=0, atol=2e-5, msg=f"{name} {key}")
        steps = {key: tensor for key, tensor in want.items() if key.endswith("steps")}
        assert all(
            int(tensor) == (1 if name == "every-2" else 4 if name == "normal" else 3) for tensor in steps.values()
        )


def first_centroids(rank: int, num_ranks: int) -> list[Tensor]:
    """The directions after the first commit."""
    results = []
    for count in (200, 4):  # more tokens than experts, and fewer
        x = torch.randn(count, D, generator=torch.Generator().manual_seed(9))
        mine = x.chunk(num_ranks)[rank]
        router = KMeansRouter(D, E, K)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        attachment = attach(nn.Sequential(router), optimizer)
        router.train()
        router(mine)
        attachment.commit()
        results.append(router.weight.clone())
    return results


def test_first_centroids_are_those_of_one_process(tmp_path: Path) -> None:
    want = first_centroids(0, 1)
    for rank in run_on_ranks(first_centroids, 2, tmp_path, 2):
        for one, other in zip(rank, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def refusals(rank: int) -> list[str]:
    """The messages of attach for models that differ between the ranks, and of a router that is not attached."""
    messages = []
    models = [
        nn.Sequential(KMeansRouter(D, E, K, tau=0.1 + rank)),
        nn.Sequential(*[KMeansRouter(D, E, K) for _ in range(1 + rank)]),
        nn.Sequential(KMeansRouter(D, E, K, seed=rank)),
    ]
    for model in models:
        try:
            attach(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
        except RuntimeError as error:
            messages.append(str(error))
    try:
        KMeansRouter(D, E, K).train()(torch.randn(4, D))
    except RuntimeError as error:
        messages.append(str(error))
    return messages


def test_what_is_refused_on_every_rank(tmp_path: Path) -> None:
    for messages in run_on_ranks(refusals, 2, tmp_path):
        assert len(messages) == 4
        assert "other options of '0' on rank 1" in messages[0]
        assert "got other names: rank 1 has ['0', '1'], rank 0 has ['0']" in messages[1]
        assert "another state of '0' on rank 1" in messages[2]
        assert "must be attached" in messages[3]


HANGS_S = 3.0


def wait_for(path: Path) -> None:
    """Until another process has made the file."""
    end = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < end, f"nobody made {path.name}"
        time.sleep(0.01)


def survive(rank: int, folder: str, cases: tuple[str, ...]) -> None:
    """Rank 1 hangs, then dies; rank 0 writes down what it got, and after how many seconds.

    Only the commit is under the short timeout. Rank 1 begins when rank 0 is about to commit, and hangs until it has.
    """
    told = {}
    for case in cases:
        long = datetime.timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("gloo", f"file://{folder}/{case}", rank=rank, world_size=2, timeout=long)
        about_to, done = Path(folder) / f"{case}-begins", Path(folder) / f"{case}-ends"
        router = KMeansRouter(D, E, K)
        attachment = attach(nn.Sequential(router), torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
        short_timeout(HANGS_S)
        if rank == 1:
            wait_for(about_to)
            if case == "dies":
                os._exit(7)
            wait_for(done)
        else:
            router.train()(torch.randn(8, D))
            about_to.touch()
            start = time.monotonic()
            try:
                attachment.commit()
            except RuntimeError as error:
                told[case] = (time.monotonic() - start, str(error), int(router.pending.num_tokens))
            done.touch()
        dist.destroy_process_group()
    torch.save(told, Path(folder) / "told.pt")


def test_a_rank_that_hangs_or_dies_ends_the_others(tmp_path: Path) -> None:
    """Within the group's timeout, with an error; what was pending is still there."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=survive, args=(rank, str(tmp_path), ("hangs", "dies"))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
        assert not process.is_alive()
    assert [process.exitcode for process in processes] == [0, 7]
    told = torch.load(tmp_path / "told.pt")
    assert list(told) == ["hangs", "dies"]
    for case, (seconds, message, pending) in told.items():
        assert message, case
        assert seconds < TIMEOUT_S / 2, case
        assert pending == 8, case
    assert told["hangs"][0] > HANGS_S / 2


def copies(rank: int) -> bool:
    """A copy of an attached model holds the same, and commits nothing."""
    model = make()
    attachment = attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(2):
        model(shard(batch(step), rank, 2, "even")).sum().backward()
        attachment.commit()
    equal = []
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module):
        for key, tensor in model.state_dict().items():
            equal.append(torch.equal(other.state_dict()[key], tensor))
        other.eval()(batch(3))
        again = attach(other, torch.optim.SGD(other.parameters(), lr=0.1))
        equal.append(list(again.routers) == list(attachment.routers))
    return all(equal)


def test_an_attached_model_can_be_copied(tmp_path: Path) -> None:
    assert run_on_ranks(copies, 2, tmp_path) == [True, True]


def group_of_two(rank: int) -> Tensor:
    """Ranks 0 and 1 exchange, 2 and 3 exchange; the two pairs see other tokens."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    router = KMeansRouter(D, E, K, init="normal")
    attachment = attach(nn.Sequential(router), torch.optim.SGD([nn.Parameter(torch.zeros(1))]), groups[rank // 2])
    router.train()(torch.randn(10, D, generator=torch.Generator().manual_seed(rank)))
    check = Exchange(groups[rank // 2])
    check.start([router])
    (merged,) = check.finish()
    attachment.commit()
    assert int(merged.num_tokens) == 20
    return router.weight.clone()


def test_a_group_of_the_callers_choice(tmp_path: Path) -> None:
    weights = run_on_ranks(group_of_two, 4, tmp_path)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2])
