"""Large pages for a large gradient: what is asked of the system, and that the gradient is the same."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kmeans_route import route
from kmeans_route.backends import chunks, pages
from tests.helpers.compare import assert_same_bits, generator, make_inputs

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_the_request_covers_whole_pages_of_a_large_tensor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda start, length, _advice: asked.append((start, length)))
    monkeypatch.setattr(pages, "MAPPED_ANEW", 40_000)
    pages.empty_like(torch.empty(99, 100))
    assert asked == []
    made = pages.empty_like(torch.empty(101, 100).T)
    assert made.shape == (100, 101)
    assert made.is_contiguous()
    ((start, length),) = asked
    end = made.data_ptr() + made.nbytes
    assert start % mmap.PAGESIZE == 0
    assert length % mmap.PAGESIZE == 0
    assert made.data_ptr() <= start < made.data_ptr() + mmap.PAGESIZE
    assert end - mmap.PAGESIZE < start + length <= end


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="Linux without transparent huge pages")
def test_the_system_takes_the_request() -> None:
    made = pages.empty_like(torch.empty(pages.MAPPED_ANEW // 4))
    place, flags = made.data_ptr() + made.nbytes // 2, set[str]()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            low, high = (int(side, 16) for side in first.split("-"))
            inside = low <= place < high
        elif inside and first == "VmFlags:":
            flags = set(line.split()[1:])
    assert "hg" in flags, f"no request for large pages in {sorted(flags)}"


def test_the_gradient_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = make_inputs(1_001, 90, 20, torch.float32, seed=12)
    x[500] = torch.nan
    upstream = torch.randn(1_001, 4, generator=generator(13))

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        route(leaf, weight, 4, bias, backend="torch").weights.backward(upstream)
        assert leaf.grad is not None
        return leaf.grad

    whole = gradient()
    monkeypatch.setattr(chunks, "BYTES", 200_000)  # two in the backward
    monkeypatch.setattr(pages, "MAPPED_ANEW", 0)
    assert_same_bits(gradient(), whole)
