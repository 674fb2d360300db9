"""Who may write the state, in any order between forwards, backward passes and commits: hypothesis draws.

Held after every step: routing is that by what lies in `weight`, averages move by a commit or a writer alone, the state
is fp32 and finite, every token counts once.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import kmeans_route
from kmeans_route import KMeansRouter, reference
from kmeans_route.routing.loading import CentroidState
from tests.helpers.compare import assert_same_bits, generator
from tests.helpers.writers import WRITERS

D, E, K, T = 8, 4, 2, 12
SEEDS = st.integers(0, 5)
FLOATS = ("weight", "centroids", "expert_bias", "score_std")
OPTIONS: list[dict[str, Any]] = [
    {}, {"directions": "centroids"}, {"average": "cumulative"},
    {"init": "normal", "balance": "quantile"},
]  # fmt: skip


def rows(seed: int, number: int = T) -> Tensor:
    return torch.randn(number, D, generator=generator(seed))


def trained(seed: int, **options: Any) -> KMeansRouter:
    router = KMeansRouter(D, E, K, seed=seed, **options)
    for step in range(3):
        router(rows(10 * seed + step))
        router.commit()
    return router


def by_collective(held: Tensor, new: Tensor) -> None:
    dist.all_gather_into_tensor(held, new.contiguous())


BY_WHOM: dict[str, Callable[[Tensor, Tensor], Any]] = {**WRITERS, "collective": by_collective}


class Writers(RuleBasedStateMachine):
    """One router and all that happens to it."""

    @initialize(options=st.sampled_from(OPTIONS), had_data=st.booleans())
    def begin(self, options: dict[str, Any], had_data: bool) -> None:
        self.options = options
        self.router = trained(0, **options) if had_data else KMeansRouter(D, E, K, **options)
        self.average = copy.deepcopy(self.router)
        self.tokens = 0
        self.remember()

    def remember(self) -> None:
        """The averages as the last writer or commit left them."""
        self.centroids = self.router.centroids.float().clone()

    @rule(seed=SEEDS, recompute=st.sampled_from([None, False, True]))
    def train(self, seed: int, recompute: bool | None) -> None:
        """A forward and its backward, plain or with activation checkpointing."""
        x = rows(seed).requires_grad_()
        if recompute:
            weights = checkpoint(lambda x: self.router(x).weights, x, use_reentrant=False)
        else:
            weights = self.router(x).weights
        if recompute is not None:
            weights[:, 0].sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all()
        self.tokens += T

    @rule(seed=SEEDS, inference=st.booleans())
    def evaluate(self, seed: int, inference: bool) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            self.router(rows(seed))

    @rule(skip=st.sampled_from([None, False, True]))
    def commit(self, skip: bool | None) -> None:
        """As the reference does it; the first data of a router without any sets centroids alone."""
        router, pending = self.router, copy.deepcopy(self.router.pending)
        weight, had_data = router.weight.float().clone(), router.has_data
        same_rows = had_data or router._has_first_rows()
        whitens = router.commit_options.directions == "whitened"
        before = reference.State(*(self.held(name) for name in reference.State._fields))
        router.commit(None if skip is None else torch.tensor(skip))
        go = bool(pending.num_tokens) and not skip
        if not had_data and not same_rows:
            given = reference.directions_reference(weight, torch.float32)
            before = before._replace(centroids=given, steps=router.steps - int(go), tokens_seen=given_tokens(before))
            kept = reference.whitened_reference(given, given) if go and whitens else given
            assert float(torch.cosine_similarity(kept, router.weight).min()) > 0.9, "given directions were wiped"
        if go and not had_data and same_rows and router.init != "normal":
            assert bool(router.centroids.any(1).all())
            assert int(router.steps) == int(before.steps), "first data sets nothing else"
        elif go:
            hist = pending.margin_hist if router.want_hist else None
            want = reference.commit_reference(
                before, pending.sums, pending.counts, pending.std_sum, pending.num_tokens, hist, router.commit_options
            )
            for name, value in want._asdict().items():
                if value is not None and not (whitens and name == "weight"):
                    torch.testing.assert_close(getattr(router, name), value, rtol=0, atol=2e-6, msg=name)
        if go and whitens:
            want = reference.whitened_reference(router.centroids.double(), weight.double())
            torch.testing.assert_close(router.weight.double(), want, rtol=0, atol=2e-5)
        self.tokens = 0 if go else self.tokens
        self.remember()

    def held(self, name: str) -> Tensor | None:
        """A copy of a buffer, in the dtype that it should have."""
        value: Tensor | None = getattr(self.router, name)
        return None if value is None else value.clone().to(torch.float32 if name in FLOATS else torch.int64)

    @rule(writer=st.sampled_from(sorted(BY_WHOM)), seed=SEEDS, name=st.sampled_from(["weight", "expert_bias"]))
    def write(self, writer: str, seed: int, name: str) -> None:
        held = self.router.get_buffer(name)
        new = torch.randn(held.shape, generator=generator(seed))
        BY_WHOM[writer](held, (new if name == "weight" else 0.1 * new).to(held.dtype))

    @rule(seed=SEEDS, in_place=st.booleans(), assign=st.booleans())
    def load(self, seed: int, in_place: bool, assign: bool) -> None:
        """The whole state of another run; loading by the module drops what is pending, in place nothing does."""
        state = copy.deepcopy(trained(seed, **self.options).state_dict())
        if in_place:
            for name, held in self.router.named_buffers():
                held.data.copy_(state[name])
        else:
            self.router.load_state_dict(state, assign=assign)
            self.tokens = 0
        self.remember()

    @rule(seed=SEEDS)
    def resume(self, seed: int) -> None:
        """A new router, and a checkpoint written into its buffers, as `dcp.load` does it; then a step."""
        state = trained(seed, **self.options).state_dict()
        self.router = KMeansRouter(D, E, K, **self.options)
        for name, held in self.router.named_buffers():
            held.copy_(state[name])
        self.tokens = 0
        self.remember()
        self.train(seed, None)
        self.commit(None)

    @rule(seed=SEEDS)
    def load_directions(self, seed: int) -> None:
        """A checkpoint that has `weight` alone: given centroids."""
        self.router.load_state_dict({"weight": rows(seed, E)}, strict=False)
        self.tokens = 0
        torch.testing.assert_close(self.router.centroids, nn.functional.normalize(rows(seed, E)))
        self.remember()

    @rule(seed=SEEDS)
    def call_with_other_state(self, seed: int) -> None:
        """The call routes by what it is given, and the next one by the router's own."""
        other, x = {"weight": rows(seed, E)}, rows(seed + 1)
        was_training = self.router.training
        got = functional_call(self.router.eval(), other, (x,))
        self.router.train(was_training)
        want = kmeans_route.route(x, other["weight"], K, self.router.expert_bias.float())
        assert torch.equal(got.indices, want.indices)

    @rule()
    def go_on_with_a_copy(self) -> None:
        self.router = copy.deepcopy(self.router)

    @rule()
    def go_on_with_an_average(self) -> None:
        """As EMA libraries do it: floats averaged past the module, integers as they were when the copy was made."""
        for name in FLOATS:
            held, new = self.average.get_buffer(name), self.router.get_buffer(name).float()
            held.data = held.data.float().lerp(new, 0.5)
        self.router, self.average = self.average, self.router
        self.tokens = int(self.router.pending.num_tokens)
        self.remember()

    @rule(how=st.sampled_from(["to", ".data", "one", "ints"]))
    def cast(self, how: str) -> None:
        """By the module, which keeps its dtypes, or past it, which rounds."""
        if how == "to":
            self.router.to(torch.bfloat16)
            return
        for name, buffer in self.router.named_buffers():
            if buffer.is_floating_point() == (how != "ints") and (how != "one" or name == "centroids"):
                buffer.data = buffer.data.to(torch.bfloat16)
        self.remember()

    @invariant()
    def routes_by_what_lies_there(self) -> None:
        if not hasattr(self, "router"):
            return
        x, router = rows(99), self.router
        with torch.no_grad():
            got = router.route(x)
        for name, buffer in router.named_buffers():
            if name in FLOATS:
                assert buffer.dtype == torch.float32, name
                assert buffer.isfinite().all(), name
        want = kmeans_route.route(x, router.weight, K, router.expert_bias, tau=router.options.tau)
        assert_same_bits(got.indices, want.indices)
        assert_same_bits(got.weights, want.weights)
        assert_same_bits(router.centroids, self.centroids, "averages move by a commit alone")
        assert int(router.pending.num_tokens) == self.tokens


