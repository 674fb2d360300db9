"""State that came in part, or cast: directions alone, averages without counters, untrained state of another seed."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.nn.parallel import DistributedDataParallel

from kmeans_route import KMeansRouter, LearnedRouter, MoE, attach, reference
from tests.helpers.compare import assert_same_bits, generator
from tests.helpers.ranks import run_on_ranks

D, E, K, T = 16, 6, 2, 60
State = dict[str, Tensor]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"average": "cumulative"},
    {"directions": "centroids", "init": "normal"},
]
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")


def hidden_states(seed: int) -> Tensor:
    return torch.randn(T, D, generator=generator(seed))


def train(router: KMeansRouter, *seeds: int) -> None:
    for seed in seeds:
        router(hidden_states(seed))
        router.commit()


def trained(**options: Any) -> KMeansRouter:
    router = KMeansRouter(D, E, K, **options)
    train(router, 0, 1, 2)
    return router


def learned_gate() -> Tensor:
    return LearnedRouter(D, E, K).weight.detach().clone()


def turned(old: Tensor, new: Tensor) -> float:
    """The largest angle in radians between rows."""
    return float(torch.acos(torch.cosine_similarity(old.double(), new.double()).clamp(-1, 1)).max())


def written(given: Tensor, directions: str = "whitened") -> Tensor:
    """What a commit writes for averages of the given directions, before any token moves them."""
    unit = reference.directions_reference(given, torch.float32)
    return reference.whitened_reference(unit, unit) if directions == "whitened" else unit


def assert_goes_on(router: KMeansRouter, given: Tensor, backend: str = "torch") -> None:
    """From given averages: each of three commits turns their directions by less than 1e-2, as the reference averages
    them."""
    router.backend = backend
    old, centroids = written(given, router.commit_options.directions), written(given, "centroids")
    for seed in (3, 4, 5):
        router(hidden_states(seed))
        pending = copy.deepcopy(router.pending)
        router.commit()
        seen = (router.steps - 1).float() / router.steps if router.tokens_seen is None else None
        beta = torch.tensor(0.999) if seen is None else seen.clamp_max(0.999)
        if router.tokens_seen is not None:
            beta = ((router.tokens_seen - pending.counts).float() / router.tokens_seen)[:, None]
        mean = pending.sums / pending.counts.clamp_min(1)[:, None]
        centroids = torch.where(pending.counts[:, None] > 0, beta * centroids + (1 - beta) * mean, centroids)
        torch.testing.assert_close(router.centroids, centroids, rtol=0, atol=1e-6)
        assert turned(old, router.weight) < 1e-2
        old = router.weight.clone()
    assert not torch.equal(router.centroids, reference.directions_reference(given, torch.float32))


# ---- directions alone ----


def by_load(router: KMeansRouter, gate: Tensor) -> KMeansRouter:
    with pytest.warns(UserWarning, match="a weight without centroids: taken as given centroids"):
        router.load_state_dict({"weight": gate}, strict=False)
    return router


def by_load_onto_meta(router: KMeansRouter, gate: Tensor) -> KMeansRouter:
    committed = router.commit_options
    options = {"average": committed.average, "directions": committed.directions, "init": router.init}
    router = KMeansRouter(D, E, K, device="meta", **options)
    with pytest.warns(UserWarning, match="a weight without centroids: taken as given centroids"):
        router.load_state_dict({"weight": gate.clone()}, strict=False, assign=True)
    return router


def in_place(router: KMeansRouter, gate: Tensor) -> KMeansRouter:
    router.state_dict()["weight"].copy_(gate)
    return router


def data_replaced_with_tokens_pending(router: KMeansRouter, gate: Tensor) -> KMeansRouter:
    router(hidden_states(7))
    router.weight.data = gate.clone()
    router.commit()
    train(router, 8)
    return router


def saved_before_a_commit(router: KMeansRouter, gate: Tensor) -> KMeansRouter:
    """A state dict behaves as the state: that nobody has trained it yet does not make its directions first rows."""
    other = copy.deepcopy(router)
    in_place(other, gate)
    router.load_state_dict(other.state_dict())
    return router


WAYS: dict[str, Callable[[KMeansRouter, Tensor], KMeansRouter]] = {
    "load_state_dict": by_load,
    "onto meta": by_load_onto_meta,
    "in place": in_place,
    "saved before a commit": saved_before_a_commit,
}


@pytest.mark.filterwarnings("ignore:.*must be loaded whole")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)  # "reference" commits as "torch"
def test_a_weight_without_centroids_goes_on_slowly(options: dict[str, Any], way: str, backend: str) -> None:
    gate = learned_gate()
    assert_goes_on(WAYS[way](KMeansRouter(D, E, K, **options), gate), gate, backend)


def test_a_weight_written_while_tokens_of_the_first_data_are_pending_is_told_and_kept() -> None:
    router, gate = KMeansRouter(D, E, K), learned_gate()
    with pytest.warns(UserWarning, match="a weight without centroids: taken as given centroids"):
        data_replaced_with_tokens_pending(router, gate)
    assert turned(written(gate), router.weight) < 1e-2
    assert int(router.steps) == 999 + 2


def test_one_of_two_layers() -> None:
    model = nn.Sequential(MoE(D, 8, E, K, name="a"), nn.LayerNorm(D), MoE(D, 8, E, K, name="b"))
    first, second = model[0].router, model[2].router
    optimizer, gate = torch.optim.SGD(model.parameters(), 0.0), learned_gate()
    attach(model, optimizer)
    second.weight.data.copy_(gate)
    for step in range(3):
        model(hidden_states(step)).sum().backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        assert ["router 'b'" in str(each.message) for each in said] == ([True] if step == 0 else [])
        assert (int(first.steps), int(second.steps)) == (step, 1000 + step)
    assert turned(written(gate), second.weight) < 3e-2


# ---- averages without what counts ----


@pytest.mark.parametrize("left_out", [["steps"], ["tokens_seen"], ["steps", "tokens_seen", "dropped_total"]], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_centroids_without_counters_by_load_state_dict(assign: bool, left_out: list[str]) -> None:
    source = trained(average="cumulative")
    state = {name: value for name, value in copy.deepcopy(source.state_dict()).items() if name not in left_out}
    router = KMeansRouter(D, E, K, average="cumulative", device="meta" if assign else None)
    with pytest.warns(UserWarning, match="centroids without .* taken as given"):
        router.load_state_dict(state, strict=False, assign=assign)
    assert int(router.steps) == (999 if "steps" in left_out else 2)
    seen = torch.full((E,), 10_000_000) if "tokens_seen" in left_out else source.tokens_seen
    assert torch.equal(router.tokens_seen, seen)
    assert_same_bits(router.weight, source.weight)
    train(router, 3)
    assert "tokens_seen" not in left_out or turned(source.weight, router.weight) < 1e-2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("had_data", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)  # "reference" commits as "torch"
def test_floats_alone_in_place(had_data: bool, options: dict[str, Any], backend: str) -> None:
    """As an EMA library copies them; into a fresh router, and into one whose integers were then lost."""
    source = trained(**options)
    router = trained(seed=3, **options) if had_data else KMeansRouter(D, E, K, seed=3, **options)
    router.backend = backend
    for name, held in router.named_buffers():
        held.data.copy_(source.get_buffer(name)) if held.is_floating_point() else held.data.zero_()
    old = source.weight
    for seed in (3, 4, 5):
        train(router, seed)
        assert turned(old, router.weight) < 1e-2
        old = router.weight.clone()
    assert int(router.steps) == 999 + 3
    assert router.tokens_seen is None or int(router.tokens_seen.min()) >= 10_000_000


def test_tokens_seen_left_behind_in_place() -> None:
    """As dcp.load leaves it, with allow_partial_load, where the run before averaged with "ema"."""
    source, router = trained(), KMeansRouter(D, E, K, average="cumulative")
    for name, held in source.state_dict().items():
        router.get_buffer(name).copy_(held)
    router(hidden_states(3))
    with pytest.warns(UserWarning, match="centroids without tokens_seen: taken as given"):
        router.commit()
    assert turned(source.weight, router.weight) < 1e-2
    assert int(router.steps) == int(source.steps) + 1


SPOILED: dict[str, Callable[[KMeansRouter], Any]] = {
    "no average in a row": lambda router: router.centroids[0].zero_(),
    "no average": lambda router: router.centroids.zero_(),
    "no direction": lambda router: (router.weight[0].zero_(), router.centroids[0].zero_()),
    "steps lost": lambda router: router.steps.zero_(),
    "counters lost": lambda router: [each.zero_() for each in (router.steps, router.tokens_seen) if each is not None],
    "steps lost, NaN in the scale": lambda router: (router.steps.zero_(), router.score_std.fill_(torch.nan)),
    "no norm of an average in fp32": lambda router: router.centroids[0].fill_(1e30),
    "no norm of a direction in fp32": lambda router: router.weight[0].fill_(1e30),
    "NaN in weight": lambda router: router.weight[0, 0].fill_(torch.nan),
    "Inf in weight": lambda router: router.weight[0, 0].fill_(-torch.inf),
    "NaN in all averages": lambda router: router.centroids.fill_(torch.nan),
    "Inf in the bias": lambda router: router.expert_bias[0].fill_(torch.inf),
}


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("options", [{"balance": "quantile"}, {"average": "cumulative"}], ids=str)
def test_the_kernel_commits_spoiled_state_as_the_reference_does(options: dict[str, Any], spoil: str) -> None:
    source = trained(**options)
    source(hidden_states(3)[:20])
    SPOILED[spoil](source)
    for skip in (None, True):
        want, got = copy.deepcopy(source), copy.deepcopy(source)
        want.backend, got.backend = "torch", "triton"
        for one in (want, got):
            one.commit(None if skip is None else torch.tensor(skip))
            one.commit()  # nothing is pending, but where it was skipped
        plain = {name: getattr(want, name) for name in want.PLAIN_TENSORS}
        for name, value in {**dict(want.named_buffers()), **plain}.items():
            torch.testing.assert_close(getattr(got, name), value, rtol=1e-5, atol=2e-6, msg=name)
        for name, value in want.pending.statistics._asdict().items():
            assert torch.equal(getattr(got.pending, name), value), name


# ---- casts past the module ----


def cast(router: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    for buffer in router.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def assert_own_dtypes(router: KMeansRouter) -> None:
    for name, buffer in router.named_buffers():
        assert buffer.dtype == (torch.int64 if name in router.INT64_STATE else torch.float32), name
        assert not buffer.is_inference(), name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("plain_empty")
def test_a_cast_of_every_float_before_each_step_is_told_once_and_the_average_goes_on(compiled: bool) -> None:
    """As DeepSpeed casts. What is wrong is the rounding of each step, 2^-9 of a value, and not a stalled average."""
    router, plain = KMeansRouter(D, E, K), KMeansRouter(D, E, K)
    call = torch.compile(router, backend="eager", fullgraph=True) if compiled else router
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(12):
            cast(router)
            with torch.no_grad():
                ids = plain.route(hidden_states(step)).indices
            call(hidden_states(step), indices=ids)
            assert_own_dtypes(router)
            router.commit()
            plain(hidden_states(step), indices=ids)
            plain.commit()
    assert sum("must keep its dtypes" in str(each.message) for each in said) == 1
    assert int(router.steps) == int(plain.steps) == 11
    torch.testing.assert_close(router.centroids, plain.centroids, rtol=0, atol=12 * 2**-9 * 0.5)
    start = KMeansRouter(D, E, K)
    train(start, 0)
    gap = (plain.centroids - start.centroids).norm()
    assert (router.centroids - plain.centroids).norm() < 0.05 * gap


@pytest.mark.filterwarnings("ignore:.*must keep its dtypes")
@pytest.mark.parametrize("between", ["forward in inference mode", "commit", "state_dict", "load", "restore", "reset"])
def test_whatever_comes_next_has_the_own_dtypes_again(between: str) -> None:
    router, source = trained(), trained(seed=4)
    kept, x = router.snapshot(), hidden_states(5)
    cast(router)
    router.steps.data = router.steps.data.float()
    if between == "forward in inference mode":
        with torch.inference_mode():
            router.eval()(x)
    elif between == "commit":
        router.commit()
    elif between == "state_dict":
        assert {value.dtype for value in router.state_dict().values()} == {torch.float32, torch.int64}
    elif between == "load":
        router.load_state_dict(source.state_dict())
        assert_same_bits(router.centroids, source.centroids)
    elif between == "restore":
        router.restore(kept)
        assert_same_bits(router.centroids, trained().centroids)
    else:
        router.reset_parameters()
        assert_same_bits(router.weight, KMeansRouter(D, E, K).weight)
    assert_own_dtypes(router)
    router.train()(x.requires_grad_()).weights[:, 0].sum().backward()
    router.commit()


def test_buffers_set_past_a_router_on_meta_and_first_used_in_inference_mode() -> None:
    router, source = KMeansRouter(D, E, K, device="meta"), trained()
    for name, value in source.state_dict().items():
        router._buffers[name] = value.clone()
    with torch.inference_mode():
        router.eval()(hidden_states(3))
    for one in (router.train(), source):
        train(one, 3, 4)
    for name, value in source.state_dict().items():
        assert_same_bits(router.get_buffer(name), value)


@pytest.mark.parametrize("what", ["made", "initialize", "set_centroids", "load", "load untrained", "restore", "reset"])
def test_what_inference_mode_has_set_is_trained_on(what: str) -> None:
    fresh, given = KMeansRouter(D, E, K), torch.randn(E, D)
    router, state = trained(), trained(seed=4).state_dict()
    with torch.inference_mode():
        if what == "made":
            router = KMeansRouter(D, E, K)
        elif what == "initialize":
            router.initialize(hidden_states(7))
        elif what == "set_centroids":
            router.set_centroids(given)
        elif what.startswith("load"):
            router.load_state_dict(state if what == "load" else fresh.state_dict())
        elif what == "restore":
            router.restore(router.snapshot())
        else:
            router.reset_parameters()
        if what in ("made", "load untrained", "reset"):
            assert_same_bits(router.weight, fresh.weight)
    assert_own_dtypes(router)
    steps = int(router.steps)
    train(router, 5, 6)
    assert int(router.steps) == steps + 2 - (what in ("made", "load untrained", "reset"))


def test_the_first_commit_may_come_in_inference_mode() -> None:
    router, plain = KMeansRouter(D, E, K), KMeansRouter(D, E, K)
    for one in (router, plain):
        one(hidden_states(1))
        with torch.inference_mode(one is router):
            one.commit()
        train(one, 2)
    assert_same_bits(router.weight, plain.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)  # "reference" commits as "torch"
def test_a_checkpoint_cast_whole_and_assigned(dtype: torch.dtype, backend: str) -> None:
    source = trained(average="cumulative")
    router = KMeansRouter(D, E, K, average="cumulative", backend=backend)
    router.load_state_dict({name: value.to(dtype) for name, value in source.state_dict().items()}, assign=True)
    assert_own_dtypes(router)
    for one in (source, router):
        train(one, 3, 4, 5)
    assert int(router.steps) == int(source.steps) == 5
    assert_own_dtypes(router)
    torch.testing.assert_close(router.weight, source.weight, rtol=0, atol=0.02 if dtype != torch.float32 else 1e-6)


def under_fsdp1(rank: int) -> tuple[State, list[str]]:
    model = nn.Sequential(nn.Linear(D, D), MoE(D, 8, E, K))
    low = torch.bfloat16
    precision = MixedPrecision(param_dtype=low, reduce_dtype=low, buffer_dtype=low)
    root = FullyShardedDataParallel(model, device_id=torch.device("cpu"), mixed_precision=precision)
    router = next(module for module in root.modules() if isinstance(module, KMeansRouter))
    optimizer = torch.optim.SGD(root.parameters(), 0.0)
    attach(root, optimizer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            root(hidden_states(step)).sum().backward()
            optimizer.step()
    assert_own_dtypes(router)
    return router.state_dict(), [str(each.message) for each in said if "must keep its dtypes" in str(each.message)]


def test_fsdp1_with_buffers_in_bfloat16(tmp_path: Path) -> None:
    [(state, said)] = run_on_ranks(under_fsdp1, 1, tmp_path)
    assert int(state["steps"]) == 2, "the first data came first"
    assert state["centroids"].any(1).all()
    assert len(said) == 1
    assert not torch.equal(state["weight"], state["weight"].bfloat16().float()), "averages are not rounded each step"


# ---- untrained state of another seed ----


@pytest.mark.parametrize("way", ["load_state_dict", "in place", "cast", "weight alone"])
@pytest.mark.parametrize("init", ["tokens", "normal"])
def test_untrained_state_of_another_seed_still_takes_its_first_data(init: str, way: str) -> None:
    """It routes by the rows that came, and the first commit sets centroids as that of any router does."""
    source, router = KMeansRouter(D, E, K, seed=9, init=init), KMeansRouter(D, E, K, init=init)
    state = source.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way == "in place":
            for name, held in router.state_dict().items():
                held.copy_(state[name])
        elif way == "cast":
            router.load_state_dict({name: value.half() for name, value in state.items()})
        else:
            router.load_state_dict(state if way == "load_state_dict" else {"weight": source.weight}, strict=False)
    x = hidden_states(0)
    if way != "cast":
        assert torch.equal(router.eval()(x).indices, source.eval()(x).indices)
    for one in (router.train(), source.train()):
        train(one, 0)
    assert int(router.steps) == int(source.steps) == (1 if init == "normal" else 0)
    torch.testing.assert_close(router.centroids, source.centroids, rtol=0, atol=1e-2 if way == "cast" else 0)
    want = reference.whitened_reference(router.centroids, router.weight)
    torch.testing.assert_close(router.weight, want, rtol=0, atol=1e-5)


def on_two_ranks(rank: int, kind: str, options: dict[str, Any], gate: Tensor) -> list[tuple[int, int, State]]:
    """Rank 0 alone has a state, which DDP hands on; of each step what was counted, the steps, and the state."""
    warnings.simplefilter("ignore")
    model = nn.Sequential(nn.Linear(D, D), MoE(D, 8, E, K))
    router = model[1].router
    if rank == 0 and kind == "untrained":
        router.load_state_dict(KMeansRouter(D, E, K, seed=9).state_dict())
    elif rank == 0 and kind == "gate":
        router.load_state_dict({"weight": gate}, strict=False)
    elif rank == 0:
        router.weight.data.copy_(gate)
    root, optimizer = DistributedDataParallel(model), torch.optim.SGD(model.parameters(), 0.0)
    attach(root, optimizer, **options)
    found = []
    for step in range(3):
        for part in range(2):
            root(hidden_states(4 * step + 2 * part + rank)).sum().backward()
        optimizer.step()
        state = {name: value.clone() for name, value in router.state_dict().items()}
        found.append((int(router.tokens_per_expert.sum()), int(router.steps), state))
    return found


@pytest.mark.parametrize("options", [{}, {"overlap_after": 2}, {"shard": True, "wire": "bf16"}], ids=str)
@pytest.mark.parametrize("kind", ["untrained", "gate", "gate in place"])
def test_ranks_agree_where_only_one_has_loaded(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    gate = learned_gate()
    loaded, other = run_on_ranks(on_two_ranks, 2, tmp_path, kind, options, gate)
    old = written(gate)
    for step, (ours, theirs) in enumerate(zip(loaded, other, strict=True)):
        assert ours[:2] == theirs[:2] == (2 * 2 * T * K, step if kind == "untrained" else 1000 + step)
        for name, value in ours[2].items():
            assert_same_bits(theirs[2][name], value, name)
        if kind != "untrained":
            assert turned(old, ours[2]["weight"]) < 1e-2
            old = ours[2]["weight"]
