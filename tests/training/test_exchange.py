"""The ways in which ranks exchange: beside the backward pass, in bf16 with error feedback, sharded; their bytes."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.exchange import recorded, sent_by_a_ring, wire_bytes
from kmeans_route import KMeansRouter, LearnedRouter, MoE, attach
from kmeans_route.training.attach import Attachment
from tests.helpers.compare import generator
from tests.helpers.ranks import run_on_ranks

D, E, K, RANKS = 16, 8, 2, 4
WIRES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"wire": "bf16"},
    "shard": {"shard": True},
    "shard-bf16": {"shard": True, "wire": "bf16"},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "ema": {},
    "cumulative": {"average": "cumulative", "balance": "quantile"},
    "normal": {"init": "normal", "accumulate": "raw", "balance": "sign"},
}


class Still(torch.optim.SGD):
    """Moves nothing and, like a fused optimizer, leaves `found_inf` to the device."""

    found_inf: Tensor

    def step(self, closure: Any = None) -> None:
        pass


def make(seed: int = 0) -> nn.Module:
    """Routers of several kinds and sizes; their elements do not divide by the number of ranks."""
    torch.manual_seed(seed)
    routers: list[nn.Module] = [
        KMeansRouter(D, E + i, K, name=name, **o) for i, (name, o) in enumerate(ROUTERS.items())
    ]
    return Together([*routers, LearnedRouter(D, E, K, kind="sigmoid"), KMeansRouter(5, 3, 1, name="odd")])


class Together(nn.Module):
    """Every router sees the same tokens, or as many of their columns as it takes."""

    def __init__(self, routers: list[nn.Module]) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        weights = [router(x[:, : router.hidden_size] * self.scale)[0] for router in self.routers]
        return torch.stack([w.float().square().sum() for w in weights]).sum()


def batch(step: int, num_tokens: int = 96) -> Tensor:
    gen = generator(step)
    x = torch.randn(num_tokens, D, generator=gen) + torch.linspace(-0.5, 0.5, D)
    x[3] = torch.nan
    return x


def state_of(model: nn.Module) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, KMeansRouter):
            state[f"{name}.turn"] = module.centroid_turn.clone()
    return state


def tie(model: nn.Module, **options: Any) -> tuple[Attachment, Still]:
    optimizer = Still(model.parameters(), lr=0.0)
    return attach(model, optimizer, **options), optimizer


def train(model: nn.Module, optimizer: Still, rank: int, num_ranks: int, steps: range, micro: int = 1) -> None:
    for step in steps:
        for part in batch(step).chunk(num_ranks)[rank].chunk(micro):
            model(part).backward()
        optimizer.step()


def every_wire(rank: int, num_ranks: int) -> dict[str, list[dict[str, Tensor]]]:
    """For each wire: the state two commits after equal centroids, and after four more."""
    states = {}
    for name, options in WIRES.items():
        model = make()
        attachment, optimizer = tie(model)
        train(model, optimizer, rank, num_ranks, range(1))
        attachment.remove()
        attachment, optimizer = tie(model, **options)
        train(model, optimizer, rank, num_ranks, range(1, 2))
        states[name] = [state_of(model)]
        train(model, optimizer, rank, num_ranks, range(2, 6))
        states[name].append(state_of(model))
        attachment.remove()
    return states


def test_every_wire_commits_what_one_process_would(tmp_path: Path) -> None:
    """Equal bits on all ranks, always; from equal centroids, counters exact, the rest within the wire's rounding."""
    want = every_wire(0, 1)["fp32"][0]
    ranks = run_on_ranks(every_wire, RANKS, tmp_path, RANKS)
    for name in WIRES:
        for early_or_late, state in enumerate(ranks[0][name]):
            for key, tensor in state.items():
                assert all(torch.equal(rank[name][early_or_late][key], tensor) for rank in ranks), (name, key)
        for key, tensor in want.items():
            got = ranks[0][name][0][key]
            if tensor.is_floating_point():  # sums of some 24 rows of length 1, rounded to 2^-9 once or twice
                tolerance = 1e-6 if name == "fp32" else 4e-3
                torch.testing.assert_close(got, tensor, rtol=0, atol=tolerance, msg=f"{name} {key}")
            else:
                assert torch.equal(got, tensor), (name, key)


