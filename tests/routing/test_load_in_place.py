"""State written into the buffers without `load_state_dict`, as torch.distributed.checkpoint.load writes it."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from kmeans_route import KMeansRouter, MoE, attach
from tests.helpers.compare import assert_same_bits, generator
from tests.helpers.ranks import run_on_ranks

D, E, K = 16, 6, 2
State = dict[str, Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nothing commits its statistics"),
    pytest.mark.filterwarnings("ignore:.*tokens pending, which a state dict"),
]


def hidden_states(seed: int, num_tokens: int = 120) -> Tensor:
    gen = generator(seed)
    return torch.randn(num_tokens, D, generator=gen) + 0.5 * torch.randn(D, generator=gen)


def train(router: nn.Module, *seeds: int) -> None:
    for seed in seeds:
        router(hidden_states(seed))
        router.commit()  # type: ignore[operator]


def trained(steps: int = 3, **options: Any) -> KMeansRouter:
    router = KMeansRouter(D, E, K, **options)
    train(router, *range(steps))
    return router


def state_of(module: nn.Module) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: value.clone() for name, value in module.state_dict().items()}


def write_in_place(module: nn.Module, state: State) -> None:
    for name, held in module.state_dict().items():
        held.copy_(state[name])


def assert_same(module: nn.Module, want: State) -> None:
    got = state_of(module)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_same_bits(got[name], value, name)


OPTIONS = [{}, {"average": "cumulative", "balance": "quantile"}, {"init": "normal"}]
BETWEEN: dict[str, Callable[[KMeansRouter], KMeansRouter]] = {
    "at once": lambda router: router,
    "deepcopy": copy.deepcopy,
    "cast": lambda router: router.to(torch.bfloat16),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_fresh_router_goes_on_from_what_was_written(options: dict[str, Any], between: str) -> None:
    """The first commit averages: it does not set the loaded centroids from first data."""
    straight, router = trained(**options), KMeansRouter(D, E, K, seed=1, **options)
    write_in_place(router, state_of(straight))
    router = BETWEEN[between](router)
    for one in (straight, router):
        train(one, 3, 4)
    assert_same(router, state_of(straight))
    assert router.pending.moments.numel() == 0


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_trained_router_starts_again_from_a_state_without_data(options: dict[str, Any], between: str) -> None:
    """It keeps no moments any more, so that its first averages set the centroids, as with init="normal"."""
    fresh, router = KMeansRouter(D, E, K, seed=1, **{**options, "init": "normal"}), trained(**options, seed=1)
    write_in_place(router, state_of(fresh))
    router = BETWEEN[between](router)
    for one in (fresh, router):
        train(one, 3, 4)
    assert router.has_data
    assert_same(router, state_of(fresh))


@pytest.mark.parametrize("steps", [0, 3])
def test_what_is_pending_stays_and_load_state_dict_drops_it(steps: int) -> None:
    """Nothing tells that the buffers were written; a run that rolls back within a step loads by the module."""
    router, straight = trained(steps), trained(steps)
    before = state_of(router)
    router(hidden_states(8))
    write_in_place(router, before)
    assert int(router.pending.num_tokens) == 120
    with pytest.warns(UserWarning, match="drops 120 pending tokens"):
        router.load_state_dict(before)
    for one in (router, straight):
        train(one, 3)
    assert_same(router, state_of(straight))


@pytest.mark.parametrize("steps", [0, 3])
def test_copies_and_casts_are_no_loads(steps: int) -> None:
    router = trained(steps)
    router(hidden_states(3))
    other = copy.deepcopy(router).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (router, other):
            one(hidden_states(4))
            assert int(one.pending.num_tokens) == 240
            one.commit()
    assert_same(other, state_of(router))


@pytest.mark.usefixtures("plain_empty")
def test_under_compile_the_commit_notices() -> None:
    straight, router = trained(), KMeansRouter(D, E, K, seed=1)
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    write_in_place(router, state_of(straight))
    for step in (3, 4):
        compiled(hidden_states(step))
        router.commit()
        train(straight, step)
        assert_same(router, state_of(straight))


@pytest.mark.parametrize("name", KMeansRouter.FP32_STATE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("balance", ["proportional", "none"])
def test_the_next_commit_mends_state_that_is_not_finite(name: str, value: float, balance: str, backend: str) -> None:
    """A value that is not finite counts as 0: its expert's average starts anew, and nobody else's moves."""
    router = trained(balance=balance, backend=backend)
    clean, bad = trained(balance=balance, backend=backend), state_of(router)
    bad[name].view(-1)[-1] = value
    write_in_place(router, bad)
    ids = torch.stack([torch.arange(120) % E, (torch.arange(120) + 1) % E], 1)
    for one in (router, clean):
        out = one(hidden_states(3), indices=ids)
        assert out.weights.isfinite().all()
        one.commit()
        assert int(one.steps) == 3
    for each in KMeansRouter.FP32_STATE:
        assert getattr(router, each).isfinite().all(), each
    if name == "weight":
        assert_same_bits(router.centroids, clean.centroids)
        assert_same_bits(router.weight, clean.weight)
    if name == "centroids":
        want = clean.centroids.clone()
        want[-1, -1] -= 2 / 3 * trained(balance=balance, backend=backend).centroids[-1, -1]
        torch.testing.assert_close(router.centroids, want, rtol=0, atol=1e-6)


class ReadBacks(TorchDispatchMode):
    """Counts values that are read back to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_ordinary_step_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the shortcuts on a CPU, which a device does not take."""
    monkeypatch.setattr("kmeans_route.backends.torch_statistics.at_hand", lambda values: False)
    router = trained(1)
    with ReadBacks() as reads:
        train(router, 1, 2)
    assert reads.count == 0
    with ReadBacks() as reads:
        train(KMeansRouter(D, E, K), 3)
    assert reads.count > 0, "the test can see a read"


def under_ddp(rank: int, loaded: State) -> list[bool]:
    """Only rank 0 has loaded a state, which DDP broadcasts; then whether each step counted every token of all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), MoE(D, 8, E, K))
    router = model[1].router
    assert isinstance(router, KMeansRouter)
    if rank == 0:
        router.load_state_dict(loaded)
    root = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    attach(root, optimizer)
    found = []
    for step in range(3):
        for part in range(2):  # each with a broadcast before it, which must not drop what the other has gathered
            root(hidden_states(2 * step + rank + 10 * part)).sum().backward()
        optimizer.step()
        found.append(int(router.tokens_per_expert.sum()) == 2 * 2 * 120 * K)
    return [*found, int(router.steps) == int(loaded["steps"]) + 3]


def test_ddp_hands_a_loaded_state_on_and_its_broadcasts_are_no_loads(tmp_path: Path) -> None:
    """The rank that has loaded nothing finds at its first commit what the broadcast before the forward has brought."""
    loaded, other = run_on_ranks(under_ddp, 2, tmp_path, state_of(trained()))
    assert loaded == other == [True] * 4
