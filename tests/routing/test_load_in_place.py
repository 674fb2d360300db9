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


OPTIONS = [{}, {"average": "cumulative", "balance": "quantile"}, {"init": "normal"}, {"init": "kmeans++"}]
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
    assert router.pending.hashes.numel() == router.pending.rows.numel() == 0


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_trained_router_gathers_first_data_anew(options: dict[str, Any], between: str) -> None:
    fresh, router = KMeansRouter(D, E, K, seed=1, **options), trained(**options, seed=1)
    write_in_place(router, state_of(fresh))
    router = BETWEEN[between](router)
    for one in (fresh, router):
        train(one, 3, 4)
    assert bool(router.initialized)
    assert_same(router, state_of(fresh))


@pytest.mark.parametrize("steps", [0, 3])
def test_what_is_pending_is_dropped_by_the_next_forward(steps: int) -> None:
    """A run that rolls back after a bad batch forgets the batch too."""
    router, straight = trained(steps), trained(steps)
    before = state_of(router)
    if steps:
        train(router, 7)
    router(hidden_states(8))
    write_in_place(router, before)
    with pytest.warns(UserWarning, match="drops 120 pending tokens"):
        router(hidden_states(3))
    assert int(router.pending.num_tokens) == 120
    router.commit()
    train(straight, 3)
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
    blank = state_of(router)
    write_in_place(router, state_of(straight))
    for step in (3, 4):
        compiled(hidden_states(step))
        router.commit()
        train(straight, step)
        assert_same(router, state_of(straight))

    write_in_place(router, blank)
    compiled(hidden_states(5))
    with pytest.warns(UserWarning, match="drops 120 pending tokens"):
        router.commit()  # without a reservoir nothing can set the centroids
    assert_same(router, blank)
    fresh = KMeansRouter(D, E, K, seed=1)
    for step in (6, 7):
        compiled(hidden_states(step))
        router.commit()
        train(fresh, step)
    assert_same(router, state_of(fresh))


@pytest.mark.parametrize("name", KMeansRouter.FP32_STATE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("steps", [0, 3])
def test_non_finite_state_is_refused_by_name_until_it_is_mended(name: str, value: float, steps: int) -> None:
    router = trained(steps, name="layers.3")
    router(hidden_states(3))
    bad, good = state_of(router), state_of(trained())
    bad[name].view(-1)[-1] = value
    write_in_place(router, bad)
    message = f"{name} of router 'layers.3' must be finite, got NaN or Inf written in place"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            router(hidden_states(3))
        with pytest.raises(RuntimeError, match=message):
            router.commit()
    assert_same(router, bad)
    write_in_place(router, good)
    with pytest.warns(UserWarning, match="drops 120 pending tokens"):
        train(router, 3)
    assert_same(router, state_of(trained(4)))


class ReadBacks(TorchDispatchMode):
    """Counts values that are read back to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_ordinary_step_reads_nothing_back() -> None:
    router = trained(1)
    with ReadBacks() as reads:
        train(router, 1, 2)
    assert reads.count == 0
    write_in_place(router, state_of(router))
    with ReadBacks() as reads:
        train(router, 3, 4)
    assert reads.count > 0, "the test can see a read"


def under_ddp(rank: int, loaded: State) -> list[bool]:
    """Only rank 0 has loaded a state, which DDP broadcasts; then whether each step left the flag's trace alone, and
    counted every token of all ranks."""
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
        before = router._seen
        for part in range(2):  # each with a broadcast before it, which must not drop what the other has gathered
            root(hidden_states(2 * step + rank + 10 * part)).sum().backward()
        optimizer.step()
        found.append(router._seen == before)
        found.append(int(router.tokens_per_expert.sum()) == 2 * 2 * 120 * K)
    return [*found, int(router.steps) == int(loaded["steps"]) + 3]


def test_ddp_hands_a_loaded_state_on_and_its_broadcasts_are_no_loads(tmp_path: Path) -> None:
    """Read at the first forward of the rank that has loaded nothing, and never for the broadcast before each one."""
    loaded, other = run_on_ranks(under_ddp, 2, tmp_path, state_of(trained()))
    assert loaded == [True] * 7
    assert other == [False] + [True] * 6
