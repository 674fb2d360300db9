"""One contestant's time on its own: median and quartiles of samples, and the peak of what it allocates."""

from typing import Any

import torch

from kmeans_route.bench.clock import Clock, Runner, nothing

REPEATS_BACK_TO_BACK = 20
Outcome = dict[str, Any]


def measure(clock: Clock, run: Runner, prepare: Runner = nothing, *, back_to_back: bool = False) -> Outcome:
    """Median and quartiles of `run` in microseconds, and the peak of what it allocates in bytes.

    prepare: called before each sample, outside of its time. back_to_back: also the mean of 20 calls in one graph, with
    whatever they leave in L2.
    """
    with clock.scope():
        peak = clock.warm_up(run, prepare)
        timed, method = clock.captured(run)
        count = 2
        if clock.on_gpu:  # at least 20 samples, of about a second in all; fewer where one takes more than 50 ms
            count = max(5, min(50, int(1e6 / max(clock.samples_us(timed, prepare, 1)[0], 1.0))))
        samples = torch.tensor(clock.samples_us(timed, prepare, count), dtype=torch.float64)
        q1, median, q3 = samples.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        result = {"median_us": median, "q1_us": q1, "q3_us": q3, "samples": count}
        result |= {"peak_bytes": peak, "method": method}
        if back_to_back and method == "graph":
            many = clock.captured(lambda: [run() for _ in range(REPEATS_BACK_TO_BACK)])
            if many[1] == "graph":
                times = torch.tensor(clock.samples_us(many[0], prepare, 20))
                result["back_to_back_us"] = float(times.median()) / REPEATS_BACK_TO_BACK
        return result
