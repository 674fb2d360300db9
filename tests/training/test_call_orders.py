"""Calls in any order, drawn by hypothesis, against a plain model of what a router must hold after each."""

import copy
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from kmeans_route import KMeansRouter, LearnedRouter, attach
from kmeans_route.reference import whitened_reference
from kmeans_route.routing.loading import FIRST_NORM
from kmeans_route.types import RouterOutput
from tests.helpers.compare import assert_same_bits, generator

D, E, K = 8, 5, 2
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative-quantile": {"average": "cumulative", "balance": "quantile", "gate": "sigmoid"},
    "normal-raw-sign": {"init": "normal", "accumulate": "raw", "balance": "sign"},
    "centroids": {"directions": "centroids"},
    "reference": {"backend": "reference", "decay": 0.9, "return_scores": True},
    "learned-sign": {"kind": "sigmoid"},
    "learned-quantile": {"kind": "sigmoid", "balance": "quantile"},
}
State = dict[str, Tensor]
Router = KMeansRouter | LearnedRouter


def make(kind: str) -> Router:
    return LearnedRouter(D, E, K, **KINDS[kind]) if kind.startswith("learned") else KMeansRouter(D, E, K, **KINDS[kind])


def held_by(router: Router) -> State:
    tensors = [*router.named_buffers(), *router.named_parameters()]
    return {name: tensor.detach().clone() for name, tensor in tensors if name != "unsaved"}


def pending_of(router: Router) -> State:
    return {field: getattr(router.pending, field).clone() for field in router.pending.FIELDS}


