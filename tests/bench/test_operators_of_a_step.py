"""How many operators of PyTorch a training step of routing calls on a CPU.

At small sizes each costs some 5 microseconds whatever it does, so that their number is the step's time, and unlike a
time it is the same on every machine. A number that has to rise is a slowdown to be told in docs/performance.md.
"""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kmeans_route import KMeansRouter, LearnedRouter
from kmeans_route.routing.base import StatefulRouter

D, E, K, T = 64, 8, 2, 256


def operators(call: Callable[[], Any]) -> tuple[Any, int]:
    """The answer of a call, and how many operators it calls that no other one of PyTorch calls in turn."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        answer = call()
    aten = [event for event in seen.events() if event.name.startswith("aten::")]
    return answer, sum(e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::") for e in aten)


def step(router: StatefulRouter) -> dict[str, int]:
    x, dg = torch.randn(T, D, requires_grad=True), torch.randn(T, K)
    for _ in range(3):  # the first data, the first averages, and gradients that are there already
        router(x).weights.backward(dg)
        router.commit()
    output, forward = operators(lambda: router(x))
    _, backward = operators(lambda: output.weights.backward(dg))
    _, commit = operators(router.commit)
    return {"forward": forward, "backward": backward, "commit": commit}


@pytest.mark.filterwarnings("ignore:.*nothing commits its statistics")
@pytest.mark.parametrize(("make", "most"), [
    (lambda: KMeansRouter(D, E, K), {"forward": 60, "backward": 24, "commit": 162}),
    (lambda: KMeansRouter(D, E, K, directions="centroids"), {"forward": 60, "backward": 24, "commit": 90}),
    (
        lambda: KMeansRouter(D, E, K, directions="centroids", average="cumulative"),
        {"forward": 60, "backward": 24, "commit": 96},
    ),
    (lambda: LearnedRouter(D, E, K, kind="sigmoid"), {"forward": 30, "backward": 19, "commit": 28}),
])  # fmt: skip
def test_a_step_calls_no_more_operators_than_it_did(
    make: Callable[[], StatefulRouter], most: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A profiler that looks on would turn the bodies into operators of this package, as a user's does.
    schema = importlib.import_module("kmeans_route.ops.schema")
    monkeypatch.setattr(schema, "profiler", SimpleNamespace(_is_profiler_enabled=False))
    found = step(make())
    assert all(found[part] <= most[part] for part in most), f"{found}, expected at most {most}"
