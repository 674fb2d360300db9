"""The programs of a launch take turns at each load, store and atomic, by seeded choice: tickets and last arrivers hold.

200 schedules a kernel leave the bits of the usual order, and counters at zero. Planted faults show that such schedules
find what the usual order does not. What is shown is the logic of tickets, who waits for whom; not the order in which a
GPU makes stores visible.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kmeans_route import functional
from kmeans_route.checks import check_route_options
from kmeans_route.kernels import commit, common, dispatch, route, workspace
from kmeans_route.kernels.configs import Config
from tests.helpers import programs
from tests.helpers.compare import assert_same_bits, generator, make_inputs
from tests.helpers.faults import planted

SCHEDULES = 200
Outputs = dict[str, Tensor]
Subject = Callable[[ModuleType], Outputs]


@pytest.fixture
def borrowed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The counters of every launch."""
    made: list[Tensor] = []

    def remembered(_device: torch.device, size: int) -> Tensor:
        made.append(torch.zeros(size, dtype=torch.int32))
        return made[-1]

    monkeypatch.setattr(workspace, "_space", remembered)
    return made


def route_by(kernels: ModuleType, num_tokens: int, hidden_size: int, want_hist: bool) -> Outputs:
    """K = 1 and equal gates, which keeps the interpreter's work small."""
    x, weight, _ = make_inputs(num_tokens, hidden_size, 5, torch.float32)
    x[3] = torch.nan
    result = kernels.route_fwd(
        x, functional.directions(weight, x.dtype), None, None, None, check_route_options(5, 1, gate="uniform"),
        want_hist=want_hist, want_rank=True, config=Config(16, 16, 4, 2),
    )  # fmt: skip
    return {name: value for name, value in result._asdict().items() if isinstance(value, Tensor)}


def route_select(kernels: ModuleType) -> Outputs:
    """`_route_select_kernel`, five programs, behind `_route_fwd_kernel` with two splits; then `_route_rank_kernel`."""
    kernels.PROGRAMS = 64
    kernels.selected_rows = lambda *_, **_options: (8, 8)
    return route_by(kernels, 40, 24, want_hist=True)


def rank(kernels: ModuleType) -> Outputs:
    """`_rank_kernel`, two blocks."""
    kernels.RANK_BLOCK = 16
    ids = torch.rand(30, 5, generator=generator(1)).argsort(dim=1)[:, :2]
    ranks = kernels.rank(ids.contiguous(), torch.arange(30) % 9 != 4, 5)
    return {"rank": ranks.rank, "block_counts": ranks.block_counts, "offsets": ranks.offsets}


def commit_by(rule: str, cumulative: bool = False) -> Subject:
    def call(kernels: ModuleType) -> Outputs:
        """`_commit_kernel`, four experts."""
        kernels.BLOCK = 16
        gen, counts = generator(2), torch.tensor([9, 0, 3, 4])
        state = {
            "weight": torch.randn(4, 10, generator=gen), "centroids": torch.randn(4, 10, generator=gen),
            "expert_bias": torch.tensor([0.1, -0.2, 0.0, 0.3]),
            "score_std": torch.tensor(0.2), "steps": torch.tensor(3),
            "tokens_seen": torch.tensor([5, 6, 7, 0]) if cumulative else None,
            "dropped_total": torch.tensor(1), "tokens_per_expert": torch.zeros(4, dtype=torch.int64),
            "turn": torch.zeros(2, 4), "sums": torch.randn(4, 10, generator=gen), "counts": counts,
            "std_sum": torch.tensor(1.5), "num_tokens": torch.tensor(8), "num_dropped": torch.tensor(2),
            "margin_hist": torch.randint(3, (4, 1024), generator=gen, dtype=torch.int32),
        }  # fmt: skip
        kernels.commit(*state.values(), None, 2, 0.9, rule, 0.05)
        return {name: value for name, value in state.items() if value is not None}

    return call


KERNELS: dict[str, tuple[Subject, ModuleType]] = {
    "route_select": (route_select, route),
    "rank": (rank, dispatch),
    "commit-proportional": (commit_by("proportional"), commit),
    "commit-sign": (commit_by("sign", cumulative=True), commit),
    "commit-quantile": (commit_by("quantile"), commit),
    "commit-none": (commit_by("none"), commit),
}