def feedback(rank: int, num_ranks: int) -> dict[str, list[float]]:
    """The same tokens again and again: without feedback, the same rounding error again and again."""
    errors = {}
    for name in ("bf16", "shard", "shard-bf16"):
        plain, other = (nn.Sequential(KMeansRouter(D, 2, 1, average="cumulative", balance="none")) for _ in range(2))
        ties = [tie_of(plain), tie_of(other, **WIRES[name])]
        tokens = batch(1)[4:].chunk(num_ranks)[rank]
        errors[name] = []
        for step in range(41):
            for model, (_, optimizer) in zip((plain, other), ties, strict=True):
                if step == 1:
                    model[0].set_centroids(torch.eye(2, D), tokens_seen=0)
                model(tokens)
                optimizer.step()
            carried = ties[1][0]._exchange
            exact = other[0].centroids.clone()
            if name.startswith("shard"):  # what the owner holds beside the rounded centroids
                flat = torch.zeros(num_ranks, carried.left_of_chunk.numel())
                dist.all_gather(list(flat.unbind()), carried.left_of_chunk)
                exact += flat.view(-1)[: exact.numel()].view(exact.shape)
            errors[name].append(float((exact - plain[0].centroids).abs().max()))
        for attachment, _ in ties:
            attachment.remove()
    return errors


def tie_of(model: nn.Module, **options: Any) -> tuple[Attachment, Still]:
    optimizer = Still([nn.Parameter(torch.zeros(1))], lr=0.0)
    return attach(model, optimizer, **options), optimizer


def test_error_feedback_lets_nothing_pile_up(tmp_path: Path) -> None:
    """A mean over n equal batches is off by one rounding / n; without feedback it would stay off by one rounding."""
    for errors in run_on_ranks(feedback, 2, tmp_path, 2):
        for name in ("bf16", "shard-bf16"):
            early, late = max(errors[name][1:4]), max(errors[name][-4:])
            assert early > 1e-4, (name, "rounding must be seen at all")
            assert late < early / 5, (name, early, late)
        assert max(errors["shard"]) < 1e-6


