"""Shared fixtures: memory that nobody wrote is NaN, every test starts from one seed, hypothesis profiles."""

import os
from collections.abc import Iterator

import torch

# The tests run the Triton kernels in Triton's interpreter, on CPU tensors, wherever they are; it is decided as the
# kernels are imported, so before that. The GPU tests need a process of their own: `make gpu`, or this variable.
if not (os.environ.get("KMEANS_ROUTE_GPU_TESTS") == "1" and torch.cuda.is_available()):
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # a machine with a GPU may have pytest alone; the GPU tests need no more
    collect_ignore = ["test_call_orders.py", "test_properties.py"]
else:
    COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
    # `fast` repeats the same cases, so that a failure in CI can be seen again; `slow` draws new ones each time.
    settings.register_profile("fast", max_examples=100, derandomize=True, database=None, **COMMON)
    settings.register_profile("slow", max_examples=1000, print_blob=True, **COMMON)
    settings.load_profile("fast")


ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"


@pytest.fixture
def plain_empty() -> None:
    """Asked for by tests that want torch.empty, and the choice of kernels, as users have them."""


@pytest.fixture(autouse=True)
def nan_filled_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill torch.empty with NaN (the largest value for integers), in C++ too: an element nobody wrote shows."""
    if "plain_empty" in request.fixturenames:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill_before


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """The same global random state at the start of every test."""
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU, Triton's in its interpreter."""
    if request.param == "triton":
        request.getfixturevalue("coarse_rows")
    return str(request.param)


@pytest.fixture
def coarse_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows a program than on a GPU: the interpreter pays by the operation, not by the element."""
    from kmeans_route.kernels import combine
    from kmeans_route.kernels.configs import Config

    monkeypatch.setattr(combine, "row_config", lambda dtype: Config(32, 32, 4, 2))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what cannot run here: GPU tests outside of a GPU run; in the interpreter bf16, which it gets wrong, and
    fp64, which the kernels do not take."""
    items[:] = [item for item in items if not _beyond_the_interpreter(item)]


def _beyond_the_interpreter(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu"):
        return not ON_GPU
    callspec = getattr(item, "callspec", None)
    if callspec is None or callspec.params.get("backend") != "triton":
        return False
    if item.get_closest_marker("not_interpreted"):
        return True
    if any(shape in item.name for shape in ("33, 2880", "255, 8, 160", "160-2", "64-64")):  # minutes; see test_kernels
        return True
    named = [value for value in callspec.params.values() if isinstance(value, torch.dtype)]
    return torch.bfloat16 in named or torch.float64 in named
