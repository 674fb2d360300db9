"""Shared fixtures: memory that nobody wrote is NaN, every test starts from one seed, hypothesis profiles; and Triton's
interpreter, which computes bf16 by value, checks every access, and runs launches of several programs in two orders."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import torch

# The tests run the Triton kernels in Triton's interpreter, on CPU tensors, wherever they are; it is decided as the
# kernels are imported, so before that. The GPU tests need a process of their own: `make gpu`, or this variable.
if not (os.environ.get("KMEANS_ROUTE_GPU_TESTS") == "1" and torch.cuda.is_available()):
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from tests.helpers.guards import Guards

collect_ignore: list[str] = []
try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # a machine with a GPU may have pytest alone; the GPU tests need no more
    collect_ignore += ["training/test_call_orders.py", "routing/test_properties.py"]
else:
    COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
    # `fast` repeats the same cases, so that a failure in CI can be seen again; `slow` draws new ones each time.
    settings.register_profile("fast", max_examples=100, derandomize=True, database=None, **COMMON)
    settings.register_profile("slow", max_examples=1000, print_blob=True, **COMMON)
    settings.load_profile("fast")


ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"
INTERPRETED = not ON_GPU and find_spec("triton") is not None
if INTERPRETED:
    from tests.helpers import interpreter, programs

    interpreter.install()
else:
    collect_ignore_glob = ["kernels/test_interpreter_*.py", "kernels/test_interleaving.py", "kernels/test_bounds.py"]


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


@pytest.fixture
def guards() -> Iterator[Guards]:
    """Every tensor that the test, and a launcher it calls, makes lies between guard zones, which stay as they are."""
    with Guards() as made:
        yield made
    made.check()


@pytest.fixture(scope="session")
def compared_launches() -> set[object]:
    """Kinds of launches that tests of what lies above the kernels have run in two orders."""
    return set()


@pytest.fixture(autouse=INTERPRETED)
def two_orders(request: pytest.FixtureRequest, compared_launches: set[object]) -> Iterator[set[object]]:
    """Launches of several programs run in the usual order and in a random one, and must leave the same bits.

    Of launches of one kind the first does; in tests of the kernels the first of each test. Gives the kinds that did.
    """
    of_kernels = request.path.name.startswith(("test_kernel", "test_bounds", "test_bad_ids", "test_interpreter"))
    compared = set() if of_kernels else compared_launches
    with programs.compared_orders(request.node.nodeid, compared):
        yield compared


@pytest.fixture(params=["reference", "torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU, Triton's in its interpreter."""
    if request.param == "triton":
        request.getfixturevalue("coarse_rows")
    return str(request.param)


@pytest.fixture
def coarse_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows a program than on a GPU: the interpreter pays by the operation, not by the element."""
    from kmeans_route.kernels import combine, route, route_bwd
    from kmeans_route.kernels.configs import Config

    for module in (combine, route_bwd):
        monkeypatch.setattr(module, "row_config", lambda dtype: Config(32, 32, 4, 2))
    monkeypatch.setattr(combine, "copies_config", lambda *_: Config(32, 32, 4, 2))
    monkeypatch.setattr(route, "selected_rows", lambda *_, **_long: (16, 16))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what cannot run here: GPU tests outside of a GPU run; on the kernels fp64, which they do not take, and
    what would take the interpreter minutes."""
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
    return any(value is torch.float64 for value in callspec.params.values())