def assert_equal(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_same_bits(got[name], value, name)


class Still(torch.optim.SGD):
    """Moves nothing, and like a fused optimizer leaves `found_inf` to the device: its step hooks always run."""

    found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> None:
        pass


class Root(nn.Module):
    """What is attached: a model around the router."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor, mask: Tensor | None) -> RouterOutput:
        output = self.router(x, mask)
        assert isinstance(output, RouterOutput)
        return output


@dataclass
class Expected:
    """Pending tokens, valid and dropped; commits; tokens dropped so far; whether data has set the centroids."""

    tokens: int = 0
    dropped: int = 0
    steps: int = 0
    dropped_total: int = 0
    initialized: bool = False


@dataclass
class Batch:
    """x (T, D), mask (T,) or None, and which rows are valid or dropped."""

    x: Tensor
    mask: Tensor | None
    valid: Tensor
    dropped: int


BATCHES = {
    "num_tokens": st.sampled_from([30, 30, 3, 1, 0]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "bad": st.sampled_from([(), (0.0,), (torch.nan,), (torch.inf, torch.nan), (-torch.inf, 0.0, 1e30)]),
    "masked": st.sampled_from(["no", "some", "some", "all"]),
    "seed": st.integers(0, 9),
}


class Calls(RuleBasedStateMachine):
    """`self.state` is what the router must hold, bit for bit; only rules that may move it take it anew."""

    @initialize(kind=st.sampled_from(list(KINDS)), attached=st.booleans(), steps=st.integers(0, 2))
    def begin(self, kind: str, attached: bool, steps: int) -> None:
        self.kind, self.attached = kind, attached
        self.router = make(kind)
        self.learned = isinstance(self.router, LearnedRouter)
        self.expected = Expected(initialized=self.learned)
        self.left_behind: list[tuple[Router, State, State]] = []
        self.loss: Tensor | None = None
        self.probe = torch.randn(7, D, generator=generator(99))
        self.tie()
        self.take()
        self.saved = [(self.state, copy.copy(self.expected))]
        for step in range(steps):
            self.train_step(num_tokens=30, dtype=torch.float32, bad=(torch.nan,), masked="some", seed=step)

    def tie(self) -> None:
        self.root = Root(self.router)
        self.root.train(self.router.training)
        if self.attached:
            self.optimizer = Still([nn.Parameter(torch.zeros(1))])
            self.attachment = attach(self.root, self.optimizer)

    def freeze(self, frozen: bool) -> None:
        self.router.freeze(frozen)
        if frozen:  # which drops what is pending
            self.expected.tokens = self.expected.dropped = 0

    def take(self) -> None:
        self.state = held_by(self.router)

    def batch(self, num_tokens: int, dtype: torch.dtype, bad: tuple[float, ...], masked: str, seed: int) -> Batch:
        gen = generator(seed)
        x = torch.randn(num_tokens, D, generator=gen) * 3
        mask = None if masked == "no" else torch.rand(num_tokens, generator=gen) < (0.7 if masked == "some" else 0)
        for row, value in enumerate(bad[:num_tokens]):
            if not self.learned:  # which shields itself from what is masked, and from nothing else
                x[row, row] = value
                x[row] = 0.0 if value == 0.0 else x[row]
            elif mask is not None and not mask[row]:
                x[row] = value
        x = x.to(self.router.weight.dtype if self.learned else dtype)
        wanted = torch.ones(num_tokens, dtype=torch.bool) if mask is None else mask
        squares = x.float().square().sum(1)
        valid = wanted if self.learned else wanted & (squares >= 1e-30) & (squares < torch.inf)
        return Batch(x, mask, valid, int((wanted & ~valid).sum()))

    # Forward and backward

    @rule(**BATCHES)
    def train_step(self, **drawn: Any) -> None:
        self.root.train()
        self.router.freeze(False)
        self.call("grad", **drawn)
        self.fold(None, "step")

    @rule(
        mode=st.sampled_from(["grad", "grad", "grad", "no_grad", "inference"]),
        training=st.booleans(),
        frozen=st.sampled_from([False, False, True]),
        **BATCHES,
    )
    def forward(self, mode: str, training: bool, frozen: bool, **drawn: Any) -> None:
        self.root.train(training)
        self.freeze(frozen)
        self.call(mode, **drawn)

    def call(self, mode: str, **drawn: Any) -> None:
        batch = self.batch(**drawn)
        counts = self.root.training and mode == "grad" and not self.router.frozen
        x = batch.x.requires_grad_(mode == "grad")
        again = self.router.route(x, batch.mask)
        with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            output = self.root(x, batch.mask)
        assert_same_bits(output.weights, again.weights, "weights")
        assert_same_bits(output.indices, again.indices, "indices")
        assert output.weights.isfinite().all()
        assert not output.weights[~batch.valid].any()
        assert (output.indices.sort(1).values.diff(dim=1) > 0).all()
        assert ((output.indices >= 0) & (output.indices < E)).all()
        if counts:
            self.expected.tokens += int(batch.valid.sum())
            self.expected.dropped += batch.dropped
        if mode == "grad":
            self.loss, self.x, self.valid = (output.weights * torch.arange(1.0, K + 1)).sum(), x, batch.valid

    @precondition(lambda self: self.loss is not None)
    @rule()
    def backward(self) -> None:
        """However long ago the forward was, and whatever has moved since."""
        assert self.loss is not None
        (gradient,) = torch.autograd.grad(self.loss, self.x)
        assert gradient.isfinite().all()
        assert not gradient[~self.valid].any()
        self.loss = None

    @rule(width=st.sampled_from([1, D + 1]))
    def refused_forward(self, width: int) -> None:
        with pytest.raises(ValueError, match="x must have shape"):
            self.root(torch.ones(3, width), None)

    def forget_graph(self) -> None:
        if self.learned:  # a backward after its parameter was written is refused by autograd
            self.loss = None

    # Commit

    @rule(
        gather=st.sampled_from([True, True, False]),
        frozen=st.sampled_from([False, False, False, True]),
        skip=st.sampled_from([True, None, True, False]),
        how=st.sampled_from(["step", "commit"]),
        **BATCHES,
    )
    def commit(self, gather: bool, frozen: bool, skip: bool | None, how: str, **drawn: Any) -> None:
        if gather:
            self.call("grad", **drawn)
        self.freeze(frozen)
        self.fold(skip, how)

    def fold(self, skip: bool | None, how: str) -> None:
        before, gathered, loads = held_by(self.router), pending_of(self.router), self.router.tokens_per_expert.clone()
        # A router whose data was written over with a state that has none keeps no tokens any more.
        waits = not self.expected.initialized and self.router._awaits_data
        flag = None if skip is None else torch.tensor(skip)
        if self.attached and how == "step":
            self.optimizer.found_inf = None if flag is None else flag.float().reshape(1)
            self.optimizer.step()
        elif self.attached:
            self.attachment.commit(flag)
        else:
            self.router.commit(flag)
        e = self.expected
        if self.router.frozen or skip or (e.tokens == 0 and (e.dropped == 0 or waits)):
            assert_equal(held_by(self.router), before)
            for name, value in pending_of(self.router).items():
                if value.numel():  # a commit that finds data lets the moments go
                    assert_same_bits(value, gathered[name], name)
            assert torch.equal(self.router.tokens_per_expert, loads)
            return
        first_data = waits and KINDS[self.kind].get("init") != "normal"
        if e.tokens:
            assert torch.equal(self.router.tokens_per_expert, gathered["counts"])
            e.steps += not first_data
            e.initialized = True
        else:
            assert torch.equal(self.router.tokens_per_expert, loads)
        if isinstance(self.router, KMeansRouter):
            self.check_move(self.router, before, gathered, first_data)
        e.dropped_total += e.dropped
        e.tokens = e.dropped = 0
        self.take()

    def check_move(self, router: KMeansRouter, before: State, gathered: State, first_data: bool) -> None:
        if first_data:
            assert_same_bits(router.expert_bias, before["expert_bias"])
            assert_same_bits(router.score_std, before["score_std"])
            return
        counts = gathered["counts"][:, None]
        if router.average == "cumulative":
            beta = before["tokens_seen"][:, None] / (before["tokens_seen"][:, None] + counts)
        else:
            steps = int(before["steps"])
            beta = torch.tensor(min(router.commit_options.decay, steps / (steps + 1)))
        beta = torch.where(before["centroids"].any(1, keepdim=True), beta, 0.0)  # the first average stands for itself
        moved = beta * before["centroids"] + (1 - beta) * gathered["sums"] / counts
        torch.testing.assert_close(router.centroids, torch.where(counts > 0, moved, before["centroids"]))
        assert_same_bits(router.centroids[counts[:, 0] == 0], before["centroids"][counts[:, 0] == 0])
        some = router.centroids.any(1)
        assert_same_bits(router.weight[~some], before["weight"][~some])
        if router.commit_options.directions == "centroids":
            torch.testing.assert_close(router.weight[some], nn.functional.normalize(router.centroids[some]))
        elif counts.any():
            want = whitened_reference(router.centroids.double(), before["weight"].double())
            # The nearer a centroid lies to the mean of all, the more of its direction is rounding: 0 / 0 where all are.
            off_mean = (router.centroids - router.centroids[some].mean(0)).norm(dim=1)
            slack = (1e-2 * off_mean[some].mean() / off_mean).nan_to_num(1.0).clamp_min(1)
            assert ((router.weight.double() - want).abs().amax(1) <= 2e-5 * slack).all()
        else:
            assert_same_bits(router.weight, before["weight"])

    # State

    @rule(call=st.sampled_from(["train", "eval", "freeze", "unfreeze"]))
    def switch(self, call: str) -> None:
        if call in ("train", "eval"):
            self.root.train(call == "train")
        else:
            self.freeze(call == "freeze")

    @rule(then=st.sampled_from(["nothing", "nothing", "refuse shape", "refuse nan"]))
    def save(self, then: str) -> None:
        state = {name: value.clone() for name, value in self.router.state_dict().items()}
        self.saved.append((state, copy.copy(self.expected)))
        if then == "nothing":
            return
        broken = {name: value.clone() for name, value in state.items()}
        if then == "refuse shape":
            broken["expert_bias"] = torch.zeros(E + 1)
        else:
            broken["weight"][0, 0] = torch.nan
        with pytest.raises(RuntimeError, match=r"expert_bias must have shape|weight must be finite"):
            self.router.load_state_dict(broken)

    @rule(
        gather=st.sampled_from([False, True]),
        which=st.integers(-3, -1),
        in_place=st.sampled_from([True, False]),
        **BATCHES,
    )
    def load(self, gather: bool, which: int, in_place: bool, **drawn: Any) -> None:
        if gather:
            self.call("grad", **drawn)
        state, then = self.saved[max(which, -len(self.saved))]
        nothing_pending = self.expected.tokens == self.expected.dropped == 0
        if nothing_pending and in_place:
            for name, held in self.router.state_dict().items():
                held.copy_(state[name])
            self.router.freeze(self.router.frozen)  # what is pinned stays until this is said again
        else:
            self.router.load_state_dict(state)
        self.forget_graph()
        self.expected = Expected(0, 0, then.steps, then.dropped_total, then.initialized)
        self.state = {name: value.to(self.state[name].dtype) for name, value in state.items()}

    @rule(how=st.sampled_from(["deepcopy", "pickle", torch.bfloat16, torch.float32, torch.float64]))
    def copy_or_cast(self, how: str | torch.dtype) -> None:
        if isinstance(how, torch.dtype):
            self.root.to(how)
            self.forget_graph()
            if self.learned:
                assert self.router.weight.dtype == how
                self.state["weight"] = self.state["weight"].to(how)
            return
        old = self.router
        frozen, training = old.frozen, old.training
        self.router = copy.deepcopy(old) if how == "deepcopy" else pickle.loads(pickle.dumps(old))
        assert (self.router.frozen, self.router.training) == (frozen, training)
        self.left_behind = [(old, held_by(old), pending_of(old))]
        self.tie()

    # Centroids given

    @rule(how=st.sampled_from(["set_centroids", "initialize", "reset"]), **BATCHES)
    def begin_anew(self, how: str, **drawn: Any) -> None:
        if how == "reset" or isinstance(self.router, LearnedRouter):
            self.router.reset_parameters()
            self.forget_graph()
            self.expected = Expected(initialized=self.learned)
            fresh = held_by(make(self.kind))
            self.state = {name: value.to(self.state[name].dtype) for name, value in fresh.items()}
        elif how == "initialize":
            self.initialize_from(self.router, self.batch(**drawn))
        else:
            self.set_centroids(self.router, drawn["seed"])

    def set_centroids(self, router: KMeansRouter, seed: int) -> None:
        rows = torch.randn(E, D, generator=generator(seed)) * 5
        raw = router.accumulate == "raw"
        router.set_centroids(rows, averages=raw)
        decay = router.commit_options.decay
        self.expected = Expected(steps=round(decay / (1 - decay)), initialized=True)
        if raw:
            assert_same_bits(router.centroids, rows)
        else:
            torch.testing.assert_close(router.weight, nn.functional.normalize(rows))
        assert not router.expert_bias.any()
        self.take()

    def initialize_from(self, router: KMeansRouter, batch: Batch) -> None:
        if not batch.valid.any():
            with pytest.raises(ValueError, match="at least one valid token"):
                router.initialize(batch.x, batch.mask)
            return
        frozen = router.frozen
        router.initialize(batch.x, batch.mask)
        assert router.frozen == frozen
        steps = int(router.init == "normal")
        self.expected = Expected(steps=steps, dropped_total=batch.dropped, initialized=True)
        self.take()

    # What always holds

    @invariant()
    def the_state_is_what_it_must_be(self) -> None:
        assert_equal(held_by(self.router), self.state)
        for name, buffer in self.router.named_buffers():
            assert buffer.isfinite().all(), name
            assert buffer.dtype == torch.float32 or not buffer.is_floating_point(), name
        if isinstance(self.router, KMeansRouter):
            e = self.expected
            assert int(self.router.steps) == e.steps
            assert int(self.router.dropped_total) == e.dropped_total
            assert bool(self.router.initialized) == e.initialized
            if self.router.accumulate == "unit":
                assert self.router.centroids.norm(dim=1).max() <= 1 + 1e-5
            lengths = torch.where(self.router.centroids.any(1), 1.0, FIRST_NORM)
            torch.testing.assert_close(self.router.weight.norm(dim=1), lengths, rtol=1e-5, atol=0)

    @invariant()
    def pending_is_what_was_counted(self) -> None:
        p = self.router.pending
        assert int(p.num_tokens) == self.expected.tokens
        assert int(p.counts.sum()) == K * self.expected.tokens
        if isinstance(self.router, KMeansRouter):
            assert int(p.num_dropped) == self.expected.dropped
        assert p.sums.isfinite().all()
        assert p.moments.isfinite().all()
        if self.expected.tokens == 0:
            assert not p.sums.any()
            assert not p.margin_hist.any()
            assert float(p.std_sum) == 0

    @invariant()
    def a_new_router_of_this_state_routes_alike(self) -> None:
        if self.learned and self.router.weight.dtype != torch.float32:
            return
        other = make(self.kind)
        other.load_state_dict(self.state)
        got, want = self.router.route(self.probe), other.route(self.probe)
        assert_same_bits(got.weights, want.weights)
        assert_same_bits(got.indices, want.indices)

    @invariant()
    def what_was_copied_stays(self) -> None:
        for router, state, pending in self.left_behind:
            assert_equal(held_by(router), state)
            assert_equal(pending_of(router), pending)


@pytest.mark.parametrize(
    ("profile", "examples", "calls"), [("fast", 100, 30), pytest.param("slow", 500, 50, marks=pytest.mark.slow)]
)
def test_calls_in_any_order(profile: str, examples: int, calls: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Shrinking takes minutes: the slow lane may, the fast one shows the calls as drawn.
        phases = [phase for phase in Phase if profile == "slow" or phase is not Phase.shrink]
        wanted = settings(
            settings.get_profile(profile), max_examples=examples, stateful_step_count=calls, phases=phases
        )
        run_state_machine_as_test(Calls, settings=wanted)
