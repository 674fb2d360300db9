"""Options of the benchmarks, their parameters, and the `bench` fixture that runs, prints and keeps a contest.

A test that takes `shape` runs for each of its file's SHAPES (name -> BenchShape), one that takes `dtype` in fp32 and
bf16; with --quick the shapes are those of QUICK here, or of its file.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.contest import Contest
from benchmarks.harness.results import write_results
from kmeans_route.bench.memory import recycle_memory
from kmeans_route.bench.results import environment
from kmeans_route.testing import BenchShape

RECORDS: list[dict[str, object]] = []
QUICK = {"quick": BenchShape(96, 24, 8, 2)}
QUICK_REPEATS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kmeans_route benchmarks")
    group.addoption("--results", type=Path, default=None, help="write all results to this JSON file")
    group.addoption("--repeats", type=int, default=None, help="rounds of each contest (15, the least for a result)")
    group.addoption("--threads", type=int, default=2, help="threads of PyTorch")
    group.addoption("--max-ratio", type=float, default=1.0, help="fail above this ratio of training steps; 0: report")
    group.addoption("--malloc", choices=("recycle", "default"), default="default", help="see bench/memory.py")
    group.addoption("--no-compile", action="store_true", help="leave out what needs torch.compile, and say so")
    group.addoption("--quick", action="store_true", help="tiny shapes, 2 rounds, nothing asserted about times")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        shapes = getattr(metafunc.module, "QUICK", QUICK) if quick else metafunc.module.SHAPES
        metafunc.parametrize("shape", shapes.values(), ids=shapes.keys())
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def command_line(config: pytest.Config) -> str:
    """The command, with --results and absolute paths left out."""
    kept: list[str] = []
    skip = False
    for argument in config.invocation_params.args:
        if skip or Path(argument.split("=")[-1]).is_absolute():
            skip = False
            continue
        if argument == "--results":
            skip = True
            continue
        if not argument.startswith("--results="):
            kept.append(argument)
    return " ".join(["python -m pytest", *kept])


@pytest.fixture(scope="session", autouse=True)
def one_setting_for_all(request: pytest.FixtureRequest) -> Iterator[None]:
    """The threads and the memory regime that every benchmark runs with."""
    if request.config.getoption("--malloc") == "recycle":
        recycle_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


class Bench:
    """Runs a verified contest inside pytest-benchmark, prints its table, keeps its record."""

    def __init__(self, config: pytest.Config, benchmark: BenchmarkFixture) -> None:
        self.config, self.benchmark = config, benchmark
        self.quick: bool = config.getoption("--quick")
        self.repeats: int = config.getoption("--repeats") or (QUICK_REPEATS if self.quick else 15)
        self.max_ratio: float = 0.0 if self.quick else config.getoption("--max-ratio")
        self.compiles: bool = not config.getoption("--no-compile")

    def run(self, contest: Contest, extra: dict[str, object] | None = None) -> None:
        """pytest-benchmark's own figure is the time of a whole round; the contestants' times go into extra_info."""
        self.start(contest)
        self.keep(contest, extra)

    def start(self, contest: Contest) -> None:
        """The rounds, first those that are not counted."""
        contest.warm_up(2)
        self.benchmark.pedantic(contest.round, rounds=self.repeats, iterations=1)  # type: ignore[no-untyped-call]

    def keep(self, contest: Contest, extra: dict[str, object] | None = None) -> None:
        """Print the table and keep the record, with what else is known about the contest."""
        settings = {"malloc": self.config.getoption("--malloc"), "quick": self.quick}
        record = {**contest.record(), **settings, **(extra or {})}
        self.benchmark.extra_info.update(environment=environment(command_line(self.config)), **record)
        RECORDS.append(record)
        print(f"\n\n{contest.table()}")


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Bench:
    """Runs contests with the options of the command line."""
    torch._dynamo.reset()  # or all contests together would run into the limit of recompilations
    return Bench(request.config, benchmark)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--results")
    if path is not None and RECORDS:
        write_results(path, command_line(session.config), RECORDS)
        print(f"\nwrote {path}")
