"""Run by a test, without a GPU and without the interpreter: is what was compiled ahead what a launch looks up?

Other processes compile the launches planned for one small cell. Then this one launches them as on a GPU: by the
package's own functions, with real tensors, through the whole of Triton's launch, under a driver that ends where the
GPU would begin. It prints what was found in the cache and what was not.
"""

import json
import os
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.runtime import driver

from benchmarks.gpu import cells, checks, launches
from benchmarks.gpu.ahead import Ahead, NoDevice
from benchmarks.offline import TARGETS
from kmeans_route import KMeansRouter, backends

TARGET = TARGETS["sm_90"]
CELL = cells.Cell("small", 40, 64, 16, 2)


class Phantom(NoDevice):
    """Loads nothing and launches nothing, and lets Triton believe in both."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 1 << 20}
    )

    def launcher_cls(self, _src: Any, _metadata: Any) -> Any:
        """What Triton makes once for each kernel and then calls for each launch."""
        return lambda *_: None


def key_of_triton(launch: Any) -> str:
    """What the just-in-time compiler tells kernels apart by."""
    *_, binder = launch.kernel.device_caches[0]
    _, specialization, options = binder(**launch.arguments, **launch.options)
    return f"{launch.name} {specialization} {options}"


def compare_keys() -> dict[str, int]:
    """Keys of all launches of the GPU run, ours and Triton's: as many of each as there are pairs."""
    seen: set[tuple[str, str]] = set()
    plan = [cell for of_job in cells.CELLS.values() for cell in of_job]
    for cell in dict.fromkeys(plan):
        for launch in (each for part in launches.parts_of(cell).values() for each in part):
            seen.add((launches.key_of(launch), key_of_triton(launch)))
    for trial in cells.trials(dry=False):
        seen |= {(launches.key_of(launch), key_of_triton(launch)) for launch in launches.of_trial(trial)}
    ours, theirs = ({pair[i] for pair in seen} for i in (0, 1))
    return {"keys": len(ours), "keys_of_triton": len(theirs), "pairs": len(seen)}


def main() -> None:
    """Print one JSON document."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        planned = launches.distinct([CELL])
        ahead = Ahead(([CELL], []), len(planned), TARGET, "sm_90", workers=2, launchers=False)
        driver.set_active(Phantom(TARGET))
        found: dict[str, Any] = compare_keys()
        assert ahead.wait(200), ahead.problems
        entries = set(os.listdir(folder))
        looked_up: list[tuple[str, bool]] = []
        triton.knobs.compilation.listener = lambda src, cache_hit, **_: looked_up.append((src.name, cache_hit))
        backends.INTERPRETED = True  # lets the kernels take tensors on a CPU
        p = checks.Problem(CELL, torch.device("cpu"))
        checks.routing_alone(p)
        checks.training_step(p)
        checks.pieces(p)
        whitened = KMeansRouter(*p.shape[1:], backend="triton")
        whitened.set_centroids(p.centroids)
        whitened.route(p.x.detach(), gather=True)
        whitened.commit()
        found |= {
            "planned": len(planned),
            "problems": ahead.problems,
            "hits": [name for name, hit in looked_up if hit],
            "missed": [name for name, hit in looked_up if not hit],
            "new_entries": sorted(set(os.listdir(folder)) - entries),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
