"""What a benchmark needs is said with the remedy, before an import fails."""

import pytest

from benchmarks import needs

pytest.importorskip("triton")


def test_kernels_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    needs.kernels()
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'kmeans_route.kernels cannot be imported .* pip install -e "\.\[triton\]"'):
        needs.kernels()