@pytest.fixture(autouse=True)
def sizes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subjects set these for themselves."""
    for module, name in ((route, "PROGRAMS"), (route, "selected_rows"), (dispatch, "RANK_BLOCK"), (commit, "BLOCK")):
        monkeypatch.setattr(module, name, getattr(module, name))


def differs(got: Outputs, want: Outputs, borrowed: list[Tensor]) -> str:
    """What is wrong after a launch: outputs of other bits, counters not at zero; empty if nothing is."""
    wrong = []
    for name, value in want.items():
        try:
            assert_same_bits(got[name], value, name)
        except AssertionError:
            wrong.append(name)
    if any(counters.any() for counters in borrowed):
        wrong.append("counters")
    borrowed.clear()
    return ", ".join(wrong)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_schedule_leaves_the_same_bits(kernel: str, part: int, borrowed: list[Tensor]) -> None:
    subject, module = KERNELS[kernel]
    want, traces = subject(module), set()
    assert differs(want, want, borrowed) == ""
    seeds = range(part * SCHEDULES // 4, (part + 1) * SCHEDULES // 4)
    for seed in seeds:
        with programs.interleaved(seed) as baton:
            got = subject(module)
        assert differs(got, want, borrowed) == "", f"schedule {seed}"
        traces.add(tuple(baton.trace))
    assert len(traces) > len(seeds) / 2, "the schedules must differ"


Piece = tuple[str, str]
TOTAL_ARRIVAL = 'tl.atomic_add(ticket_ptr, 1, sem="acq_rel")'
TOTALS_READ = 'own = tl.atomic_and(totals_ptr + experts, 0, mask=experts < E, sem="relaxed")'
QUANTILES_READ = 'tl.load(quantile_ptr + experts, mask=real, other=0.0, cache_modifier=".cg")'
COMMIT_STARTS = "num_tokens = tl.load(num_tokens_ptr)"
RANK_STARTS = "count_and_rank(\n        ids, valid, in_batch"
EXPERTS = "tl.arange(0, BE), mask=tl.arange(0, BE) < E, other=0"


def before(anchor: str, *lines: str) -> Piece:
    """Lines put before the one that starts with the anchor, in the body of a function."""
    anchor = "    " + anchor
    return anchor, "".join(f"    {line}\n" for line in lines) + anchor


def arriving_before(anchor: str, arrival: str) -> list[Piece]:
    """The arrival moved up, and its result tested where it was."""
    return [before(anchor, f"arrived = {arrival}"), (f"if {arrival}", "if arrived")]


# Subject; pieces of the kernel's module; pieces of common.py. In the usual order every one of them goes unnoticed.
FAULTS: dict[str, tuple[str, list[Piece], list[Piece]]] = {
    "totals: the first program resets the ticket": (
        "route_select",
        [],
        [before(f"if {TOTAL_ARRIVAL}", "if tl.program_id(0) == 0:", "    tl.atomic_and(ticket_ptr, 0)")],
    ),
    "totals: as they were before the arrival": (
        "rank",
        [],
        [
            before(f"if {TOTAL_ARRIVAL}", f"stale = tl.load(totals_ptr + {EXPERTS})"),
            (TOTALS_READ, TOTALS_READ + "\n        own = stale"),
        ],
    ),
    "totals: arrival and test in two steps": (
        "route_select",
        [],
        [
            before(f"if {TOTAL_ARRIVAL}", TOTAL_ARRIVAL),
            (f"if {TOTAL_ARRIVAL} == num_arrivals - 1", "if tl.load(ticket_ptr) == num_arrivals"),
        ],
    ),
    "totals: arrival before the adds": (
        "rank",
        [
            before(RANK_STARTS, f"arrived = {TOTAL_ARRIVAL}"),
            ("publish_totals(totals_ptr", "publish_totals(arrived, totals_ptr"),
        ],
        [
            ("    totals_ptr, ticket_ptr, num_arrivals", "    arrived, totals_ptr, ticket_ptr, num_arrivals"),
            (f"if {TOTAL_ARRIVAL}", "if arrived"),
        ],
    ),
    "commit: arrival before the loads": ("commit-proportional", arriving_before(COMMIT_STARTS, TOTAL_ARRIVAL), []),
    "commit: quantiles as they were before the arrival": (
        "commit-quantile",
        [before(f"if {TOTAL_ARRIVAL}", f"stale = tl.load(quantile_ptr + {EXPERTS})"), (QUANTILES_READ, "stale")],
        [],
    ),
    "commit: the first program resets the ticket": (
        "commit-none",
        [before(COMMIT_STARTS, "if expert == 0:", "    tl.atomic_and(ticket_ptr, 0)")],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path, borrowed: list[Tensor]) -> None:
    kernel, pieces, common_pieces = FAULTS[fault]
    subject, module = KERNELS[kernel]
    want = subject(module)
    faulty = planted(module, tmp_path, *pieces)
    if common_pieces:
        faulty.publish_totals = planted(common, tmp_path, *common_pieces).publish_totals
    borrowed.clear()
    assert differs(subject(faulty), want, borrowed) == "", "the usual order shows it"
    for seed in range(SCHEDULES):
        with programs.interleaved(seed):
            got = subject(faulty)
        wrong = differs(got, want, borrowed)
        if wrong:
            print(f"schedule {seed + 1}: {wrong}")
            return
    pytest.fail(f"{SCHEDULES} schedules pass")
