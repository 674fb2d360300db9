"""Shared fixtures: memory that nobody wrote is NaN, every test starts from one seed, hypothesis profiles."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
# `fast` repeats the same cases, so that a failure in CI can be seen again; `slow` draws new ones each time.
settings.register_profile("fast", max_examples=100, derandomize=True, database=None, **COMMON)
settings.register_profile("slow", max_examples=1000, print_blob=True, **COMMON)
settings.load_profile("fast")


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


@pytest.fixture(params=["reference", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU."""
    return str(request.param)