def given_tokens(state: reference.State) -> Tensor | None:
    return None if state.tokens_seen is None else torch.full_like(state.tokens_seen, reference.GIVEN_TOKENS)


def draw(sequences: int, *, shrink: bool = True) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            Writers,
            settings=settings(
                max_examples=sequences,
                stateful_step_count=20,
                deadline=None,
                derandomize=True,
                database=None,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            ),
        )


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sequences", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_order_of_writers(sequences: int) -> None:
    draw(sequences)


def kept_by_address_and_version(router: KMeansRouter, dtype: torch.dtype, backend: Any) -> Tensor:
    """The cache that was: right until somebody writes past the version counter."""
    kept = router.__dict__.setdefault("_fault", {})
    key = (dtype, router.weight.data_ptr(), router.weight._version)
    if kept.get("key") != key:
        kept.update(key=key, unit=backend.directions(router.weight, dtype))
    unit: Tensor = kept["unit"]
    return unit


def wipes_what_was_written(router: KMeansRouter) -> None:
    """Only its own flag says whether there is data."""
    router._own_dtypes_again(tell=False)


FAULTS: dict[str, tuple[type, str, Any]] = {
    "a cache of directions": (KMeansRouter, "_unit_rows", kept_by_address_and_version),
    "no own dtypes": (KMeansRouter, "_own_dtypes_again", lambda router, tell: None),
    "a flag in place of the content": (CentroidState, "before_commit", wipes_what_was_written),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, planted = FAULTS[fault]
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises((AssertionError, RuntimeError)):
        draw(500, shrink=False)