def overlapped(rank: int, num_ranks: int) -> dict[str, dict[str, Tensor]]:
    """Step for step against the exchange after the step, with more, fewer and other forwards than were said."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, options in WIRES.items():
        for after in (0, 2):
            model = make()
            attachment, optimizer = tie(model, overlap_after=after, every_n_steps=1, **options)
            for step, micro in enumerate((2, 2, 1, 3, 5, 2)):
                train(model, optimizer, rank, num_ranks, range(step, step + 1), micro)
                model(batch(40 + step)[rank::num_ranks]).backward()  # the first micro-batch of the next step
                model.eval()
                model(batch(50))
                model.train()
                with torch.no_grad():
                    model(batch(51))
            if after and rank == 0:
                assert attachment._exchange is not None
            optimizer.step()
            states[f"{name}-{after}"] = state_of(model)
            attachment.remove()
    return states


def test_overlapping_changes_no_bit(tmp_path: Path) -> None:
    for states in run_on_ranks(overlapped, 2, tmp_path, 2):
        for name in WIRES:
            for key, tensor in states[f"{name}-0"].items():
                assert torch.equal(states[f"{name}-2"][key], tensor), (name, key)


def drop(how: str, model: nn.Module, attachment: Attachment, before: dict[str, Any]) -> None:
    """Ways in which what is pending ends between its forward and the commit."""
    routers = list(attachment.routers.values())
    averaging = [router for router in routers if isinstance(router, KMeansRouter)]
    if how in ("trained", "untrained"):
        model.load_state_dict(before[how])
    for router, snapshot in zip(averaging, before["snapshots"], strict=True):
        if how == "set_centroids":
            router.set_centroids(torch.randn(router.weight.shape, generator=generator(3)), averages=True)
        elif how == "restore":
            router.restore(snapshot)
        elif how == "initialize":
            router.initialize(batch(60)[4:, : router.hidden_size])
    for router in routers:
        if how == "by hand":
            router.commit()
        elif how == "reset":
            router.reset_parameters()
        elif how == "freeze":
            router.freeze().freeze(False)
        elif how == "clear" or isinstance(router, LearnedRouter):
            router.pending.clear_()


DROPS = ("trained", "untrained", "set_centroids", "restore", "initialize", "by hand", "reset", "freeze", "clear")


def dropped(rank: int, num_ranks: int) -> dict[str, list[bool]]:
    """Whether a step after the drop changes nothing, and whether the next ones are as if nothing had overlapped."""
    result = {}
    for name, how in [*(("fp32", how) for how in DROPS), ("shard-bf16", "trained"), ("shard-bf16", "by hand")]:
        ends, stays = [], True
        for after in (0, 1):
            model = make()
            untrained = state_dict_of(model)
            attachment, optimizer = tie(model, overlap_after=after, **WIRES[name])
            train(model, optimizer, rank, num_ranks, range(3))
            snapshots = [
                router.snapshot() for router in attachment.routers.values() if isinstance(router, KMeansRouter)
            ]
            before = {"trained": state_dict_of(model), "untrained": untrained, "snapshots": snapshots}
            model(batch(3).chunk(num_ranks)[rank]).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                drop(how, model, attachment, before)
            held = state_of(model)
            optimizer.step()
            ends.append(state_of(model))
            stays &= all(torch.equal(ends[-1][key], held[key]) for key in held)
            train(model, optimizer, rank, num_ranks, range(4, 6))
            ends[-1] = state_of(model)
            attachment.remove()
        result[f"{name} {how}"] = [stays, all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])]
    return result


def state_dict_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_what_is_dropped_or_committed_meanwhile_is_not_committed_by_the_exchange_under_way(tmp_path: Path) -> None:
    for result in run_on_ranks(dropped, 2, tmp_path, 2):
        assert [name for name, right in result.items() if right != [True, True]] == []
        assert len(result) == len(DROPS) + 2


def calls_of_a_step(rank: int, num_ranks: int) -> dict[str, list[list[tuple[str, int]]]]:
    """For each wire: what a forward, the backward pass and the step of the second commit send."""
    found = {}
    for name, options in {**WIRES, "overlap": {"overlap_after": 1}, "every-2": {"every_n_steps": 2}}.items():
        model = Together([KMeansRouter(D, E, K, name=str(i)) for i in range(3)])
        attachment, optimizer = tie(model, **options)
        train(model, optimizer, rank, num_ranks, range(2))
        stages: list[list[tuple[str, int]]] = [[], [], []]
        with recorded(stages[0]):
            loss = model(batch(2).chunk(num_ranks)[rank])
        with recorded(stages[1]):
            loss.backward()
        with recorded(stages[2]):
            optimizer.step()
        found[name] = stages
        attachment.remove()
    return found


def test_one_exchange_a_step_and_its_bytes(tmp_path: Path) -> None:
    """All layers in one call a dtype, and `wire_bytes` is what a ring sends of these buffers."""
    sums, counted = 3 * 4 * E * D, 3 * 8 * (E + 2)
    for calls in run_on_ranks(calls_of_a_step, RANKS, tmp_path, RANKS):
        after = {name: stages[2] for name, stages in calls.items()}
        assert sorted(after["fp32"]) == [("all_reduce", counted), ("all_reduce", sums + 3 * 4)]
        small = [("all_reduce", 3 * 4), ("all_reduce", counted)]
        assert sorted(after["bf16"]) == [("all_gather", sums // 2 // RANKS), *small, ("all_to_all", sums // 2)]
        assert sorted(after["shard"]) == [("all_gather", sums // 2 // RANKS), *small, ("all_to_all", sums)]
        assert after["overlap"] == after["every-2"] == []
        assert sorted(calls["overlap"][0]) == sorted(after["fp32"])
        assert all(stages[1] == [] for stages in calls.values())
        for name, options in WIRES.items():
            sent = sent_by_a_ring(after[name], RANKS)
            assert sent == pytest.approx(3 * wire_bytes(E, D, RANKS, **options))


def resumed(rank: int, num_ranks: int, folder: str) -> list[bool]:
    """Six steps, against three, saved to a file, loaded into a new model, and three more."""
    equal = []
    for name, options in WIRES.items():
        whole, first, second = make(), make(), make(seed=1)
        attachment, optimizer = tie(whole, **options)
        train(whole, optimizer, rank, num_ranks, range(6))
        attachment.remove()
        attachment, optimizer = tie(first, **options)
        train(first, optimizer, rank, num_ranks, range(3))
        path = f"{folder}/{name}-{rank}.pt"
        torch.save({"model": first.state_dict(), "attachment": attachment.state_dict()}, path)
        attachment.remove()
        saved = torch.load(path)
        with pytest.raises(ValueError, match=r"state_dict must hold .* got none of \['left_of_chunk'\]: load what"):
            attachment.load_state_dict({"steps": 1, "left_by": [], "left_of_sums": torch.zeros(1)})
        second.load_state_dict(saved["model"])
        attachment, optimizer = tie(second, **options)
        attachment.load_state_dict(saved["attachment"])
        train(second, optimizer, rank, num_ranks, range(3, 6))
        attachment.remove()
        want, got = whole.state_dict(), second.state_dict()
        equal.append(all(torch.equal(got[key], want[key]) for key in want))
    return equal


def test_resuming_with_the_attachments_state_is_bit_for_bit(tmp_path: Path) -> None:
    for equal in run_on_ranks(resumed, 2, tmp_path / "run", 2, str(tmp_path)):
        assert equal == [True] * len(WIRES)


def swapped(rank: int, num_ranks: int) -> dict[str, list[bool]]:
    """One router is frozen as another of its shape is thawed: against an attachment that has left nothing out yet."""
    result = {}
    for name in ("bf16", "shard", "shard-bf16"):
        ends = []
        for how in ("go on", "attach", "load"):
            model = Together([KMeansRouter(D, E, K, name=str(i), balance="none") for i in range(2)])
            attachment, optimizer = tie(model, **WIRES[name])
            one, other = attachment.routers.values()
            train(model, optimizer, rank, num_ranks, range(2))
            other.freeze()
            train(model, optimizer, rank, num_ranks, range(2, 5))
            saved = attachment.state_dict()
            some = bool(saved["left_of_sums"].any() or saved["left_of_chunk"].any())
            if how != "go on":
                attachment.remove()
                attachment, optimizer = tie(model, **WIRES[name])
            if how == "load":
                attachment.load_state_dict(saved)
            one.freeze()
            other.freeze(False)
            train(model, optimizer, rank, num_ranks, range(5, 6))
            ends.append(state_of(model))
            attachment.remove()
        result[name] = [some, *(all(torch.equal(end[key], ends[1][key]) for key in end) for end in ends)]
    return result


def test_what_rounding_left_out_of_one_router_never_reaches_another(tmp_path: Path) -> None:
    for result in run_on_ranks(swapped, 2, tmp_path, 2):
        assert result == {name: [True] * 4 for name in ("bf16", "shard", "shard-bf16")}


def loaded_meanwhile(rank: int, num_ranks: int) -> bool:
    """What an attachment loads while an exchange is under way, against the same between two steps."""
    ends = []
    for after in (0, 1):
        model = make()
        attachment, optimizer = tie(model, overlap_after=after, wire="bf16")
        train(model, optimizer, rank, num_ranks, range(3))
        saved = attachment.state_dict()
        train(model, optimizer, rank, num_ranks, range(3, 5))
        model(batch(5).chunk(num_ranks)[rank]).backward()
        attachment.load_state_dict(saved)
        optimizer.step()
        ends.append({**state_of(model), "left": attachment.state_dict()["left_of_sums"]})
        attachment.remove()
    return all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_an_attachment_may_be_loaded_while_an_exchange_is_under_way(tmp_path: Path) -> None:
    assert run_on_ranks(loaded_meanwhile, 2, tmp_path, 2) == [True, True]


def skipping(rank: int, num_ranks: int) -> dict[str, list[bool]]:
    """One rank alone meets an overflow: no rank commits, and the next commit holds both batches."""
    result = {}
    for name, options in WIRES.items():
        skipped, joined = make(), make()
        for model in (skipped, joined):  # centroids in full fp32, which a skipped step must not round either
            attachment, optimizer = tie(model)
            train(model, optimizer, rank, num_ranks, range(3))
            attachment.remove()
        ties = [tie(model, **options) for model in (skipped, joined)]
        ties[1][1].found_inf = torch.zeros(1)
        before = state_of(skipped)
        ties[0][1].found_inf = torch.full((1,), float(rank == 1))
        train(skipped, ties[0][1], rank, num_ranks, range(3, 4))
        after = state_of(skipped)
        ties[0][1].found_inf = torch.zeros(1)
        joined(batch(3).chunk(num_ranks)[rank])
        for model, (_, optimizer) in zip((skipped, joined), ties, strict=True):
            train(model, optimizer, rank, num_ranks, range(4, 5))
        ends = state_of(skipped), state_of(joined)
        result[name] = [
            all(torch.equal(after[key], before[key]) for key in before),
            all(torch.equal(ends[0][key], ends[1][key]) for key in before),
        ]
        for attachment, _ in ties:
            attachment.remove()
    return result


def test_one_rank_that_skips_is_enough(tmp_path: Path) -> None:
    for result in run_on_ranks(skipping, 2, tmp_path, 2):
        assert result == {name: [True, True] for name in WIRES}


def frozen(rank: int, num_ranks: int) -> list[bool]:
    """Freezing some routers changes what travels, and nothing of the frozen."""
    results = []
    for options in WIRES.values():
        model = make()
        attachment, optimizer = tie(model, **options)
        train(model, optimizer, rank, num_ranks, range(3))
        routers = list(attachment.routers.values())
        routers[0].freeze()
        before = state_of(model)
        train(model, optimizer, rank, num_ranks, range(3, 5))
        after = state_of(model)
        moved = {key for key in before if not torch.equal(after[key], before[key])}
        results.append("routers.0.weight" not in moved and "routers.1.weight" in moved)
        attachment.remove()
    return results


def test_frozen_routers_stay_behind(tmp_path: Path) -> None:
    for results in run_on_ranks(frozen, 2, tmp_path, 2):
        assert results == [True] * len(WIRES)


def other_options(rank: int) -> list[str]:
    told = []
    for options in ({"wire": ("fp32", "bf16")[rank]}, {"overlap_after": rank}, {"shard": bool(rank)}):
        try:
            attach(nn.Sequential(MoE(D, 8, E, K)), torch.optim.SGD([nn.Parameter(torch.zeros(1))]), **options)
        except RuntimeError as error:
            told.append(str(error))
    return told


def test_options_that_differ_are_refused(tmp_path: Path) -> None:
    for told in run_on_ranks(other_options, 2, tmp_path):
        assert len(told) == 3
        assert all("options of attach must be the same on all ranks, got" in message for message in told)


def test_options_are_checked() -> None:
    model, optimizer = nn.Sequential(KMeansRouter(D, E, K)), torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="wire must be one of"):
        attach(model, optimizer, wire="fp8")
    with pytest.raises(ValueError, match="overlap_after must be at least 1, got -1"):
        attach(model, optimizer, overlap_after=-1)
    attach(model, optimizer, wire="bf16", shard=True, overlap_after=1)  # one process: nothing to exchange
    model(batch(0)[4:])
    optimizer.step()
